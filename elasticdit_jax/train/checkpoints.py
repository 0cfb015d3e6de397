"""Looks into the checkpoints of a run, checks them, and takes weights out and in; also while the run goes on.

    python -m elasticdit_jax.train.checkpoints list RUN            steps, phases, sizes; the routes of the newest
    python -m elasticdit_jax.train.checkpoints verify RUN          reads every array; exit code 1 where one changed
    python -m elasticdit_jax.train.checkpoints export RUN DIR      EMA weights: DIR/dit.safetensors, DIR/routes.json
    python -m elasticdit_jax.train.checkpoints import DIR RUN NEW  a copy of RUN's step that goes on from DIR's weights

RUN is the workdir of a run and is only read. export and import take the newest step, or --step=N, and only a step whose
arrays are all as they were saved. A new run starts from an exported DIR with --config.init=DIR; import keeps step,
optimiser state, data position and configuration as well: train NEW on with the command of RUN and --workdir=NEW. Both
are for uwco and pretrain: an alignment keeps its best weights as a whole model, RUN/best.
"""

import dataclasses
import datetime
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from orbax.checkpoint import v1 as ocp

from elasticdit_jax import elastic
from elasticdit_jax.elastic import Route
from elasticdit_jax.interop import weights
from elasticdit_jax.train.checkpoint import Checkpointer, fingerprints_of

FLAGS = flags.FLAGS
flags.DEFINE_integer("step", None, "The step to take; default: the newest.", lower_bound=0)

_WEIGHTS = "dit.safetensors"


@dataclasses.dataclass(frozen=True)
class Stored:
  """One step on disk.

  Attributes:
    step, path: its number and directory.
    saved: when it was committed.
    size: bytes on disk.
    shapes: path of every array, such as "ema/block_00/...", -> its shape and dtype.
    meta: JSON values of the run: data step, phase, routes.
    fingerprints: path of every array -> the fingerprint it had when it was saved.
  """

  step: int
  path: str
  saved: datetime.datetime
  size: int
  shapes: Mapping[str, jax.ShapeDtypeStruct]
  meta: Mapping[str, Any]
  fingerprints: Mapping[str, int]

  @property
  def routes(self) -> dict[str, Route]:
    """The route table stored with the step; empty for a run without routes, such as that of a VAE."""
    return elastic.routes_from_json(self.meta["routes"]) if self.meta.get("routes") else {}


def steps_of(workdir: str | os.PathLike) -> list[int]:
  """The committed steps of a run, ascending.

  Raises:
    ValueError: where there is none.
  """
  directory = os.path.join(workdir, "checkpoints")
  # A step that is still being written has a longer name.
  steps = sorted(int(name) for name in _entries(directory) if name.isdecimal())
  if not steps:
    raise ValueError(f"checkpoints: no step in {directory}; expected the workdir of a training run")
  return steps


def describe(workdir: str | os.PathLike, step: int | None = None) -> Stored:
  """What a step (the newest where None) says about itself; reads no array.

  Raises:
    ValueError: where the run has no such step, or its description is damaged.
  """
  steps = steps_of(workdir)
  step = steps[-1] if step is None else step
  if step not in steps:
    raise ValueError(f"step: expected one of {', '.join(map(str, steps))} in {os.fspath(workdir)}, got {step}")
  path = os.path.abspath(os.path.join(workdir, "checkpoints", str(step)))
  try:
    stored = ocp.checkpointables_metadata(path)
    leaves = weights.flatten(stored.metadata["state"])
    saved = datetime.datetime.fromtimestamp(stored.commit_timestamp_nsecs / 1e9, datetime.UTC)
    return Stored(
      step,
      path,
      saved,
      sum(os.path.getsize(os.path.join(where, name)) for where, _, names in os.walk(path) for name in names),
      {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()},
      stored.custom_metadata["meta"],
      stored.custom_metadata["fingerprint"],
    )
  except Exception as e:  # Orbax raises many kinds for damaged files
    raise ValueError(f"checkpoints: step {step} in {os.fspath(workdir)} is damaged ({_one_line(e)})") from e


