"""Every kind of array that stands for a picture, and those that do not."""

import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.data import arrays
from elasticdit_jax.types import to_float


class ToRgbTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.rgb = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)

  def test_uint8_and_its_floats(self):
    np.testing.assert_array_equal(arrays.to_rgb(self.rgb), self.rgb)
    for dtype in (np.float32, np.float64):
      np.testing.assert_array_equal(arrays.to_rgb(to_float(self.rgb).astype(dtype)), self.rgb)
    np.testing.assert_array_equal(arrays.to_rgb(self.rgb[0]), self.rgb[:1])

  def test_grey_bool_and_one_pixel(self):
    grey = self.rgb[0, ..., :1]
    for given in (grey, grey[..., 0], grey[None]):
      np.testing.assert_array_equal(arrays.to_rgb(given), np.repeat(grey, 3, -1)[None])
    np.testing.assert_array_equal(arrays.to_rgb(np.array([[True, False]])), [[[[255] * 3, [0] * 3]]])
    np.testing.assert_array_equal(arrays.to_rgb(np.array([[7]], np.uint8)), np.full((1, 1, 1, 3), 7))

  def test_transparent_pixels_become_white(self):
    rgba = np.concatenate([self.rgb, np.zeros((2, 5, 4, 1), np.uint8)], -1)
    np.testing.assert_array_equal(arrays.to_rgb(rgba), 255)
    rgba[..., 3] = 255
    np.testing.assert_array_equal(arrays.to_rgb(rgba), self.rgb)
    self.assertEqual(arrays.to_rgb(np.array([[[0, 100, 200, 51]]], np.uint8)).ravel().tolist(), [204, 224, 244])

  @parameterized.parameters(
    (np.zeros((4, 4, 2), np.uint8), r"got shape \(1, 4, 4, 2\)"),
    (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
    (np.zeros(4, np.uint8), "expected"),
    (np.full((4, 4, 3), 255.0), r"floats are expected in \[-1, 1\], got 255 to 255; divide 0..255 by 127.5"),
    (np.full((4, 4, 3), np.nan), "got nan to nan"),
    (np.full((4, 4, 3), -1.1), "got -1.1 to -1.1"),
    (np.zeros((4, 4, 3), np.int32), "got int32"),
  )
  def test_refuses(self, images, message):
    with self.assertRaisesRegex(ValueError, message):
      arrays.to_rgb(images)


if __name__ == "__main__":
  absltest.main()
