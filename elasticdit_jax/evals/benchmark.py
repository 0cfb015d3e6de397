"""Task `evaluate` with a benchmark: draws its prompts along every route into the folders that its evaluator reads.

    WORKDIR/<route>/...             pictures, and nothing the evaluator would trip over; see evals.layouts
    WORKDIR/results/<route>/        where the evaluator's own results belong; the command is printed at the end
    WORKDIR/benchmark.json          what was drawn, and with which weights
    WORKDIR/tables.md               the results in the paper's layout, once they are there and the command runs again

A picture is a function of (weights, route, prompt, its number, seed) and of the size of the batch, in which rounding
differs. Batches are cut from the list of files before anything else, so that neither an interruption nor the number of
hosts changes a picture. A file is there once it is whole: the same command again draws what is missing. Several hosts
draw a share each, into one workdir, and process 0 waits for the last of them.
"""

import dataclasses
import hashlib
import io
import json
import os
import queue
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from elasticdit_jax import distributed, generate
from elasticdit_jax.evals import benchmark_scores, benchmark_tables, layouts, preference

_JPEG_QUALITY = 75  # of Pillow where nobody names one, as in the evaluators' own examples
_LOG_EVERY = 30.0  # seconds
_WAIT = 7 * 86400  # seconds for the slowest host; one that dies is noticed within minutes
_SAMPLING = ("steps", "guidance", "seed", "solver")


def run(config: Any, workdir: str) -> None:
  """Draws one benchmark and, where its evaluator's results are there, writes tables.

  Args:
    config: fields benchmark (one of layouts.BENCHMARKS), prompts (their path, or "scenes"), count (pictures per prompt;
      0 = as many as its authors ask for), checkpoint, routes, steps, guidance, seed, solver, size (0 = the model's),
      batch_size and models (preference models that score the pictures here, see preference.directories).
    workdir: is created.

  Raises:
    ValueError: in one line; nothing has been drawn then.
    OSError: hosts do not share the disk of the workdir.
  """
  name = config.benchmark
  if name not in layouts.BENCHMARKS:
    raise ValueError(f"config.benchmark: unknown benchmark {name!r}; there are {', '.join(layouts.BENCHMARKS)}")
  benchmark = layouts.BENCHMARKS[name]
  found = layouts.rows(name, config.prompts)
  count = config.count or benchmark.count
  cells = layouts.cells(name, found, count)
  batches = _batches(cells, config.batch_size)
  models = preference.directories(config.models, "config.models")
  pipeline = generate.Pipeline.load(config.checkpoint or None, config.batch_size)
  names = generate.parse_routes(config.routes, pipeline)
  size = config.size or pipeline.model.size
  settings = {key: config[key] for key in _SAMPLING} | {"size": size}
  _encode(pipeline, found)
  for route in names:
    pipeline.arguments([""], route, **settings)
  described = {
    "benchmark": name,
    "prompts": _digest([row.prompt for row in found]),
    "pictures": len(found) * count,
    "settings": settings | {"count": count, "batch_size": config.batch_size},
    "weights": _digest([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(pipeline.model.params)]),
    "routes": {route: _describe(pipeline.select(route)) for route in names},
  }
  distributed.check_same("benchmark", described | {"--workdir": os.path.abspath(workdir)})
  _claim(workdir, described)
  for route in names:
    _draw(pipeline, route, settings, batches, os.path.join(workdir, route))
  distributed.barrier("pictures", _WAIT)

  def conclude() -> None:
    for route in names:
      _explain(workdir, route, name, size, count)
    benchmark_scores.score(workdir, names, cells, models)
    benchmark_tables.write(workdir, [workdir])

  distributed.on_first("tables", conclude, _WAIT)


def _batches(cells: Sequence[layouts.Cell], batch_size: int) -> list[list[layouts.Cell]]:
  """Files whose pictures are computed together."""
  most = batch_size // max(len(cell.numbers) for cell in cells)
  if most < 1:
    raise ValueError(
      f"config.batch_size: expected at least {max(len(cell.numbers) for cell in cells)}, the pictures of one file, got"
      f" {batch_size}"
    )
  return [list(cells[start : start + most]) for start in range(0, len(cells), most)]


def _encode(pipeline: generate.Pipeline, found: Sequence[layouts.Row]) -> None:
  """Raises ValueError for the first prompt that the model cannot read, naming its line."""
  for row in found:
    try:
      pipeline.model.encoder.encode([row.prompt])
    except ValueError as e:
      raise ValueError(f"config.prompts: {row.where}: {e}") from e


def _digest(parts: Sequence[str | bytes]) -> str:
  digest = hashlib.blake2b(digest_size=16)
  for part in parts:
    data = part.encode() if isinstance(part, str) else part
    digest.update(len(data).to_bytes(8, "little") + data)
  return digest.hexdigest()


def _describe(route: Any) -> dict[str, Any]:
  active = [route.sparsity[i] for i in route.active]
  return {"vae": route.vae, "blocks": len(active), "sparsity": sum(active) / len(active)}


