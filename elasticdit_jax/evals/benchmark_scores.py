"""Scores of a benchmark's pictures by preference models, computed here: WORKDIR/results/<route>/<kind>.json."""

import collections
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from PIL import Image

from elasticdit_jax.evals import layouts, preference

_AT_A_TIME = 64  # pictures read from disk


def score(workdir: str, routes: Sequence[str], cells: Sequence[layouts.Cell], models: Mapping[str, str]) -> None:
  """Scores what is on disk, file by file, so that JPEG counts as it does for the original.

  A result that is there is kept; pictures that other hosts have yet to draw put the scores off to the next start.

  Args:
    workdir: of the benchmark.
    routes: names.
    cells: its files.
    models: kind -> directory, see preference.directories.

  Raises:
    ValueError: a model cannot be read.
  """
  paths = {
    (kind, route): os.path.join(workdir, "results", route, f"{kind}.json") for kind in models for route in routes
  }
  for kind, directory in models.items():
    todo = [route for route in routes if not os.path.exists(paths[kind, route])]
    if not todo:
      continue
    model = preference.load(kind, directory)
    for route in todo:
      root = os.path.join(workdir, route)
      missing = sum(not os.path.exists(os.path.join(root, cell.file)) for cell in cells)
      if missing:
        logging.warning("%s: %d files of other hosts are missing; give the same command again to score", route, missing)
        continue
      result = {"kind": kind, "model": os.path.abspath(directory)} | _means(model, root, cells)
      with open(f"{paths[kind, route]}.partial", "w") as f:
        json.dump(result, f, indent=1)
      os.replace(f"{paths[kind, route]}.partial", paths[kind, route])
      logging.info("%s: %s %.4f (%d pictures)", route, kind, result["mean"], result["pictures"])


def _means(model: preference.Preference, root: str, cells: Sequence[layouts.Cell]) -> dict:
  """Mean over all pictures, and over those of each folder."""
  folders = collections.defaultdict(list)
  step = max(1, _AT_A_TIME // len(cells[0].numbers))
  for start in range(0, len(cells), step):
    part = cells[start : start + step]
    images = [_read(os.path.join(root, cell.file), len(cell.numbers)) for cell in part]
    prompts = [cell.prompt for cell in part for _ in cell.numbers]
    (values,) = model(np.concatenate(images), prompts).values()
    places = [os.path.basename(os.path.dirname(cell.file)) for cell in part for _ in cell.numbers]
    for place, value in zip(places, values, strict=True):
      folders[place].append(float(value))
  every = [value for values in folders.values() for value in values]
  means = {place: float(np.mean(values)) for place, values in folders.items()}
  return {"mean": float(np.mean(every)), "pictures": len(every), "folders": means}


def _read(path: str, count: int) -> np.ndarray:
  """Pictures of one file, uint8 [count, H, W, 3]; four are a 2 x 2 grid."""
  with Image.open(path) as image:
    picture = np.asarray(image.convert("RGB"))
  if count == 1:
    return picture[None]
  height, width = picture.shape[0] // 2, picture.shape[1] // 2
  return picture.reshape(2, height, 2, width, 3).swapaxes(1, 2).reshape(4, height, width, 3)
