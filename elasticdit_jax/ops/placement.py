"""Where a program will run, for what XLA does not place well by itself: hand-written kernels, whole matrices.

A kernel is opaque to XLA's partitioner: in a program split over devices it has to say itself which axes are split. This
is why this file, beside train/sharding.py, speaks of meshes: it reads the one the caller has set and owns none.
"""

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from elasticdit_jax.types import Array

# Names of one or several mesh axes over which an array axis is split; None for not split.
Axes = str | tuple[str, ...] | None


def platform() -> str:
  """Of what the program will run on, say "tpu" or "cpu": the mesh set by jax.set_mesh, else the default backend."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
  """Of what the program will run on, say "TPU v6 lite"; found like `platform`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def cores_per_device() -> int:
  """Processor cores that each of this process's CPU devices has, by those this process may use; at least 1.

  What other processes on this machine use and quotas of a container are not seen: a guess for speed, nothing else.
  """
  usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return max(1, usable // jax.local_device_count("cpu"))


def product_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """In which products of arrays of this dtype run fastest here: float32 for bfloat16 on many CPUs, else the dtype."""
  dtype = jnp.dtype(dtype)
  slow = dtype == jnp.bfloat16 and platform() == "cpu" and not _multiplies_bfloat16()
  return jnp.dtype(jnp.float32) if slow else dtype


@functools.cache
def _multiplies_bfloat16() -> bool:
  """Whether this processor multiplies bfloat16 faster than float32, by what Linux says of it; elsewhere False.

  Intel's AVX-512 has an instruction for it, with which XLA reaches half of float32's rate; AMD's is the faster way.
  """
  try:
    with open("/proc/cpuinfo") as lines:
      first = lines.read().split("\n\n")[0]
  except OSError:
    return False
  words = set(first.split())
  return "amx_bf16" in words or "bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words


def on_one_device() -> bool:
  """Whether code traced here surely sees the arrays of one device: alone, or inside a jax.shard_map of all axes."""
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.axis_names:
    return jax.device_count() == 1
  return all(size == 1 or axis in mesh.manual_axes for axis, size in mesh.shape.items())


def axes_in_type(x: Array) -> tuple[Axes, ...]:
  """For every dimension of x the explicit mesh axes over which it is split, which its type names; else None."""
  typed = jax.typeof(x)
  return (*typed.sharding.spec, *[None] * typed.ndim)[: typed.ndim]


def under_explicit_axes(place: Callable[[Mapping[str, Any]], PartitionSpec]) -> Callable[[Callable], Callable]:
  """Decorator: the function also works where mesh axes are explicit, which are what jax.make_mesh makes by default.

  Within, XLA divides the work over them as it does over automatic ones.

  Args:
    place: from the function's arguments by name to the explicit axes over which its result is split.
  """

  def decorate(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> jax.Array:
      leaves, tree = jax.tree.flatten((args, kwargs))
      where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]
      arrays = [leaves[i] for i in where]
      mesh = _mesh_of(arrays)
      if not mesh.explicit_axes:
        return function(*args, **kwargs)

      def call(*arrays: Array) -> jax.Array:
        filled = dict(enumerate(leaves)) | dict(zip(where, arrays, strict=True))
        args, kwargs = jax.tree.unflatten(tree, filled.values())
        return function(*args, **kwargs)

      out = place(signature.bind(*args, **kwargs).arguments)
      unset = not jax.sharding.get_abstract_mesh().axis_names
      with jax.sharding.use_abstract_mesh(mesh) if unset else contextlib.nullcontext():
        return jax.sharding.auto_axes(call, axes=mesh.explicit_axes, out_sharding=out)(*arrays)

    return wrapped

  return decorate


def _mesh_of(arrays: Sequence[Array]) -> jax.sharding.AbstractMesh:
  """The caller's mesh; where none is set, that which the types of these arrays name, since JAX computes there."""
  meshes = (jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays))
  return next((mesh for mesh in meshes if mesh.axis_names), meshes[0])


def split(x: jax.Array, *axes: Axes) -> jax.Array:
  """x, with the demand that its leading dimensions be split over these mesh axes; without any axis, x as it is."""
  if not any(axes):
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def over_matrices(work: Callable[[jax.Array], jax.Array], stack: jax.Array, place: NamedSharding | None) -> jax.Array:
  """work(stack), shared by whole matrices among the devices that each hold a part of all of them.

  Args:
    work: of a stack, matrix by matrix; zeros stay zeros.
    stack: [n, rows, columns], whose matrices lie at `place`.
    place: rows and columns split over mesh axes, or None for a program that is not split.

  Returns:
    Like stack, at `place` again.
  """
  rows, columns = (*(place.spec if place else ()), None, None)[:2]
  axes = (*_names(rows), *_names(columns))
  if not axes:
    return work(stack)
  # One axis at a time: XLA knows no single exchange for two of them, and would gather everything everywhere.
  way = (None, rows, columns), (_names(rows), None, columns), (axes, None, None)
  n, parts = len(stack), math.prod(place.mesh.shape[axis] for axis in axes)
  stack = jnp.pad(stack, ((0, -n % parts), (0, 0), (0, 0)))
  for spec in way:
    stack = _put(stack, place, spec)
  done = work(stack)
  for spec in reversed(way):
    done = _put(done, place, spec)
  return done[:n]


