"""Diversity against pairs counted one by one."""

import itertools

import numpy as np
from absl.testing import absltest

from elasticdit_jax.evals.diversity import diversity


class DiversityTest(absltest.TestCase):
  def test_mean_over_prompts_of_the_distance_of_pairs(self):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 6, 3), np.uint8)
    expected = []
    for group in images.astype(float) / 255:
      squares = [np.mean((a - b) ** 2) for a, b in itertools.combinations(group, 2)]
      expected.append(np.sqrt(np.mean(squares)))
    self.assertAlmostEqual(diversity(images), np.mean(expected), places=12)

  def test_ends_of_the_scale(self):
    same = np.full((2, 3, 4, 4, 3), 7, np.uint8)
    self.assertEqual(diversity(same), 0.0)
    opposite = np.stack([np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)], axis=1)
    self.assertAlmostEqual(diversity(opposite), 1.0)

  def test_one_picture_has_no_diversity(self):
    with self.assertRaisesRegex(ValueError, r"diversity: expected uint8 \[prompts, 2 or more"):
      diversity(np.zeros((2, 1, 4, 4, 3), np.uint8))


if __name__ == "__main__":
  absltest.main()
