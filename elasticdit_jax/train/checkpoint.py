"""Checkpoints: what a run needs to go on bit-exactly, and the checks that keep a wrong or damaged one out.

Where the weights of a run come from, first match wins:
  1. the newest good checkpoint in its own workdir (`Checkpointer.restore_latest`);
  2. weight files named by the config;
  3. random initialisation.

  workdir/checkpoints/<step>/state  every array of the state (Orbax; readable without this package)
                     /_CHECKPOINT_METADATA   JSON: data step, phase, routes, one fingerprint per array

Orbax commits a step by renaming its directory, so a killed save never looks like a checkpoint. It does not notice
flipped bits in array files; the fingerprints do.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from orbax.checkpoint import v1 as ocp

from elasticdit_jax import distributed
from elasticdit_jax.interop import weights
from elasticdit_jax.train.fingerprint import fingerprints_of
from elasticdit_jax.train.workdir import lock

State = Any
_SPACE_MARGIN = 1.2


class Checkpointer:
  """The checkpoints of one workdir; use it as a context manager.

  Args:
    workdir: checkpoints go to its subdirectory `checkpoints`.
    keep: how many of the newest steps to keep.
    keep_steps: steps kept for good, such as the ends of phases.

  Raises:
    ValueError: where another process writes to these checkpoints.
  """

  def __init__(self, workdir: str | os.PathLike, *, keep: int = 3, keep_steps: Collection[int] = ()):
    self._directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
    os.makedirs(self._directory, exist_ok=True)
    self._lock: int | None = None
    distributed.on_first("checkpoints", lambda: self._take_lock(os.fspath(workdir)))
    self._damaged: set[int] = set()
    self._pending: ocp.AsyncResponse | None = None
    self._manager = ocp.training.Checkpointer(
      self._directory,
      preservation_policy=_Preserve(keep, frozenset(keep_steps), self._damaged),
      cleanup_tmp_directories=True,
    )

  def _take_lock(self, workdir: str) -> None:
    self._lock = lock(self._directory, workdir)

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused_exception: Any) -> None:
    if kind in (None, SystemExit) or not distributed.several():
      self.close()
    # Else the other processes do not know yet: whoever waits for them here, waits for long.

  @property
  def steps(self) -> list[int]:
    """Steps on disk, ascending, without those found damaged."""
    return [c.step for c in self._manager.checkpoints if c.step not in self._damaged]

  @property
  def latest(self) -> int | None:
    """The newest step on disk that is not known to be damaged."""
    return max(self.steps, default=None)

  def check_space(self, state: State) -> None:
    """Raises OSError where the disk has no room for a checkpoint of this state (arrays or shapes)."""
    check_space(self._directory, state, self._last())

  def save(self, step: int, state: State, meta: Mapping[str, Any]) -> None:
    """Starts saving; returns once the arrays may change. A step already on disk is left as it is.

    Args:
      step: completed updates.
      state: any tree of arrays: params, optimiser state, EMA, step, `jax.random.key`s.
      meta: JSON values to get back from `restore_latest`: data step, phase, routes.

    Raises:
      FloatingPointError: where the state holds NaN or infinity; nothing is written.
      OSError: where the disk has no room, or the save before this one failed in the background.
    """
    self.wait()
    if step in self._agreed_steps():
      return
    distributed.on_first("checkpoint", lambda: self.check_space(state))
    flat = _flatten(state)
    fingerprints = fingerprints_of(flat)
    broken = [name for name, (_, finite) in fingerprints.items() if not finite]
    if broken:
      raise FloatingPointError(
        f"checkpoint: {broken[0]} and {len(broken) - 1} other arrays hold NaN or infinity at step {step}; not saved"
        f" (last checkpoint: {self._last()})"
      )
    self._pending = self._manager.save_checkpointables_async(
      step,
      {"state": weights.unflatten(flat)},
      force=True,
      overwrite=step in self._damaged,  # the run came past a damaged step again: this one replaces it
      custom_metadata={"meta": dict(meta), "fingerprint": {name: value for name, (value, _) in fingerprints.items()}},
    )
    self._damaged.discard(step)

  def wait(self) -> None:
    """Blocks until the last save is on disk; raises OSError where it failed."""
    pending, self._pending = self._pending, None
    if pending is None:
      return
    error = ""
    try:
      pending.result()
    except Exception as e:
      error = _one_line(e)
    error = next(filter(None, distributed.exchange("saving", error)), "")  # of any process
    if error:
      raise OSError(f"checkpoint: saving failed ({error}); last checkpoint: {self._last()}")

  def close(self) -> None:
    """Waits for the last save and releases the directory."""
    try:
      self.wait()
    finally:
      self._manager.close()
      if self._lock is not None:
        os.close(self._lock)

  def restore_latest(self, template: State) -> tuple[State, dict[str, Any]] | None:
    """The newest checkpoint whose arrays are all as they were saved.

    Damaged steps are reported, passed over and left on disk.

    Args:
      template: the state as arrays or `jax.ShapeDtypeStruct`s; its shardings say where the arrays go.

    Returns:
      (state, meta), or None where there is no checkpoint at all.

    Raises:
      ValueError: for a checkpoint of another model, or where every checkpoint is damaged.
    """
    try:
      self.wait()
    except OSError as e:
      logging.error("%s", e)
    for step in reversed(self._agreed_steps()):
      broken = ""
      try:
        flat, meta = self._restore(step, _flatten(template))
      except _AnotherModelError as e:
        raise ValueError(str(e)) from None
      except Exception as e:  # Orbax raises many kinds for damaged files
        broken = _one_line(e)
      broken = next(filter(None, distributed.exchange("restoring", broken)), "")  # of any process
      if broken:
        logging.warning("checkpoint: step %d in %s is damaged (%s)", step, self._directory, broken)
        self._damaged.add(step)
        continue
      logging.info("checkpoint: restored step %d from %s", step, self._directory)
      return _unflatten(template, flat), meta
    if self._damaged:
      raise ValueError(
        f"checkpoint: none of the steps {sorted(self._damaged)} in {self._directory} is readable; restore them from a"
        " copy, or remove the directory to start again"
      )
    return None

  def _restore(self, step: int, want: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    stored = self._manager.checkpointables_metadata(step)
    _check_same_model(step, self._directory, want, stored.metadata.get("state"))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here) for k, x in want.items()}
    loaded = self._manager.load_checkpointables(step, {"state": weights.unflatten(targets)})["state"]
    flat = weights.flatten(loaded)
    expected = stored.custom_metadata["fingerprint"]
    changed = [name for name, (value, _) in fingerprints_of(flat).items() if value != expected[name]]
    if changed:
      raise ValueError(f"{changed[0]} and {len(changed) - 1} other arrays are not what was saved")
    return flat, stored.custom_metadata["meta"]

  def _agreed_steps(self) -> list[int]:
    """`steps` as process 0 sees them: the others may read the directory a moment before it is renamed."""
    return json.loads(distributed.exchange("steps on disk", json.dumps(self.steps))[0])

  def _last(self) -> str:
    return "none" if self.latest is None else f"step {self.latest}"


def check_space(directory: str | os.PathLike, state: State, last: str = "") -> None:
  """Whether a checkpoint fits; creates nothing.

  Args:
    directory: where it would go; may be missing.
    state: arrays or shapes.
    last: the last checkpoint, for the message; "" where that is not known yet.

  Raises:
    OSError: where the disk of `directory` has no room.
  """
  there = os.path.abspath(directory)
  while not os.path.exists(there):
    there = os.path.dirname(there)
  size = sum(x.size * x.dtype.itemsize for x in _flatten(state).values())
  free = shutil.disk_usage(there).free
  if free < _SPACE_MARGIN * size:
    raise OSError(
      f"checkpoint: a step needs about {_SPACE_MARGIN * size / 1e6:.0f} MB in {os.fspath(directory)}, where"
      f" {free / 1e6:.0f} MB are free; make room or choose another --workdir"
      + (f" (last checkpoint: {last})" if last else "")
    )


class _Preserve:
  """Keeps the newest good steps, the chosen ones, and damaged ones (theirs is evidence; a person may remove it)."""

  def __init__(self, newest: int, chosen: frozenset[int], damaged: set[int]):
    self._newest, self._chosen, self._damaged = newest, chosen, damaged

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = [c.step for c in checkpoints]
    newest = set(sorted(set(steps) - self._damaged)[-self._newest :])
    return [step in newest or step in self._chosen or step in self._damaged for step in steps]


class _AnotherModelError(Exception):
  """A readable checkpoint whose arrays are not the template's."""


