"""Small folders of captioned pictures for the tests of this room."""

import json
import os
import tempfile
import unittest

import numpy as np
from PIL import Image


def new_folder(test: unittest.TestCase) -> str:
  """An empty folder that lives as long as the test; needs no parsed flags."""
  folder = tempfile.TemporaryDirectory()
  test.addCleanup(folder.cleanup)
  return folder.name


def picture(seed: int, height: int = 40, width: int = 48, mode: str = "RGB") -> Image.Image:
  """Noise, so that pictures of different seeds differ everywhere."""
  rng = np.random.default_rng(seed)
  channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
  return Image.fromarray(rng.integers(0, 256, (height, width, channels), np.uint8).squeeze(), mode)


def write_folder(path: str, count: int, broken: tuple[int, ...] = ()) -> list[str]:
  """Writes `count` PNGs with metadata.jsonl; captions are "number <i>". Returns the names."""
  os.makedirs(path, exist_ok=True)
  names = [f"{i:03d}.png" for i in range(count)]
  for i, name in enumerate(names):
    picture(i).save(os.path.join(path, name))
    if i in broken:
      truncate(os.path.join(path, name))
  with open(os.path.join(path, "metadata.jsonl"), "w") as f:
    for i, name in enumerate(names):
      f.write(json.dumps({"file_name": name, "text": f"number {i}"}) + "\n")
  return names


def truncate(path: str) -> None:
  """Leaves a valid header and half of the pixels."""
  size = os.path.getsize(path)
  os.truncate(path, size // 2)
