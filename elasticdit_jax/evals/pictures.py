"""Pictures on disk: PNG files that say how they were made, and labelled grids of them."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

COLUMNS = 8  # pictures side by side before a grid starts another band
_CELL = (128, 256)  # pixels: smaller pictures are enlarged, larger ones reduced
_LINES = 3  # of a caption
_GAP = 4
_FONT = 13


def save_png(path: str | os.PathLike, image: np.ndarray, **metadata: Any) -> None:
  """Writes a picture, uint8 [H, W, 3]; every keyword becomes a text entry of the file (`Image.open(path).text`).

  Raises:
    ValueError: for another shape or dtype.
  """
  image = _checked(image, 3)
  info = PngImagePlugin.PngInfo()
  for name, value in metadata.items():
    info.add_itxt(name, str(value))
  partial = f"{os.fspath(path)}.partial"
  try:
    Image.fromarray(image).save(partial, format="PNG", pnginfo=info)
    os.replace(partial, path)
  finally:
    pathlib.Path(partial).unlink(missing_ok=True)  # of a full disk


def grid(captions: Sequence[str], rows: Mapping[str, np.ndarray], columns: int = COLUMNS) -> np.ndarray:
  """Pictures side by side: one column per caption, one row per name, both written beside them.

  Args:
    captions: N; long ones are wrapped and, after three lines, cut.
    rows: name -> uint8 [N, H, W, 3]; sizes may differ between rows.
    columns: pictures in a row; further ones follow below in another band.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: where there are no rows, or a row has not one picture per caption.
  """
  if not rows or not captions:
    raise ValueError("grid: expected at least one caption and one row of pictures")
  cells = {name: _checked(images, 4) for name, images in rows.items()}
  for name, images in cells.items():
    if len(images) != len(captions):
      raise ValueError(f"grid: row {name!r} has {len(images)} pictures for {len(captions)} captions")
  font = ImageFont.load_default(_FONT)
  side = min(max(_CELL[0], *(i.shape[2] for i in cells.values())), _CELL[1])
  bands = [
    _band(captions[i : i + columns], {name: images[i : i + columns] for name, images in cells.items()}, side, font)
    for i in range(0, len(captions), columns)
  ]
  width = max(band.width for band in bands)
  page = Image.new("RGB", (width, sum(band.height for band in bands)), "white")
  top = 0
  for band in bands:
    page.paste(band, (0, top))
    top += band.height
  return np.asarray(page)


def _band(captions: Sequence[str], rows: Mapping[str, np.ndarray], side: int, font: ImageFont.ImageFont) -> Image.Image:
  texts = [_wrap(caption, side, font) for caption in captions]
  line = _FONT + 3
  head = line * max(len(text) for text in texts) + 2 * _GAP
  margin = round(max(font.getlength(name) for name in rows)) + 3 * _GAP
  heights = [round(side * images.shape[1] / images.shape[2]) for images in rows.values()]
  size = (margin + len(captions) * (side + _GAP), head + sum(heights) + _GAP * len(rows) + _GAP)
  page = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(page)
  for column, text in enumerate(texts):
    for number, words in enumerate(text):
      draw.text((margin + column * (side + _GAP), _GAP + number * line), words, "black", font)
  top = head
  for (name, images), height in zip(rows.items(), heights, strict=True):
    draw.text((_GAP, top + (height - _FONT) // 2), name, "black", font)
    for column, image in enumerate(images):
      page.paste(_resized(image, (side, height)), (margin + column * (side + _GAP), top))
    top += height + _GAP
  return page


def _resized(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
  picture = Image.fromarray(image)
  if picture.size == size:
    return picture
  return picture.resize(size, Image.Resampling.NEAREST if size[0] > picture.width else Image.Resampling.LANCZOS)


def _wrap(caption: str, width: int, font: ImageFont.ImageFont) -> list[str]:
  """Lines no wider than `width`; what does not fit into _LINES of them ends in "..."."""
  lines = [""]
  for word in caption.split():
    longer = f"{lines[-1]} {word}".strip()
    if not lines[-1] or font.getlength(longer) <= width:
      lines[-1] = longer
    else:
      lines.append(word)
  if len(lines) > _LINES:
    lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1]} ..."]
  return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: ImageFont.ImageFont) -> str:
  if font.getlength(line) <= width:
    return line
  while line and font.getlength(f"{line}...") > width:
    line = line[:-1]
  return f"{line}..."


def _checked(image: np.ndarray, ndim: int) -> np.ndarray:
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != ndim or image.shape[-1] != 3:
    shape = "[H, W, 3]" if ndim == 3 else "[N, H, W, 3]"
    raise ValueError(f"image: expected uint8 {shape}, got {image.dtype} {image.shape}")
  return image
