"""FolderSource: the user's own pictures and captions, read where they lie (layouts: `imagefolder`).

A broken picture does not stop a run: the next good one takes its row, and the row says how many were passed over. Too
many of them do stop it.
"""

import copy
import hashlib
import os
import threading

import grain
import numpy as np
from absl import logging
from PIL import Image, ImageOps

from elasticdit_jax.data.imagefolder import list_examples

MAX_BAD_FRACTION = 0.05
_HEADERS_CHECKED = 512
_MIN_VALIDATION = 16
_BROKEN_LOGGED = 10


class FolderSource:
  """Random access to the captioned pictures of a folder; threads may share it.

  `source[i]` is (image uint8 [S, S, 3], caption). Pictures are turned upright (EXIF), laid on white where transparent,
  scaled (Lanczos) until the shorter side is S and cropped around the middle.

  Attributes:
    size: S, side of the square pictures in pixels.
    captions: the caption of each example, in natural order: sorted by file name.
    names: the file of each example, relative to the folder, "/"-separated.
  """

  free_text = True

  def __init__(
    self,
    path: str | os.PathLike,
    size: int,
    caption_field: str = "text",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    min_side: int | None = None,
  ):
    """Lists the folder and reads the headers of some files, spread over it.

    Args:
      path: the folder; searched recursively, names that start with a dot are left out.
      size: S.
      caption_field: field (column) of the metadata that holds the caption; "" for pictures without captions.
      max_bad_fraction: share of broken pictures above which reading stops.
      min_side: pictures with a shorter side below this many pixels count as broken; S / 2 by default.

    Raises:
      ValueError: in one line, for a missing or empty folder, pictures without captions, metadata that does not fit
        the files, too many broken files.
    """
    if size < 1:
      raise ValueError(f"data.size: expected a positive number of pixels, got {size}")
    if not 0.0 <= max_bad_fraction <= 1.0:
      raise ValueError(f"data.max_bad_fraction: expected a share in [0, 1], got {max_bad_fraction}")
    self.size = size
    self._path = os.path.expanduser(path)
    self._min_side = size // 2 if min_side is None else min_side
    self._set(list_examples(self._path, caption_field))
    self._broken = _Broken(self._path, len(set(self.names)), max_bad_fraction)
    self._check_headers()

  def _set(self, examples: list[tuple[str, str]]) -> None:
    self.names, self.captions = (list(column) for column in zip(*examples, strict=True))

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
    if not -len(self) <= index < len(self):
      raise IndexError(f"example {index} of {len(self)}")
    return self.read_one(index % len(self))[:2]

  def read_one(self, index: int) -> tuple[np.ndarray, str, int]:
    """Image uint8 [S, S, 3] and caption of the first readable picture from `index` on, and how many were passed over.

    Raises:
      ValueError: where more than `max_bad_fraction` of the folder turned out to be broken.
    """
    for passed in range(len(self)):
      name = self.names[(index + passed) % len(self)]
      try:
        image = load_image(os.path.join(self._path, name), self.size, self._min_side)
      except MemoryError:
        raise
      except Exception as e:  # Pillow raises nearly every kind for damaged files.
        self._broken.add(name, e)
      else:
        return image, self.captions[(index + passed) % len(self)], passed
    raise ValueError(f"data.path: none of the {len(self)} pictures in {self._path} can be read; replace them")

  def read(self, keys: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Rows of a batch: image uint8 [N, S, S, 3], N captions, int32 [N] broken pictures passed over."""
    images, captions, passed = zip(*[self.read_one(int(key)) for key in keys], strict=True)
    return np.stack(images), list(captions), np.array(passed, np.int32)

  def order(self, seed: int | None) -> grain.MapDataset:
    """Endless indices: a new permutation in each epoch, or natural order where `seed` is None."""
    indices = grain.MapDataset.range(len(self))
    if seed is not None:
      indices = indices.seed(seed).shuffle()
    return indices.repeat()

  def split(self, fraction: float = 0.02) -> tuple["FolderSource", "FolderSource"]:
    """(training, validation) parts by a hash of the file name: a file keeps its side when others come or go.

    About `fraction` of the files are held out, and at least 16 or a tenth of a small folder. The parts share one count
    of broken files. A folder of one picture is both parts.
    """
    hashes = {
      name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") for name in self.names
    }
    ranked = sorted(hashes, key=lambda name: (hashes[name], name))
    least = min(_MIN_VALIDATION, max(1, len(ranked) // 10))
    held = set(ranked[: max(least, sum(h < fraction * 2.0**64 for h in hashes.values()))])
    examples = list(zip(self.names, self.captions, strict=True))
    training = [e for e in examples if e[0] not in held] or examples
    validation = [e for e in examples if e[0] in held]
    return self._part(training), self._part(validation)

  def _part(self, examples: list[tuple[str, str]]) -> "FolderSource":
    part = copy.copy(self)
    part._set(examples)
    return part

  def _check_headers(self) -> None:
    names = sorted(set(self.names))
    picks = np.unique(np.linspace(0, len(names) - 1, _HEADERS_CHECKED).astype(int))
    for name in (names[i] for i in picks):
      try:
        _check_not_empty(os.path.join(self._path, name))
        with Image.open(os.path.join(self._path, name)) as image:
          _check_side(image, self._min_side)
      except Exception as e:  # Pillow raises nearly every kind for damaged files.
        self._broken.add(name, e, stop=False)
    self._broken.check(len(picks))


class _Broken:
  """The broken files met so far, shared by the parts of one folder."""

  def __init__(self, path: str, total: int, limit: float):
    self._path, self._total, self._limit = path, total, limit
    self._reasons: dict[str, str] = {}
    self._lock = threading.Lock()

  def add(self, name: str, error: Exception, stop: bool = True) -> None:
    with self._lock:
      if name in self._reasons:
        return
      self._reasons[name] = " ".join(str(error).split()) or type(error).__name__
      if len(self._reasons) <= _BROKEN_LOGGED:
        logging.warning("data: passing over the broken picture %s: %s", name, self._reasons[name])
    if stop:
      self.check(self._total)

  def check(self, seen: int) -> None:
    """Raises where too many of `seen` files are broken."""
    with self._lock:
      count = len(self._reasons)
      if count <= self._limit * seen:
        return
      name, reason = next(iter(self._reasons.items()))
    raise ValueError(
      f"data.path: {count} of {seen} pictures checked in {self._path} are broken ({count / seen:.1%}, limit"
      f" {self._limit:.1%}), first {name}: {reason}; repair or remove them, or raise data.max_bad_fraction"
    )


def _check_not_empty(path: str) -> None:
  if os.path.isfile(path) and not os.path.getsize(path):
    raise ValueError("empty: a file of 0 bytes")


def _check_side(image: Image.Image, min_side: int) -> None:
  if min(image.size) < min_side:
    raise ValueError(f"too small: {image.width} x {image.height} pixels, expected at least {min_side} on each side")


def load_image(path: str, size: int | None, min_side: int = 1) -> np.ndarray:
  """One picture as uint8 [size, size, 3]; see `FolderSource` for what happens to it.

  Args:
    path: of the file.
    size: side in pixels; None keeps the picture's own size, [H, W, 3].
    min_side: least length of the shorter side in pixels.

  Raises:
    Exception: of any kind Pillow knows, where the file cannot be read; ValueError where it is too small or empty.
  """
  _check_not_empty(path)
  with Image.open(path) as file:
    _check_side(file, min_side)
    if size:
      file.draft(None, (2 * size, 2 * size))  # JPEG decodes at a reduced scale where the picture is much larger
    image = ImageOps.exif_transpose(file)
    if image.mode in ("I", "I;16", "I;16B"):
      image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
      image = image.convert("RGBA")
      image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size:
      image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
  return np.asarray(image)
