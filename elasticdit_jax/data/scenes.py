"""Captioned scenes of coloured shapes, rendered on demand: the training data that needs no download.

One to four circles, squares and triangles stand in the cells of a 4 x 4 grid, never side by side, on a
pale, grey or two-tone background of low saturation. A picture shows exactly what its caption names;
what the caption leaves open (place, size, shade, background) varies. Captions and the combinations held
out from training are in `scene_prompts`.
Measured on one core of a two-core machine: 3,200 pictures of 128 px a second.

Every row is a pure function of (seed, index, size, split): random numbers are hashes of (seed, index,
draw number), so a row never depends on the batch it is rendered in.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from elasticdit_jax.data import scene_pixels, scene_prompts
from elasticdit_jax.data.scene_pixels import BACKGROUNDS, COLOR_JITTER, GRID, PALETTE, RADII, RADIUS, STEPS
from elasticdit_jax.data.scene_prompts import (
  COLORS,
  MAX_OBJECTS,
  MAX_WORDS,
  RELATIONS,
  SHAPES,
  SIZES,
  TASKS,
  VOCABULARY,
  Prompt,
  eval_prompts,
)

__all__ = (
  "BACKGROUNDS",
  "COLORS",
  "MAX_WORDS",
  "SHAPES",
  "TASKS",
  "TASK_WEIGHTS",
  "VOCABULARY",
  "Prompt",
  "Scenes",
  "eval_prompts",
  "render",
)

TASK_WEIGHTS = (0.08, 0.08, 0.20, 0.06, 0.36, 0.22)  # relations and numbers take longest to learn
COLORED = 0.7
_OBJECT_DRAWS = 16  # number of the first draw that belongs to an object
_PER_OBJECT = 7
_CHUNK = 32  # images rendered at a time: their windows stay in the cache


@dataclasses.dataclass(frozen=True)
class Scenes:
  """Rendered scenes and what is in them. Objects beyond `count` have shape -1.

  Attributes:
    image: uint8 [N, S, S, 3].
    caption: N captions.
    task: int32 [N], index into TASKS.
    count: int32 [N], objects in each picture.
    shape: int32 [N, 4], index into SHAPES.
    color: int32 [N, 4], index into COLORS.
    size: float32 [N, 4], radius in pixels.
    cy: float32 [N, 4], vertical middle of the object in pixels, 0 at the upper edge of the picture.
    cx: float32 [N, 4], horizontal middle.
    background: int32 [N], index into BACKGROUNDS.
  """

  image: np.ndarray
  caption: list[str]
  task: np.ndarray
  count: np.ndarray
  shape: np.ndarray
  color: np.ndarray
  size: np.ndarray
  cy: np.ndarray
  cx: np.ndarray
  background: np.ndarray


def _mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64 (Steele et al. 2014): uint64 -> uint64, a bijection."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _uniform(seed: int, indices: np.ndarray, draws: int) -> np.ndarray:
  """float64 [N, draws] in [0, 1): draw d of row i depends on (seed, indices[i], d) only."""
  golden = 0x9E3779B97F4A7C15
  with np.errstate(over="ignore"):
    start = _mix(np.array([seed & (2**64 - 1)], np.uint64) + np.uint64(golden))
    key = _mix(_mix(indices.astype(np.uint64)) + start)
    steps = (np.arange(1, draws + 1, dtype=np.uint64)) * np.uint64(golden)
    bits = _mix(key[:, None] + steps)
  return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _pick(u: np.ndarray, count: np.ndarray | int) -> np.ndarray:
  """Uniform integers in [0, count) from uniform floats."""
  return (u * count).astype(np.int64)


@functools.cache
def _places() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """All valid placements: (cells int [P, 4], first row and number of rows of each kind).

  Kinds 0..3 hold 1 to 4 objects, no two of them 4-neighbours; kinds 4..7 hold two objects in each of
  RELATIONS, at least two cells apart along it and further than across it.
  """
  cells = np.arange(GRID * GRID)
  y, x = np.divmod(cells, GRID)
  apart = np.abs(y[:, None] - y) + np.abs(x[:, None] - x) >= 2
  tables = [cells[:, None]]
  for _ in range(MAX_OBJECTS - 1):
    last = tables[-1]
    fits = np.all(apart[last], axis=1)  # [P, 16]: the cells that no earlier object touches
    row, cell = np.nonzero(fits)
    tables.append(np.concatenate([last[row], cell[:, None]], axis=1))
  two = tables[1]
  dy, dx = y[two[:, 1]] - y[two[:, 0]], x[two[:, 1]] - x[two[:, 0]]
  for main, side in ((dx, dy), (-dx, dy), (dy, dx), (-dy, dx)):
    tables.append(two[(main >= 2) & (main > np.abs(side))])
  sizes = np.array([len(table) for table in tables])
  padded = [np.pad(table, ((0, 0), (0, MAX_OBJECTS - table.shape[1]))) for table in tables]
  return np.concatenate(padded), np.cumsum(sizes) - sizes, sizes


@dataclasses.dataclass(frozen=True)
class _Table:
  """The caption table as arrays; -1 stands for a free colour and for no object."""

  captions: np.ndarray  # object [R]
  count: np.ndarray  # [R]
  shape: np.ndarray  # [R, 4]
  color: np.ndarray  # [R, 4]
  size: np.ndarray  # [R], index into SIZES
  place: np.ndarray  # [R], kind of placement
  rows: np.ndarray  # rows of each bucket, one bucket after the other
  start: np.ndarray  # [6, 2], first entry of `rows` of (task, coloured)
  length: np.ndarray  # [6, 2]
  colors: np.ndarray  # [3, 6], colours that a free object of each shape may take
  color_count: np.ndarray  # [3]


def _padded(values: list[int]) -> list[int]:
  return values + [-1] * (MAX_OBJECTS - len(values))


@functools.cache
def _table(split: str) -> _Table:
  specs = scene_prompts.specs()
  buckets = [[[], []] for _ in TASKS]
  for row, spec in enumerate(specs):
    if split in ("any", spec.split):
      buckets[TASKS.index(spec.task)][bool(spec.objects[0].color)].append(row)
  for bucket in buckets:  # a task with one kind of caption serves both answers of the coin
    bucket[0], bucket[1] = bucket[0] or bucket[1], bucket[1] or bucket[0]
  length = np.array([[len(rows) for rows in bucket] for bucket in buckets])
  allowed = scene_prompts.color_shape_allowed(split)
  count = np.array([len(spec.objects) for spec in specs])
  relation = np.array([RELATIONS.index(spec.relation) if spec.relation else -1 for spec in specs])
  names = ("", *COLORS)
  return _Table(
    captions=np.array([spec.caption for spec in specs], object),
    count=count,
    shape=np.array([_padded([SHAPES.index(o.shape) for o in spec.objects]) for spec in specs]),
    color=np.array([_padded([names.index(o.color) - 1 for o in spec.objects]) for spec in specs]),
    size=np.array([SIZES.index(spec.objects[0].size) for spec in specs]),
    place=np.where(relation >= 0, MAX_OBJECTS + relation, count - 1),
    rows=np.concatenate([rows for bucket in buckets for rows in bucket]),
    start=(np.cumsum(length.ravel()) - length.ravel()).reshape(length.shape),
    length=length,
    colors=np.argsort(~allowed, axis=1, kind="stable"),
    color_count=allowed.sum(axis=1),
  )


def _check(indices: np.ndarray, size: int, split: str, weights: Sequence[float]) -> None:
  scene_prompts.check_split(split)
  if size < 16 or size % 16:
    nearest = max(16, 16 * round(size / 16))
    raise ValueError(f"size: got {size}, expected a multiple of 16 pixels, the nearest is {nearest}")
  if indices.ndim != 1 or (len(indices) and indices.min() < 0):
    raise ValueError(f"indices: got shape {indices.shape}, expected one dimension of integers >= 0")
  if len(weights) != len(TASKS) or min(weights) < 0 or sum(weights) <= 0:
    raise ValueError(f"task_weights: got {tuple(weights)}, expected {len(TASKS)} numbers >= 0, one per task of {TASKS}")


def _picture(u, shape, bins, corner, shift, rgb, size) -> tuple[np.ndarray, np.ndarray]:
  """(kind of background [N], uint8 [N, S, S, 3]) of objects at cell corners moved by `shift` steps."""
  background, column, row = scene_pixels.backgrounds(u, size)
  whole, part = np.divmod(shift, STEPS)
  entry = ((shape * len(RADII) + bins) * STEPS + part[..., 0]) * STEPS + part[..., 1]
  image = np.empty((len(shape), size, size, 3), np.uint8)
  for begin in range(0, len(shape), _CHUNK):
    rows = slice(begin, begin + _CHUNK)
    used = np.nonzero(shape[rows] >= 0)
    top, left = np.moveaxis((corner + whole)[rows][used], -1, 0)
    objects = used[0], top, left, entry[rows][used], rgb[rows][used].astype(np.float32)
    scene_pixels.paint(image[rows], column[rows], row[rows], objects)
  return background, image


def render(
  indices: np.ndarray,
  *,
  seed: int,
  size: int = 128,
  split: str = "train",
  task_weights: Sequence[float] = TASK_WEIGHTS,
) -> Scenes:
  """Renders the scenes of these indices.

  Args:
    indices: int64 [N], any integers >= 0.
    seed: which endless stream of scenes.
    size: side of the picture in pixels, a multiple of 16. The scene itself does not depend on it.
    split: "train" (without held-out combinations), "unseen" (only those) or "any" (the whole world).
    task_weights: relative frequency of each of TASKS.

  Raises:
    ValueError: an argument is out of range.
  """
  indices = np.asarray(indices, np.int64)
  _check(indices, size, split, task_weights)
  table, cell = _table(split), size // GRID
  u = _uniform(seed, indices, _OBJECT_DRAWS + _PER_OBJECT * MAX_OBJECTS)
  per = u[:, _OBJECT_DRAWS:].reshape(-1, MAX_OBJECTS, _PER_OBJECT)
  task = np.searchsorted(np.cumsum(task_weights)[:-1] / np.sum(task_weights), u[:, 0], side="right")
  colored = (u[:, 1] < COLORED).astype(np.int64)
  spec = table.rows[table.start[task, colored] + _pick(u[:, 2], table.length[task, colored])]
  shape, kind = table.shape[spec], table.place[spec]
  cells, first, number = _places()
  place = cells[first[kind] + _pick(u[:, 3], number[kind])]

  free = table.colors[shape, _pick(per[..., 0], table.color_count[shape])]
  color = np.where(shape < 0, -1, np.where(table.color[spec] < 0, free, table.color[spec]))
  low, high = np.array([RADIUS[name] for name in SIZES])[table.size[spec]].T[..., None]
  bins = np.rint((low + (high - low) * per[..., 1] - RADII[0]) / (RADII[1] - RADII[0])).astype(np.int64)
  radius = RADII[bins] * cell
  reach = np.minimum(cell / 16, cell / 2 - radius)[..., None]  # an object never leaves its cell
  shift = np.floor(reach * (2 * per[..., 2:4] - 1) * STEPS + 0.5).astype(np.int64)
  rgb = np.clip(PALETTE[color] + COLOR_JITTER * (2 * per[..., 4:7] - 1), 0, 1) * 255

  corner = np.stack(np.divmod(place, GRID), axis=-1) * cell
  background, image = _picture(u[:, 4:_OBJECT_DRAWS], shape, bins, corner, shift, rgb, size)
  middle = (corner + cell / 2 + shift / STEPS).astype(np.float32)
  return Scenes(
    image=image,
    caption=list(table.captions[spec]),
    task=task.astype(np.int32),
    count=table.count[spec].astype(np.int32),
    shape=shape.astype(np.int32),
    color=color.astype(np.int32),
    size=radius.astype(np.float32),
    cy=middle[..., 0],
    cx=middle[..., 1],
    background=background.astype(np.int32),
  )
