"""Scores pictures of the embedded world against their captions, as GenEval does (arXiv 2310.11513, section 3).

A picture is right, `strict`, where every object that the caption names is there with its shape, colour
and size word. Counting wants exactly the named number of objects and no other object; position wants one
pair that stands in the relation. Objects nobody asked for do not fail the other tasks: they are reported
as `extra`.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from elasticdit_jax.data import scene_pixels, scene_prompts, scenes
from elasticdit_jax.evals import detector

# Between the largest "small" and the smallest "big" radius, in cells.
_MIDDLE = (scene_pixels.RADIUS["small"][1] + scene_pixels.RADIUS["big"][0]) / 2
_MARGIN = 0.75  # cells between two objects along the relation; rendered scenes have at least 1.87
_NOISE = 0.05  # standard deviation of the pixel noise that calibration must survive
_CALIBRATION_SEED = 20260


@dataclasses.dataclass(frozen=True)
class Score:
  """How well one picture shows its caption.

  Attributes:
    strict: everything the caption asks for is there.
    partial: share of what it asks for, in [0, 1]; 1 wherever `strict`.
    extra: number of objects beyond those it asks for, by shape; those of unknown shape count.
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


def _extra(found: Sequence[detector.Detection], wanted: Sequence[scene_prompts.Object]) -> int:
  """Objects left after each wanted one has got an object of its shape, of any colour and size."""
  left = collections.Counter(obj.shape for obj in found)
  left.subtract(want.shape for want in wanted)
  return sum(max(number, 0) for number in left.values())


def _counting(found: Sequence[detector.Detection], spec: scene_prompts.Spec, cell: float) -> tuple[bool, float]:
  wanted = len(spec.objects)
  right = sum(_fit(obj, spec.objects[0], cell) == 1 for obj in found)
  missed = abs(right - wanted) + len(found) - right
  return missed == 0, max(0.0, 1 - missed / wanted)


def _presence(found: Sequence[detector.Detection], spec: scene_prompts.Spec, cell: float) -> tuple[bool, float]:
  """Every other task: the objects, which differ in shape, and the relation as one more wish."""
  fits = [[_fit(obj, want, cell) for obj in found] for want in spec.objects]
  shares = [max(row, default=0.0) for row in fits]
  if spec.relation:
    pairs = itertools.product(range(len(found)), repeat=2)
    holds = [min(fits[0][i], fits[1][j]) for i, j in pairs if _relation(found[i], found[j], spec.relation, cell)]
    shares.append(max(holds, default=0.0))
  return min(shares) == 1, float(np.mean(shares))


def score(caption: str, detections: Sequence[detector.Detection], size: int) -> Score:
  """Scores one picture.

  Args:
    caption: a caption of the world.
    detections: what `detector.detect` found in the picture.
    size: side of the picture in pixels.

  Raises:
    ValueError: the caption is none of the world's.
  """
  spec = scene_prompts.parse(caption)
  judge = _counting if spec.task == "counting" else _presence
  strict, partial = judge(detections, spec, size / scene_pixels.GRID)
  return Score(bool(strict), partial, _extra(detections, spec.objects))


def evaluate(
  prompts: Sequence[scene_prompts.Prompt],
  images: np.ndarray,
  thresholds: detector.Thresholds = detector.DEFAULT,
) -> Table:
  """Scores one picture per prompt.

  Args:
    prompts: what was asked for.
    images: uint8 [len(prompts), S, S, 3].
    thresholds: of the detector.

  Raises:
    ValueError: the numbers of prompts and pictures differ, or there are none.
  """
  if not prompts or len(prompts) != len(images):
    raise ValueError(f"images: got {len(images)} for {len(prompts)} prompts, expected one picture per prompt")
  found = detector.detect(images, thresholds)
  scores = [score(prompt.caption, each, images.shape[1]) for prompt, each in zip(prompts, found, strict=True)]
  columns = {"strict": {}, "partial": {}, "extra": {}}
  for task in scene_prompts.TASKS:
    rows = [each for each, prompt in zip(scores, prompts, strict=True) if prompt.task == task]
    if rows:
      columns["strict"][task] = float(np.mean([row.strict for row in rows]))
      columns["partial"][task] = float(np.mean([row.partial for row in rows]))
      columns["extra"][task] = float(np.mean([row.extra > 0 for row in rows]))
  for column in columns.values():
    column["overall"] = float(np.mean(list(column.values())))
  return Table(**columns)


