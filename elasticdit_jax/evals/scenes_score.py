"""Scores pictures of the embedded world against their captions, as GenEval does (arXiv 2310.11513, section 3).

A picture is right, `strict`, where every object that the caption names is there with its shape, colour
and size word. Counting wants exactly the named number of objects and no other object; position wants one
pair that stands in the relation. Objects nobody asked for do not fail the other tasks: they are reported
as `extra`.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from elasticdit_jax.data import scene_pixels, scene_prompts
from elasticdit_jax.evals import detector

# Between the largest "small" and the smallest "big" radius, in cells.
_MIDDLE = (scene_pixels.RADIUS["small"][1] + scene_pixels.RADIUS["big"][0]) / 2
_MARGIN = 0.75  # cells between two objects along the relation; rendered scenes have at least 1.87


@dataclasses.dataclass(frozen=True)
class Score:
  """How well one picture shows its caption.

  Attributes:
    strict: everything the caption asks for is there.
    partial: share of what it asks for, in [0, 1]; 1 wherever `strict`.
    extra: number of objects that it does not ask for, those of unknown shape included.
  """

  strict: bool
  partial: float
  extra: int


@dataclasses.dataclass(frozen=True)
class Table:
  """Means over prompts: per task under its name, and under "overall" the mean of the tasks.

  Attributes:
    strict: share of right pictures.
    partial: mean partial score.
    extra: share of pictures with objects that nobody asked for.
  """

  strict: dict[str, float]
  partial: dict[str, float]
  extra: dict[str, float]


def _fit(found: detector.Detection, wanted: scene_prompts.Object, cell: float) -> float:
  """Share of the wanted shape, colour and size that a detection has; 0 without the shape."""
  if found.shape != wanted.shape:
    return 0.0
  checks = [True]
  if wanted.color:
    checks.append(found.color == wanted.color)
  if wanted.size:
    checks.append((found.radius < _MIDDLE * cell) == (wanted.size == "small"))
  return sum(checks) / len(checks)


def _relation(first: detector.Detection, second: detector.Detection, relation: str, cell: float) -> bool:
  right, down = (second.cx - first.cx) / cell, (second.cy - first.cy) / cell
  main, side = {
    "left of": (right, down),
    "right of": (-right, down),
    "above": (down, right),
    "below": (-down, right),
  }[relation]
  return main >= _MARGIN and main > abs(side)


def _counting(found: list[detector.Detection], spec: scene_prompts.Spec, cell: float) -> Score:
  wanted = len(spec.objects)
  right = sum(_fit(obj, spec.objects[0], cell) == 1 for obj in found)
  strict = right == wanted == len(found)
  missed = abs(right - wanted) + len(found) - right
  return Score(strict, max(0.0, 1 - missed / wanted), max(right - wanted, 0) + len(found) - right)


def score(caption: str, detections: Sequence[detector.Detection], size: int) -> Score:
  """Scores one picture.

  Args:
    caption: a caption of the world.
    detections: what `detector.detect` found in the picture.
    size: side of the picture in pixels.

  Raises:
    ValueError: the caption is none of the world's.
  """
  spec, found, cell = scene_prompts.parse(caption), list(detections), size / scene_pixels.GRID
  if spec.task == "counting":
    return _counting(found, spec, cell)
  wanted = spec.objects
  fits = [[_fit(obj, want, cell) for obj in found] for want in wanted]
  shares = [
    max(row, default=0.0) for row in fits
  ]  # the objects of one caption differ in shape: no detection serves two
  strict = min(shares) == 1
  if spec.relation:
    pairs = itertools.product(range(len(found)), repeat=2)
    holds = [
      min(fits[0][i], fits[1][j]) for i, j in pairs if i != j and _relation(found[i], found[j], spec.relation, cell)
    ]
    strict = max(holds, default=0.0) == 1
    shares.append(max(holds, default=0.0))
  named = sum(any(row[i] == 1 for row in fits) for i in range(len(found)))
  extra = len(found) - min(named, sum(share == 1 for share in shares[: len(wanted)]))
  return Score(bool(strict), float(np.mean(shares)), extra)