def damaged_arrays(stored: Stored) -> list[str]:
  """Paths of the arrays that cannot be read or are not what was saved; reads one part of the state at a time."""
  bad = []
  for part in sorted({name.split("/")[0] for name in stored.shapes}):
    try:
      _read(stored, part)
    except ValueError as e:
      bad += e.args[1] if len(e.args) > 1 else [part]
  return bad


def export_weights(workdir: str | os.PathLike, out: str | os.PathLike, step: int | None = None) -> Stored:
  """Writes the EMA weights and the route table of a step to OUT/dit.safetensors and OUT/routes.json.

  Raises:
    ValueError: where the step is damaged or holds no backbone, or `out` is not empty; nothing is written then.
  """
  stored = describe(workdir, step)
  _check_run(stored, workdir)
  _check_new(out)
  ema = weights.unflatten(_read(stored, "ema"))["ema"]
  os.makedirs(out, exist_ok=True)
  origin = {"run": os.path.abspath(workdir), "step": str(stored.step), "weights": "ema"}
  weights.save_tree(os.path.join(out, _WEIGHTS), ema, metadata=origin)
  elastic.save_routes(os.path.join(out, "routes.json"), stored.routes)
  return stored


def import_weights(
  source: str | os.PathLike, workdir: str | os.PathLike, out: str | os.PathLike, step: int | None = None
) -> Stored:
  """Writes a workdir OUT with the step of a run, whose parameters, EMA and routes are those of SOURCE.

  Raises:
    ValueError: where the weights or routes do not fit the run, the step is damaged, or `out` is not empty; nothing is
      written then.
  """
  stored = describe(workdir, step)
  routes = elastic.load_routes(os.path.join(source, "routes.json"))
  file = os.path.join(source, _WEIGHTS)
  given = weights.load_tree(file)
  shapes = weights.unflatten(stored.shapes)
  _check_run(stored, workdir)
  weights.check_tree(shapes["ema"], given, file)
  depths = [next(iter(table.values())).depth for table in (routes, stored.routes)]
  if depths[0] != depths[1]:
    raise ValueError(f"routes: {os.fspath(source)}/routes.json is for {depths[0]} blocks, the run has {depths[1]}")
  _check_new(out)
  flat = {name: x for part in shapes for name, x in _read(stored, part).items()}
  for part in ("params", "ema"):
    for name, x in weights.flatten(given).items():
      flat[f"{part}/{name}"] = jnp.array(x, flat[f"{part}/{name}"].dtype)
  os.makedirs(out, exist_ok=True)
  shutil.copyfile(os.path.join(workdir, "config.json"), os.path.join(out, "config.json"))
  elastic.save_routes(os.path.join(out, "routes.json"), routes)
  with Checkpointer(out) as checkpoint:
    checkpoint.save(stored.step, weights.unflatten(flat), {**stored.meta, "routes": elastic.routes_to_json(routes)})
  return describe(out, stored.step)