def strict_table(
  prompts: Sequence[scene_prompts.Prompt],
  images: np.ndarray,
  thresholds: detector.Thresholds = detector.DEFAULT,
) -> dict[str, float]:
  """Share of right pictures per task and, under "overall", the mean of the tasks; see `evaluate`."""
  return evaluate(prompts, images, thresholds).strict


def _strict_rate(captions: Sequence[str], found: list[list[detector.Detection]], iou: float, size: int) -> float:
  """Share of right pictures had the detector's overlap threshold been `iou`."""
  right = 0
  for caption, each in zip(captions, found, strict=True):
    kept = [obj if obj.iou >= iou else dataclasses.replace(obj, shape="") for obj in each]
    right += score(caption, kept, size).strict
  return right / len(captions)


def calibrate(
  round_trips: Sequence[tuple[Sequence[str], np.ndarray]],
  *,
  saturations: Sequence[float] = (0.2, 0.25, 0.3, 0.35),
  ious: Sequence[float] = (0.7, 0.75, 0.8, 0.85),
  blurs: Sequence[float] = (0.0, 0.75),
  truths: int = 400,
  floor: float = 0.995,
) -> detector.Thresholds:
  """The thresholds that read reconstructed ground truth best.

  Every (saturation, blur, iou) that keeps at least `floor` of noisy ground truth (sigma 0.05) competes on
  the mean strict score of the round trips; ties go to the larger overlap, then to less blur, then to the
  saturation nearest the default. Detection costs about 2 ms a picture of 128 px and grid point.

  Args:
    round_trips: for each autoencoder the captions and uint8 [N, S, S, 3] reconstructions of scenes.
    saturations: candidates of `Thresholds.saturation`.
    ious: candidates of `Thresholds.iou`.
    blurs: candidates of `Thresholds.blur`.
    truths: noisy ground-truth pictures to keep.
    floor: least share of them scored right.

  Raises:
    ValueError: there are no round trips, or no candidate keeps the ground truth.
  """
  if not round_trips:
    raise ValueError("round_trips: got none, expected (captions, images) of at least one autoencoder")
  size = round_trips[0][1].shape[1]
  truth = scenes.render(np.arange(truths), seed=_CALIBRATION_SEED, size=size, split="any")
  noise = 255 * _NOISE * np.random.default_rng(_CALIBRATION_SEED).standard_normal(truth.image.shape)
  noisy = np.clip(np.rint(truth.image + noise), 0, 255).astype(np.uint8)
  default, best = detector.DEFAULT, None
  for saturation, blur in itertools.product(saturations, blurs):
    candidate = dataclasses.replace(default, saturation=saturation, blur=blur, iou=0.0)
    kept = detector.detect(noisy, candidate)
    found = [detector.detect(images, candidate) for _, images in round_trips]
    for iou in ious:
      if _strict_rate(truth.caption, kept, iou, size) < floor:
        continue
      rates = [_strict_rate(trip[0], each, iou, size) for trip, each in zip(round_trips, found, strict=True)]
      rank = np.mean(rates), iou, -blur, -abs(saturation - default.saturation)
      if best is None or rank > best[0]:
        best = rank, dataclasses.replace(candidate, iou=iou)
  if best is None:
    raise ValueError(
      f"floor: no candidate keeps {floor} of noisy ground truth, lower the floor or widen the candidates"
    )
  return best[1]
