"""Local rewards: exact on rendered scenes, and spare objects cost."""

import io

import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from elasticdit_jax.data import scenes
from elasticdit_jax.evals import detector
from elasticdit_jax.train import reward_local


class SceneTest(parameterized.TestCase):
  def test_ground_truth_gets_one_and_other_captions_less(self):
    scene = scenes.render(np.arange(60), seed=3, split="any", task_weights=(1, 1, 1, 1, 1, 1))
    right = reward_local.scene_scores(scene.image, scene.caption, [{}] * 60)
    self.assertGreater(right["scene_strict"].mean(), 0.98)
    self.assertGreater(right["scene_partial"].mean(), 0.98)
    wrong = reward_local.scene_scores(scene.image, np.roll(scene.caption, 7), [{}] * 60)
    self.assertLess(wrong["scene_strict"].mean(), 0.2)
    for scores in (right, wrong):
      self.assertTrue(np.all((scores["scene_partial"] == 1) == (scores["scene_strict"] == 1)))
      self.assertTrue(np.all((scores["scene_partial"] >= 0) & (scores["scene_partial"] <= 1)))

  @parameterized.parameters(
    ("a circle left of a square", ["circle", "square"], 1, 1),
    # Both objects right and the relation wrong is two wishes of three.
    ("a circle right of a square", ["circle", "square"], 0, 2 / 3),
    ("a circle", ["circle"], 1, 1),
    ("a circle", ["circle", "square"], 0, 1 / 2),
    ("a circle", ["circle", "circle"], 0, 1 / 2),
    ("a circle and a square", ["circle", "square", "triangle"], 0, 2 / 3),
    ("a circle and a square", ["circle"], 0, 1 / 2),
    ("two circles", ["circle", "circle"], 1, 1),
    ("two circles", ["circle", "circle", "circle"], 0, 1 / 2),
    ("two circles", ["circle"] * 9, 0, 0),
    ("a circle", [], 0, 0),
  )
  def test_terms(self, caption, shapes, strict, partial):
    found = [detector.Detection(shape, "red", 64, 20 + 40 * i, 10, 300, 0.9) for i, shape in enumerate(shapes)]
    self.enterContext(absltest.mock.patch.object(detector, "detect", lambda images: [found]))
    scores = reward_local.scene_scores(np.zeros((1, 128, 128, 3), np.uint8), [caption], [{}])
    self.assertEqual(scores["scene_strict"].tolist(), [strict])
    np.testing.assert_allclose(scores["scene_partial"], [partial], rtol=1e-6)


class JpegTest(absltest.TestCase):
  def test_size_of_the_file(self):
    noise = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), np.uint8)
    scores = reward_local.jpeg_scores(np.concatenate([np.zeros_like(noise), noise]), ["", ""], [{}, {}])
    file = io.BytesIO()
    Image.fromarray(noise[0]).save(file, "JPEG", quality=95)
    np.testing.assert_allclose(scores["jpeg_size"][1], -len(file.getvalue()) / 500_000)
    self.assertGreater(scores["jpeg_size"][0], scores["jpeg_size"][1])


if __name__ == "__main__":
  absltest.main()