def _read(stored: Stored, part: str) -> dict[str, jax.Array]:
  """The arrays "part/..." on the first device; ValueError(message, names) where some are not what was saved."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    for name, x in stored.shapes.items()
    if name.split("/")[0] == part
  }
  try:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      loaded = ocp.load_checkpointables(stored.path, {"state": weights.unflatten(wanted)})["state"]
  except Exception as e:  # Orbax raises many kinds for damaged files
    raise ValueError(f"checkpoints: {part} of step {stored.step} cannot be read ({_one_line(e)})") from e
  flat = weights.flatten(loaded)
  changed = [name for name, (value, _) in fingerprints_of(flat).items() if value != stored.fingerprints.get(name)]
  if changed:
    raise ValueError(f"checkpoints: step {stored.step} is damaged: {changed[0]} is not what was saved", changed)
  return flat


def _check_run(stored: Stored, workdir: str | os.PathLike) -> None:
  """Raises ValueError where a step is not of a run that trains a backbone on pictures."""
  run = os.fspath(workdir)
  if "rewards" in stored.meta:
    raise ValueError(
      f"checkpoints: {run} aligns a model; its best weights so far are a whole model already: give {run}/best, or"
      f" {run}/model once it has ended, to --config.init, or copy it"
    )
  if not stored.routes or not any(name.startswith("ema/") for name in stored.shapes):
    raise ValueError(f"checkpoints: the run in {run} has no routes; expected one of uwco or pretrain")


def _check_new(directory: str | os.PathLike) -> None:
  if os.path.lexists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
    raise ValueError(f"checkpoints: {os.fspath(directory)} exists and is not empty; give another path")


def _entries(directory: str) -> list[str]:
  return os.listdir(directory) if os.path.isdir(directory) else []


def _one_line(e: BaseException) -> str:
  text = str(e.args[0] if e.args else e).strip().splitlines()
  return text[0][:160] if text else type(e).__name__


def _list(run: str) -> None:
  newest = None
  _say(f"{'step':>10} {'saved (UTC)':19} {'phase':12} {'MB':>9} {'arrays':>6} {'parameters':>12}")
  for step in steps_of(run):
    try:
      stored = newest = describe(run, step)
    except ValueError as e:
      _say(f"{step:>10} {e}")
      continue
    parameters = sum(x.size for name, x in stored.shapes.items() if name.startswith("params/"))
    _say(
      f"{step:>10} {stored.saved:%Y-%m-%d %H:%M:%S} {stored.meta.get('phase', '-'):12} {stored.size / 1e6:9.1f}"
      f" {len(stored.shapes):6} {parameters:12,}"
    )
  for name, route in (newest.routes if newest else {}).items():
    skipped = [i for i, kept in enumerate(route.keep) if not kept]
    sparse = [f"{i}:{route.sparsity[i]:.3g}" for i in route.active if route.sparsity[i]]
    _say(f"route {name}: f{route.vae}, skips {skipped or 'nothing'}, drops {' '.join(sparse) or 'no key blocks'}")


def _verify(run: str) -> None:
  damaged = 0
  for step in steps_of(run):
    try:
      stored = describe(run, step)
      bad = damaged_arrays(stored)
      verdict = f"DAMAGED: {', '.join(bad)}" if bad else f"good, {len(stored.shapes)} arrays as they were saved"
    except ValueError as e:
      bad, verdict = [run], f"DAMAGED: {e}"
    damaged += bool(bad)
    _say(f"{step:>10} {verdict}")
  if damaged:
    sys.exit(1)


def _export(run: str, out: str) -> None:
  stored = export_weights(run, out, FLAGS.step)
  _say(f"{out}: EMA weights of step {stored.step}; start from them with --config.init={out}")


def _import(source: str, run: str, out: str) -> None:
  stored = import_weights(source, run, out, FLAGS.step)
  with open(os.path.join(out, "config.json")) as f:
    task = json.load(f)["task"]
  _say(f"{out}: step {stored.step} of the {task} run; go on with the command of {run} and --workdir={out}")


def _say(line: str) -> None:
  sys.stdout.write(f"{line}\n")


_COMMANDS: dict[str, tuple[Callable[..., None], int]] = {
  "list": (_list, 1),
  "verify": (_verify, 1),
  "export": (_export, 2),
  "import": (_import, 3),
}


def _main(argv: Sequence[str]) -> None:
  name, paths = (argv[1] if len(argv) > 1 else ""), argv[2:]
  command, count = _COMMANDS.get(name, (None, 0))
  if command is None or len(paths) != count:
    raise app.UsageError("expected one of: list RUN, verify RUN, export RUN DIR, import DIR RUN NEW")
  try:
    command(*paths)
  except (ValueError, OSError) as e:
    sys.exit(f"error: {e.args[0] if isinstance(e, ValueError) else e}")


def _set_up_logging() -> None:
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.ERROR)  # Orbax tells much


if __name__ == "__main__":
  app.call_after_init(_set_up_logging)
  app.run(_main)
