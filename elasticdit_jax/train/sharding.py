"""Where arrays live on many devices: the one file of this room that says mesh.

    axis     what it splits                                             traffic
    data     the batch; its outermost part runs across slices          one sum of gradients a step
    fsdp     the batch, and every large array of the state              weights are gathered where they are used
    tensor   heads and hidden channels (Megatron)                       activations, twice a block: for fast links

Rules (a regular expression on the path of an array -> the axis of each of its dimensions) are resolved on shapes: a
dimension that its axes do not divide is kept whole on every device. The optimiser's state, the EMA and the teacher hold
trees of parameters, so that the same rules find them by the tail of their paths.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elasticdit_jax.models import dit

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
_WHOLE = PartitionSpec()
REST = -1  # as the size of an axis: all devices that the other axes leave

Rules = Sequence[tuple[str, PartitionSpec]]

# First match wins. Columns of the first product of a pair and rows of the second go over `tensor`.
RULES: Rules = (
  (r"(qkv|up|modulation)/kernel$", PartitionSpec("fsdp", "tensor")),
  (r"(qkv|up)/bias$", PartitionSpec("tensor")),
  (r"block_\d+/((image|text)_out|(image|text)_mlp/down)/kernel$", PartitionSpec("tensor", "fsdp")),
  (r"refine/kernel$", PartitionSpec()),
  # Adapters (train/lora.py): a product of the two parts is split like the kernel that it changes.
  (r"(qkv|up)/kernel/a$", PartitionSpec("fsdp")),
  (r"(qkv|up)/kernel/b$", PartitionSpec(None, "tensor")),
  (r"(image_out|text_out|down)/kernel/a$", PartitionSpec("tensor")),
  (r"(image_out|text_out|down)/kernel/b$", PartitionSpec(None, "fsdp")),
  (r"(kernel|text_position)$", PartitionSpec("fsdp")),
  (r"", PartitionSpec()),
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Devices in a grid, and the rules by which arrays are laid over them.

  On a single device every method hands back what it was given: such a run needs none of this.

  Attributes:
    mesh: of the axes AXES.
    rules: see RULES.
    slices: groups of devices with slow links between them, that the outermost part of `data` runs across.
  """

  mesh: Mesh
  rules: Rules = RULES
  slices: int = 1

  @property
  def single(self) -> bool:
    """Whether there is one device only."""
    return self.mesh.size == 1

  @property
  def batch_shards(self) -> int:
    """Parts that the batch is split into."""
    return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

  def describe(self) -> str:
    """One line for the log."""
    shape = " x ".join(f"{axis} {self.mesh.shape[axis]}" for axis in AXES)
    kind = self.mesh.devices.flat[0].device_kind
    return f"{self.mesh.size} devices ({kind}): {shape}; {jax.process_count()} processes"

  def bind(self, cfg: dit.DiTConfig) -> dit.DiTConfig:
    """The backbone with the names of the axes that its batch and its heads are split over."""
    if self.single:
      return cfg
    tensor, heads = self.mesh.shape["tensor"], cfg.width // cfg.head_dim
    if heads % tensor:
      logging.info("sharding: %d heads are not a multiple of tensor=%d; every device computes all", heads, tensor)
    split_heads = tensor > 1 and heads % tensor == 0
    return dataclasses.replace(cfg, batch_axes=BATCH_AXES, head_axes=("tensor",) if split_heads else None)

  def active(self) -> contextlib.AbstractContextManager:
    """Within it, programs are traced and run for this mesh: names of axes have a meaning."""
    return contextlib.nullcontext() if self.single else jax.set_mesh(self.mesh)

  def check_batch(self, size: int, accumulate: int = 1) -> None:
    """Raises ValueError where the global batch cannot be cut into equal parts."""
    parts = accumulate * self.batch_shards
    if size % parts:
      raise ValueError(
        f"config.data.batch_size: expected a multiple of {parts} (config.train.accumulate={accumulate} x"
        f" {self.batch_shards} parts over {' and '.join(BATCH_AXES)}), got {size}"
      )

  def of(self, tree: Any) -> Any:
    """The shardings of a tree (arrays or shapes), by the rules; logs the arrays that stay whole against a rule."""
    whole = []

    def leaf(path: tuple[Any, ...], x: Any) -> NamedSharding:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      spec = next(spec for pattern, spec in self.rules if re.search(pattern, name))
      resolved = self._resolve(spec, x.shape)
      if resolved != spec and x.ndim:
        whole.append(f"{name} {x.shape}")
      return NamedSharding(self.mesh, resolved)

    shardings = jax.tree_util.tree_map_with_path(leaf, tree)
    if whole:
      logging.info("sharding: %d arrays are not divided as their rule says, such as %s", len(whole), whole[0])
    return shardings

  @property
  def places(self) -> Callable[[Any], Any] | None:
    """`of`, for code that asks where parameters lie; None on a single device."""
    return None if self.single else self.of

  def _resolve(self, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """`spec` without the axes that do not divide their dimension, or have none."""
    kept = []
    for size, axes in zip(shape, spec, strict=False):
      names = (axes,) if isinstance(axes, str) else axes or ()
      kept.append(axes if size % math.prod(self.mesh.shape[n] for n in names) == 0 else None)
    return PartitionSpec(*kept)

  def build(self, make: Callable[..., Any], *args: Any) -> Any:
    """make(*args) as one program whose results come into being where they belong.

    Args:
      make: function of trees of arrays.
      *args: trees; every process holds all of them.
    """
    if self.single:
      return make(*args)
    shardings = self.of(jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=shardings)(*jax.tree.map(self._put, args, self.of(args)))

  def results(self, state: Any) -> Any:
    """out_shardings of a step (state, ...) -> (state, metrics): the state stays where it is, metrics are everywhere."""
    if self.single:
      return None
    return jax.tree.map(lambda x: x.sharding, state), NamedSharding(self.mesh, _WHOLE)

  def replicate(self, tree: Any) -> Any:
    """The whole tree on every device; every process must hold the same values."""
    if self.single:
      return tree
    return jax.tree.map(lambda x: self._put(x, NamedSharding(self.mesh, _WHOLE)), tree)

  def spread(self, tree: Any) -> Any:
    """Arrays [B, ...] that every process holds whole, split over the devices along B where it divides."""
    if self.single:
      return tree
    return jax.tree.map(
      lambda x: self._put(x, NamedSharding(self.mesh, self._resolve(PartitionSpec(BATCH_AXES), x.shape))), tree
    )

  def keep(self, tree: Any) -> Any:
    """Within a program: the tree, with the demand that it lies where `of` says."""
    return tree if self.single else jax.lax.with_sharding_constraint(tree, self.of(tree))

  def keep_rows(self, tree: Any) -> Any:
    """Within a program: arrays [B, ...], with the demand that they lie as `spread` puts them."""
    if self.single:
      return tree
    specs = jax.tree.map(lambda x: self._resolve(PartitionSpec(BATCH_AXES), x.shape), tree)
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs))

  def owned(self, x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, rows) of an array [B, ...] that this process answers for: one that holds them; each row has one."""
    if jax.process_count() == 1:
      return np.arange(len(x)), np.asarray(x)
    holders: dict[tuple[int, int, int], set[int]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
      holders.setdefault(index[0].indices(len(x)), set()).add(device.process_index)
    shards = {shard.index[0].indices(len(x)): shard.data for shard in x.addressable_shards}
    numbers, parts = [], []
    for place in sorted(shards):
      # Several hold it where `tensor` spans them: they take turns.
      among, rows = sorted(holders[place]), np.arange(*place)
      mine = np.array(among)[rows % len(among)] == jax.process_index()
      numbers.append(rows[mine])
      parts.append(np.asarray(shards[place])[mine])
    return np.concatenate(numbers), np.concatenate(parts)

  def share(self) -> tuple[int, int]:
    """(index, count): this process reads part `index` of `count` equal parts of every batch.

    Processes that hold the same rows, because `tensor` spans them, have the same index. Where rows overlap in part,
    all of them read everything.
    """
    held: dict[int, set[int]] = {}
    for shard, devices in enumerate(self.mesh.devices.reshape(self.batch_shards, -1)):
      for device in devices:
        held.setdefault(device.process_index, set()).add(shard)
    parts = sorted({tuple(sorted(shards)) for shards in held.values()})
    if sum(map(len, parts)) > self.batch_shards or len(set(map(len, parts))) > 1:
      return 0, 1
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)

  def put_batch(self, batch: Any) -> Any:
    """This process's share of a batch (see `share`), as parts of the global one."""
    if self.single:
      return batch
    count = self.share()[1]
    if count == 1:
      return self.spread(batch)
    sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def put(x: Any) -> jax.Array:
      return jax.make_array_from_process_local_data(sharding, np.asarray(x), (count * len(x), *x.shape[1:]))

    return jax.tree.map(put, batch)

  def local(self, tree: Any) -> Any:
    """The whole tree on this process's first device; all processes must call it together."""
    if self.single:
      return tree
    gather = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, _WHOLE))
    # Leaf by leaf: the other devices hold one whole array at a time.
    return jax.tree.map(lambda x: jax.block_until_ready(gather(x)).addressable_data(0), tree)

  def _put(self, x: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
      return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def from_config(config: Any) -> Layout:
  """The layout of config.mesh (fields fsdp and tensor; data takes the rest) over all devices; without it, of one.

  Raises:
    ValueError: where they do not divide the devices.
  """
  if "mesh" not in config:
    return one_device()
  return make(jax.devices(), fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)


def make(
  devices: Sequence[jax.Device], *, fsdp: int = 1, tensor: int = 1, slices: int | None = None, rules: Rules = RULES
) -> Layout:
  """A layout of these devices; `data` takes what the other axes leave.

  Args:
    devices: of all processes, or of a topology without hardware.
    fsdp, tensor: sizes of the axes; REST (-1) for one of them takes all that is left of a slice.
    slices: groups of devices with slow links between them; None reads it off the devices. Only `data` crosses them.
    rules: see RULES.

  Raises:
    ValueError: naming the field that does not divide the devices of a slice.
  """
  if slices is None:
    slices = len({getattr(d, "slice_index", None) for d in devices})
  if slices < 1 or len(devices) % slices:
    raise ValueError(f"slices: expected a divisor of the {len(devices)} devices, got {slices}")
  sizes = _sizes(len(devices) // slices, {"fsdp": fsdp, "tensor": tensor})
  return Layout(Mesh(_arrange(devices, slices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES)), rules, slices)


def _sizes(devices: int, asked: dict[str, int]) -> tuple[int, int, int]:
  """Sizes of AXES within a slice."""
  for axis, size in asked.items():
    others = math.prod(s for a, s in asked.items() if a != axis and s != REST)
    if size == REST and devices % others == 0 and REST not in (s for a, s in asked.items() if a != axis):
      asked = asked | {axis: devices // others}
    elif size < 1:
      raise ValueError(f"config.mesh.{axis}: expected a number of devices, or {REST} for all that are left, got {size}")
  given = math.prod(asked.values())
  if devices % given:
    text = ", ".join(f"{axis}={size}" for axis, size in asked.items())
    raise ValueError(f"config.mesh: {text} do not divide the {devices} devices of a slice; choose divisors of it")
  return devices // given, asked["fsdp"], asked["tensor"]


def _arrange(devices: Sequence[jax.Device], slices: int, sizes: tuple[int, int, int]) -> np.ndarray:
  """Devices [data, fsdp, tensor], neighbours on fast links; slices are the outermost part of data."""
  if devices[0].platform != "tpu":
    order = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id))
    return np.array(order).reshape(slices * sizes[0], *sizes[1:])
  if slices == 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return mesh_utils.create_hybrid_device_mesh(sizes, (slices, 1, 1), devices, allow_split_physical_axes=True)


def one_device() -> Layout:
  """The layout of a run on the first device of this process alone."""
  return make(jax.local_devices()[:1])
