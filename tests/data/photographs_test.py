"""The photographs of other packages: found where installed, and how to get them otherwise."""

import importlib.util
import os
import types
from unittest import mock

import numpy as np
from absl.testing import absltest

from elasticdit_jax.data import folder, photographs
from tests.data import pictures


class PhotographsTest(absltest.TestCase):
  def test_says_what_to_install(self):
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
      with self.assertRaisesRegex(
        ValueError, r'astronaut, .*flower not found.*pip install "elasticdit_jax\[photographs\]"'
      ):
        photographs.photographs()

  def test_finds_files_without_importing(self):
    root = pictures.new_folder(self)
    for package, file in photographs._FILES.values():
      path = os.path.join(root, package, file)
      os.makedirs(os.path.dirname(path), exist_ok=True)
      pictures.picture(0).save(path)
    place = lambda name: types.SimpleNamespace(submodule_search_locations=[os.path.join(root, name)])  # noqa: E731
    with mock.patch.object(importlib.util, "find_spec", place):
      found = photographs.photographs()
      os.remove(found["cat"])
      with self.assertRaisesRegex(ValueError, "photographs: cat not found"):
        photographs.photographs()
    self.assertLen(found, 7)

  def test_the_real_ones(self):
    try:
      found = photographs.photographs()
    except ValueError:
      self.skipTest("scikit-image and scikit-learn are not installed")
    for name, path in found.items():
      image = folder.load_image(path, None)
      self.assertGreaterEqual(min(image.shape[:2]), 256, name)
      self.assertGreater(np.abs(image[..., 0].astype(int) - image[..., 2]).mean(), 1, name)  # colour


if __name__ == "__main__":
  absltest.main()