def _check_same_model(step: int, directory: str, want: Mapping[str, Any], stored: Any) -> None:
  if not stored:
    raise ValueError("its metadata is missing")
  have = {name: (tuple(x.shape), jnp.dtype(x.dtype).name) for name, x in weights.flatten(stored).items()}
  need = {name: (tuple(x.shape), x.dtype.name) for name, x in want.items()}
  differences = [
    f"{name}: {have.get(name, 'absent')} -> {need.get(name, 'absent')}"
    for name in sorted(have.keys() | need.keys())
    if have.get(name) != need.get(name)
  ]
  if differences:
    raise _AnotherModelError(
      f"checkpoint: step {step} in {directory} is of another model or optimiser; {len(differences)} arrays differ"
      f" (stored -> now): {'; '.join(differences[:3])}; choose another --workdir, or the old configuration"
    )


def _flatten(state: State) -> dict[str, jax.Array]:
  """The leaves by path; PRNG keys as their raw data."""
  flat = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    if not hasattr(leaf, "sharding"):
      leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else _key_data_shape(leaf)
    flat[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
  return flat


def _key_data_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  data = jax.eval_shape(jax.random.key_data, leaf)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _unflatten(template: State, flat: Mapping[str, jax.Array]) -> State:
  def leaf(path: tuple[Any, ...], like: Any) -> jax.Array:
    array = flat[jax.tree_util.keystr(path, simple=True, separator="/")]
    if jnp.issubdtype(getattr(like, "dtype", None), jax.dtypes.prng_key):
      return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    return array

  return jax.tree_util.tree_map_with_path(leaf, template)


def _one_line(e: BaseException) -> str:
  text = str(e).strip().splitlines()
  return f"{type(e).__name__}: {text[0][:160]}" if text else type(e).__name__
