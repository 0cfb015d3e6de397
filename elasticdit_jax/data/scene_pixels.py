"""The pixels of the embedded world: anti-aliased shapes from an atlas over soft backgrounds."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from elasticdit_jax.data.scene_prompts import SHAPES

GRID = 4
BACKGROUNDS = ("pale", "grey", "two_tone")
BACKGROUND_WEIGHTS = (0.8, 0.1, 0.1)
# Radius in cells: the circle's; the square has the circle's area, the triangle its width.
RADIUS = {"": (0.34, 0.45), "small": (0.30, 0.36), "big": (0.42, 0.47)}
SQUARE = np.sqrt(np.pi) / 2
TRIANGLE_HEIGHT = 1.75
PALETTE = np.array(
  [
    [0.88, 0.14, 0.14],  # red
    [0.14, 0.64, 0.20],  # green
    [0.14, 0.32, 0.90],  # blue
    [0.95, 0.86, 0.12],  # yellow
    [0.58, 0.20, 0.76],  # purple
    [0.95, 0.50, 0.08],  # orange
  ]
)
COLOR_JITTER = 0.05
RADII = np.linspace(0.30, 0.47, 18)
STEPS = 2  # positions per pixel and axis


def coverage(shape: int, radius: float, cy: float, cx: float, height: int, width: int) -> np.ndarray:
  """Anti-aliased mask of one shape.

  Args:
    shape: index into SHAPES.
    radius: in pixels, as RADIUS defines it.
    cy: vertical middle of the shape's bounding box in pixels, 0 at the window's upper edge.
    cx: horizontal middle.
    height: of the window.
    width: of the window.

  Returns:
    float32 [height, width] in [0, 1].
  """
  down, right = np.arange(height)[:, None] + 0.5 - cy, np.arange(width)[None, :] + 0.5 - cx
  y, x = np.abs(down), np.abs(right)
  if shape == 1:
    side = SQUARE * radius + 0.5
    return (np.clip(side - y, 0, 1) * np.clip(side - x, 0, 1)).astype(np.float32)
  if shape == 0:
    inside = radius - np.hypot(y, x)
  else:
    half = TRIANGLE_HEIGHT / 2 * radius
    inside = np.minimum((down + half - TRIANGLE_HEIGHT * x) / np.hypot(1, TRIANGLE_HEIGHT), half - down)
  return np.clip(inside + 0.5, 0, 1).astype(np.float32)


@functools.lru_cache(maxsize=4)
def atlas(size: int) -> np.ndarray:
  """float32 [shapes * radii * steps * steps, P, P, 1]: every mask a picture of this size needs."""
  width = size // GRID + 2
  steps = np.arange(STEPS) / STEPS + width / 2
  shapes = range(len(SHAPES))
  masks = [coverage(*case, width, width) for case in itertools.product(shapes, RADII * (width - 2), steps, steps)]
  return np.stack(masks)[..., None]


def backgrounds(u: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Backgrounds as sums of a column and a row profile: (kind [N], float32 [N, S, 3] twice), in 0..255."""
  kind = np.searchsorted(np.cumsum(BACKGROUND_WEIGHTS)[:-1], u[:, 0], side="right")
  low = np.choose(kind, (0.86, 0.45, 0.55))
  high = np.choose(kind, (1.0, 0.75, 0.95))
  base = low + (high - low) * u[:, 1]
  tint = (0.05 - 0.02 * (kind > 0))[:, None] * (2 * u[:, 2:5] - 1)
  slope = 0.14 * (2 * u[:, 5:7] - 1)
  axis = (np.arange(size) + 0.5) / size - 0.5
  profiles = [slope[:, i, None] * axis for i in (0, 1)]
  # Two tones meet in a soft edge across one axis; its place and height reuse the slopes' range.
  edge = 1 / (1 + np.exp(-16 * (axis - (u[:, 8, None] - 0.5) * 0.6))) - 0.5
  height = np.where(u[:, 9] < 0.5, -1, 1) * (0.15 + 0.15 * u[:, 10])
  for i, profile in enumerate(profiles):
    used = (kind == 2) & ((u[:, 7] < 0.5) == (i == 0))
    profile += np.where(used, height, 0.0)[:, None] * edge
  column = np.clip(base[:, None] + tint, 0, 1)[:, None, :] + profiles[0][:, :, None]
  row = np.repeat(profiles[1][:, :, None], 3, axis=2)
  return kind, (255 * column + 0.5).astype(np.float32), (255 * row).astype(np.float32)


def paint(image: np.ndarray, column: np.ndarray, row: np.ndarray, objects: Sequence[np.ndarray]) -> None:
  """Fills uint8 [n, S, S, 3] with its backgrounds and blends the objects over them, in place.

  Args:
    image: uint8 [n, S, S, 3].
    column: float32 [n, S, 3], with `row` the backgrounds.
    row: float32 [n, S, 3].
    objects: of all objects of these images: image number [k], first row and column of the cell moved by
      whole pixels [k], entry of the atlas [k], float32 colours [k, 3] in 0..255.
  """
  size = image.shape[1]
  margin = size // GRID // 16 + 2  # patches reach over the edge of the picture with nothing but coverage 0
  inner = slice(margin, margin + size)
  canvas = np.zeros((len(image), size + 2 * margin, size + 2 * margin, 3), np.uint8)
  np.copyto(canvas[:, inner, inner], np.clip(column[:, :, None] + row[:, None], 0, 255), casting="unsafe")
  number, top, left, entry, color = objects
  span = np.arange(size // GRID + 2) + margin - 1
  where = number[:, None, None], (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
  under = canvas[where].astype(np.float32)
  mask = atlas(size)[entry]
  canvas[where] = (under + mask * (color[:, None, None] - under) + 0.5).astype(np.uint8)
  image[:] = canvas[:, inner, inner]
