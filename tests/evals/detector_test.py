"""The detector reads ground truth exactly, through noise and blur, and refuses what is not there."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized
from scipy import ndimage

from elasticdit_jax.data import scene_pixels, scenes
from elasticdit_jax.evals import detector


def _noisy(image: np.ndarray, sigma: float) -> np.ndarray:
  noise = 255 * sigma * np.random.default_rng(0).standard_normal(image.shape)
  return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
  return np.rint(ndimage.gaussian_filter(image.astype(np.float32), (0, sigma, sigma, 0))).astype(np.uint8)


def _picture(*objects, size=128) -> np.ndarray:
  """uint8 [1, S, S, 3] of (shape, colour, radius, cy, cx) on light grey."""
  image = np.full((size, size, 3), 225.0)
  for shape, color, radius, cy, cx in objects:
    mask = scene_pixels.coverage(scenes.SHAPES.index(shape), radius, cy, cx, size, size)[..., None]
    image += mask * (255 * scene_pixels.PALETTE[scenes.COLORS.index(color)] - image)
  return np.rint(image).astype(np.uint8)[None]


def _share_exact(scene: scenes.Scenes, images: np.ndarray) -> float:
  """Share of pictures in which precisely the rendered objects are found, within 1.5 px of a 128 px picture."""
  exact = 0
  for row, found in enumerate(detector.detect(images)):
    objects = range(scene.count[row])
    wanted = sorted((scenes.SHAPES[scene.shape[row, k]], scenes.COLORS[scene.color[row, k]]) for k in objects)
    near = all(
      min(np.hypot(o.cy - scene.cy[row, k], o.cx - scene.cx[row, k]) for o in found) < 1.5 * len(images[0]) / 128
      for k in objects
      if found
    )
    exact += near and wanted == sorted((o.shape, o.color) for o in found)
  return exact / len(images)


class DetectTest(parameterized.TestCase):
  @parameterized.parameters((128, 0.0), (128, 0.05), (96, 0.05), (64, 0.05), (256, 0.05))
  def test_ground_truth(self, size, sigma):
    scene = scenes.render(np.arange(64 if size > 128 else 200), seed=4, size=size, split="any")
    self.assertGreaterEqual(_share_exact(scene, _noisy(scene.image, sigma)), 0.995)

  def test_blur(self):
    scene = scenes.render(np.arange(200), seed=4, split="any")
    self.assertGreaterEqual(_share_exact(scene, _noisy(_blurred(scene.image, 1.5), 0.02)), 0.995)

  def test_radius_and_place(self):
    for shape in scenes.SHAPES:
      (found,) = detector.detect(_picture((shape, "blue", 12.5, 40.25, 70.0)))[0]
      self.assertEqual((found.shape, found.color), (shape, "blue"))
      np.testing.assert_allclose((found.radius, found.cy, found.cx), (12.5, 40.25, 70), atol=0.4)
      self.assertGreater(found.iou, 0.9)

  def test_touching_objects_of_two_colors_are_two(self):
    (found,) = detector.detect(_picture(("circle", "red", 13, 64, 50), ("square", "blue", 13, 64, 73)))
    self.assertEqual(sorted((o.shape, o.color) for o in found), [("circle", "red"), ("square", "blue")])

  def test_nothing_in_flat_pictures(self):
    flat = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 255)])
    self.assertEqual(detector.detect(flat), [[], [], []])

  def test_unlike_any_shape(self):
    cross = np.full((1, 128, 128, 3), 230, np.uint8)
    cross[0, 60:66, 40:90] = cross[0, 40:90, 60:66] = (220, 30, 30)
    bar = np.full((1, 128, 128, 3), 230, np.uint8)
    bar[0, 60:70, 30:90] = (30, 60, 220)
    everything = np.full((1, 128, 128, 3), (220, 30, 30), np.uint8)
    for image in (cross, bar, everything):
      self.assertEqual([o.shape for o in detector.detect(image)[0]], [""])

  def test_thresholds_decide(self):
    image = _picture(("circle", "green", 12, 60, 60))
    pale = (image.astype(int) * 0.4 + 225 * 0.6).astype(np.uint8)  # chroma 0.2
    self.assertEmpty(detector.detect(pale)[0])
    low = dataclasses.replace(detector.DEFAULT, saturation=0.15)
    self.assertEqual([o.shape for o in detector.detect(pale, low)[0]], ["circle"])
    strict = dataclasses.replace(detector.DEFAULT, iou=0.999)
    self.assertEqual([o.shape for o in detector.detect(image, strict)[0]], [""])
    large = dataclasses.replace(detector.DEFAULT, min_area=0.5)
    self.assertEmpty(detector.detect(image, large)[0])
    blur = dataclasses.replace(detector.DEFAULT, blur=1.0)
    self.assertEqual([o.shape for o in detector.detect(image, blur)[0]], ["circle"])

  @parameterized.parameters(((2, 64, 32, 3), np.uint8), ((64, 64, 3), np.uint8), ((1, 64, 64, 3), np.float32))
  def test_bad_images(self, shape, dtype):
    with self.assertRaisesRegex(ValueError, r"images: got .*expected uint8 \[B, S, S, 3\]"):
      detector.detect(np.zeros(shape, dtype))


if __name__ == "__main__":
  absltest.main()