def _claim(workdir: str, described: Mapping[str, Any]) -> None:
  """Writes benchmark.json; refuses a workdir whose pictures were drawn otherwise."""
  path = os.path.join(workdir, "benchmark.json")
  routes = dict(described["routes"])
  if os.path.exists(path):
    with open(path) as f:
      old = json.load(f)
    fields = [key for key in described if key != "routes" and old.get(key) != described[key]]
    fields += [f"routes.{key}" for key in routes if old["routes"].get(key, routes[key]) != routes[key]]
    if fields:
      raise ValueError(
        f"workdir: {workdir} holds pictures drawn otherwise ({', '.join(fields)} in benchmark.json differ); choose"
        " another --workdir"
      )
    routes = old["routes"] | routes
  elif os.path.isdir(workdir) and os.path.exists(os.path.join(workdir, "config.json")):
    raise ValueError(f"workdir: {workdir} holds a training run; choose another --workdir")
  text = json.dumps(dict(described) | {"routes": routes}, indent=1) + "\n"
  distributed.barrier("benchmark.json is read")
  distributed.on_first("benchmark.json", lambda: _place(workdir, path, text.encode()))
  if not os.path.exists(path):
    raise OSError(f"{path} of process 0 is not there; give a --workdir on a disk that all hosts share")


def _draw(
  pipeline: generate.Pipeline,
  route: str,
  settings: Mapping[str, Any],
  batches: Sequence[Sequence[layouts.Cell]],
  root: str,
) -> None:
  """Draws the batches of this host that miss a file, as many at a time as it has devices."""
  mine = batches[jax.process_index() :: jax.process_count()]
  missing = [batch for batch in mine if not all(os.path.exists(os.path.join(root, cell.file)) for cell in batch)]
  logging.info("%s: %d of %d batches to draw", route, len(missing), len(mine))
  free: queue.SimpleQueue[generate.Pipeline] = queue.SimpleQueue()
  copies = _on_each_device(pipeline)
  for copy in copies:
    free.put(copy)

  def draw(batch: Sequence[layouts.Cell]) -> None:
    copy = free.get()
    try:
      for cell, pictures in zip(batch, _pictures(copy, route, settings, batch), strict=True):
        _write(root, cell, pictures)
    finally:
      free.put(copy)

  begin = said = time.monotonic()
  with futures.ThreadPoolExecutor(len(copies)) as pool:
    try:
      for done, _ in enumerate(pool.map(draw, missing), start=1):
        now = time.monotonic()
        if now - said > _LOG_EVERY:
          said = now
          left = (now - begin) / done * (len(missing) - done)
          logging.info("%s: %d of %d batches, %.0f min left", route, done, len(missing), left / 60)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _on_each_device(pipeline: generate.Pipeline) -> list[generate.Pipeline]:
  """The pipeline, with a copy of the weights on each device of this host where there are several."""
  devices = jax.local_devices()
  if len(devices) == 1:
    return [pipeline]
  placed = [dataclasses.replace(pipeline.model, params=jax.device_put(pipeline.model.params, d)) for d in devices]
  return [dataclasses.replace(pipeline, model=model) for model in placed]


def _pictures(
  pipeline: generate.Pipeline, route: str, settings: Mapping[str, Any], batch: Sequence[layouts.Cell]
) -> Iterator[np.ndarray]:
  """uint8 [pictures of the cell, H, W, 3] of each cell; one program whatever the number of cells."""
  prompts = [cell.prompt for cell in batch for _ in cell.numbers]
  numbers = [layouts.noise_number(cell.prompt, number) for cell in batch for number in cell.numbers]
  spare = pipeline.batch_size - len(prompts)
  args, static = pipeline.arguments(prompts + [""] * spare, route, first=numbers + [0] * spare, **settings)
  images, start = np.asarray(generate.sample_images(*args, **static)), 0
  for cell in batch:
    yield images[start : start + len(cell.numbers)]
    start += len(cell.numbers)


def _write(root: str, cell: layouts.Cell, pictures: np.ndarray) -> None:
  """The files beside a cell's first, then the cell's own, each of them whole or absent."""
  workdir = os.path.dirname(root)
  for name, text in cell.beside.items():
    if not os.path.exists(os.path.join(root, name)):
      _place(workdir, os.path.join(root, name), text.encode())
  file = io.BytesIO()
  kind = {"quality": _JPEG_QUALITY, "format": "JPEG"} if cell.file.endswith(".jpg") else {"format": "PNG"}
  Image.fromarray(_join(pictures)).save(file, **kind)
  _place(workdir, os.path.join(root, cell.file), file.getvalue())


def _join(pictures: np.ndarray) -> np.ndarray:
  """Pictures of one file, uint8 [1 or 4, H, W, 3], as one: four become a 2 x 2 grid."""
  if len(pictures) == 1:
    return pictures[0]
  return np.concatenate([np.concatenate(list(pair), axis=1) for pair in (pictures[:2], pictures[2:])])


def _place(workdir: str, path: str, data: bytes) -> None:
  """Writes elsewhere and renames: evaluators list their folders, and would read a rest of an interrupted run."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  partial = os.path.join(workdir, f".partial-{jax.process_index()}-{threading.get_ident()}")
  with open(partial, "wb") as f:
    f.write(data)
  os.replace(partial, path)


def _explain(workdir: str, route: str, name: str, size: int, count: int) -> None:
  results = os.path.join(workdir, "results", route)
  os.makedirs(results, exist_ok=True)
  fields = {"results": shlex.quote(results), "size": size, "count": count}
  for root in layouts.roots(name, os.path.join(workdir, route), count):
    command = layouts.BENCHMARKS[name].command.format(root=shlex.quote(root), **fields)
    logging.info("%s: evaluate with: %s", route, command)
