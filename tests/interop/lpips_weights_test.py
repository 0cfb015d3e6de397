"""Files with PyTorch's names: round trip, and what is refused."""

import os
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest
from safetensors.numpy import load_file, save_file

from elasticdit_jax.interop import lpips_weights
from elasticdit_jax.models import lpips
from tests.models import lpips_case

_SMALL = ((2, 2), (2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
_TORCHVISION = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


class LpipsWeightsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.object(lpips, "GROUPS", _SMALL))
    self.path = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "vgg.safetensors")
    self.params = lpips_case.random_params()
    lpips_weights.save(self.path, self.params)

  def test_names_are_those_of_torchvision_and_lpips(self):
    stored = load_file(self.path)
    layers = sorted({int(name.split(".")[1]) for name in stored if name.startswith("features.")})
    self.assertEqual(layers, _TORCHVISION)
    self.assertEqual(stored["lin4.model.1.weight"].shape, (1, 2, 1, 1))
    self.assertEqual(stored["features.0.weight"].shape, (2, 3, 3, 3))  # OIHW
    np.testing.assert_array_equal(
      stored["features.0.weight"][1, 2], np.asarray(self.params["vgg"]["conv_0_0"]["kernel"])[:, :, 2, 1]
    )

  def test_round_trip_with_and_without_heads(self):
    for part in (self.params, {"vgg": self.params["vgg"]}):
      lpips_weights.save(self.path, part)
      loaded = lpips_weights.load(self.path)
      self.assertEqual(loaded.keys(), part.keys())
      np.testing.assert_array_equal(loaded["vgg"]["conv_2_1"]["kernel"], np.asarray(part["vgg"]["conv_2_1"]["kernel"]))

  def test_says_how_to_make_the_file(self):
    for path in ("", f"{self.path}.missing"):
      with self.assertRaisesRegex(ValueError, "no file .*torchvision.models.vgg16.*save_file") as caught:
        lpips_weights.load(path)
      self.assertNotIn("\n", str(caught.exception))
    pickled = os.path.join(os.path.dirname(self.path), "vgg.pth")
    with open(pickled, "wb") as f:
      f.write(b"anything")
    with self.assertRaisesRegex(ValueError, "is a pickle, which runs code"):
      lpips_weights.load(pickled)

  def test_names_every_difference(self):
    stored = load_file(self.path)
    stored["classifier.0.weight"] = stored.pop("features.2.bias")
    stored["lin0.model.1.weight"] = np.zeros((1, 5, 1, 1), np.float32)
    save_file(stored, self.path)
    with self.assertRaisesRegex(ValueError, "3 of 31 tensors.*conv_0_1/bias is missing.*classifier.*head_0 has shape"):
      lpips_weights.load(self.path)


if __name__ == "__main__":
  absltest.main()