def _put(x: jax.Array, place: NamedSharding, spec: tuple[Axes, ...]) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, PartitionSpec(*spec)))


def _names(axes: Axes) -> tuple[str, ...]:
  return (axes,) if isinstance(axes, str) else axes or ()


def _like_queries(arguments: Mapping[str, Any]) -> PartitionSpec:
  batch, _, heads, _ = axes_in_type(arguments["q"])
  return PartitionSpec(batch, None, heads)


def over_batch_and_heads(
  attend: Callable[..., jax.Array],
  q: Array,
  k: Array,
  v: Array,
  lists: dict[str, Array | None],
  masks: dict[str, Array | None],
  *,
  batch_axes: Axes,
  head_axes: Axes,
) -> jax.Array:
  """attend(q, k, v, **lists, **masks) on every device's own samples and heads, under jax.shard_map: no communication.

  Explicit axes need not be given: the type of q names them. Without any axis XLA divides the work.

  Args:
    attend: the attention of the samples and heads that it is given.
    q: [B, queries, heads, head_dim].
    k: [B, keys, heads, head_dim].
    v: like k.
    lists: arrays [B, heads or 1, ...], or None.
    masks: arrays [B, ...], or None.
    batch_axes: mesh axes over which B is split.
    head_axes: mesh axes over which heads are split.

  Returns:
    Like q, its samples and heads split like those of q.

  Raises:
    ValueError: without a mesh, for an axis it does not have, or one that does not divide what it splits.
  """
  named = {*_names(batch_axes), *_names(head_axes)}
  typed = (None if named.intersection(_names(axes)) else axes for axes in axes_in_type(q)[::2])
  places = (axes if named is None else named for named, axes in zip((batch_axes, head_axes), typed, strict=True))
  return _split_attention(attend, q, k, v, lists, masks, *places)


def undivided(attend: Callable[..., jax.Array], q: Array, k: Array, v: Array, *more: Array | None) -> jax.Array:
  """attend(q, k, v, *more), with the division of the work left to XLA; like q, its samples and heads split like q's."""
  if jax.sharding.get_abstract_mesh().manual_axes:  # JAX has no gradients of automatic axes within manual ones.
    return attend(q, k, v, *more)
  return _undivided(attend, q, k, v, *more)


@under_explicit_axes(_like_queries)
def _undivided(attend, q, k, v, *more):
  return attend(q, k, v, *more)


@under_explicit_axes(_like_queries)
def _split_attention(attend, q, k, v, lists, masks, batch_axes: Axes, head_axes: Axes) -> jax.Array:
  if batch_axes is None and head_axes is None:
    return attend(q, k, v, **lists, **masks)
  mesh = jax.sharding.get_abstract_mesh()
  for name, axes, size in (("batch_axes", batch_axes, q.shape[0]), ("head_axes", head_axes, q.shape[2])):
    _check_axes(name, axes, size, mesh)
  tokens = PartitionSpec(batch_axes, None, head_axes, None)
  given = {name: array for name, array in {**lists, **masks}.items() if array is not None}
  specs = dict.fromkeys(given, PartitionSpec(batch_axes))
  own = {name for name in given if name in lists and given[name].shape[1] > 1}
  specs |= dict.fromkeys(own, PartitionSpec(batch_axes, head_axes))
  # Replication is not tracked: kernels do not declare it.
  split = jax.shard_map(
    lambda q, k, v, given: attend(q, k, v, **{**dict.fromkeys((*lists, *masks)), **given}),
    in_specs=(tokens, tokens, tokens, specs),
    out_specs=tokens,
    check_vma=False,
  )
  return split(q, k, v, given)


def _check_axes(name: str, axes: Axes, size: int, mesh: jax.sharding.AbstractMesh) -> None:
  for axis in _names(axes):
    if axis not in mesh.axis_names:
      have = ", ".join(map(repr, mesh.axis_names)) or "none: call jax.set_mesh first"
      raise ValueError(f"{name}: expected axes of the current mesh ({have}), got {axis!r}")
    if size % mesh.shape[axis]:
      raise ValueError(f"{name}: axis {axis!r} of {mesh.shape[axis]} devices does not divide the {size} it splits")
    size //= mesh.shape[axis]
