"""Rewards: weighted sums, mistakes are named, scoring runs beside the caller."""

import threading

import numpy as np
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from elasticdit_jax.data import scenes
from elasticdit_jax.train import rewards

_IMAGES = np.zeros((3, 8, 8, 3), np.uint8)
_PROMPTS = ["a circle", "a square", "two squares"]


def _weights(weights):
  return ConfigDict({"weights": weights})


class RewardTest(parameterized.TestCase):
  @parameterized.parameters(
    ("scene_strcit=1", "unknown reward 'scene_strcit'; there are scene_strict, scene_partial, jpeg_size"),
    ("pick_score=1", "unknown reward 'pick_score'; .*; give its weights with rewards.models=pick_score=DIRECTORY"),
    ("scene_strict=-1", "scene_strict: expected a finite weight of at least 0, got -1"),
    ("scene_strict=nan", "expected a finite weight"),
    ("scene_strict=much", "expected a number like scene_strict=1, got 'much'"),
    ("scene_strict", "expected name=value like scene_strict=1, got 'scene_strict'"),
    ("scene_strict=1,scene_strict=2", "given twice"),
    ("scene_strict=0", "at least one weight above 0"),
    ("", "expected name=value like scene_strict=1, got ''"),
    ({"jpeg_size": -0.5}, "jpeg_size: expected a finite weight"),
  )
  def test_refuses_weights(self, weights, message):
    with self.assertRaisesRegex(ValueError, f"rewards.weights: .*{message}"):
      rewards.from_config({"weights": weights})

  def test_refuses_fields(self):
    with self.assertRaisesRegex(ValueError, "rewards.threads: expected at least 1, got 0"):
      rewards.from_config({"threads": 0})
    with self.assertRaisesRegex(ValueError, "rewards.models: expected clip_score=DIRECTORY, .*, got 'hps=here'"):
      rewards.from_config({"models": "hps=here"})
    with self.assertRaisesRegex(ValueError, "rewards.models: pick_score: no directory 'nowhere'"):
      rewards.from_config({"models": "pick_score=nowhere", "weights": "pick_score=1"})
    with self.assertRaisesRegex(ValueError, "rewards.wieghts: unknown field; there are weights, models"):
      rewards.from_config({"wieghts": "scene_strict=1"})

  def test_names_weights_and_sum(self):
    reward = rewards.from_config(_weights("jpeg_size=10, scene_partial=0.5,scene_strict=0"))
    self.assertEqual(reward.names, ("jpeg_size", "scene_partial", "scene_strict"))
    scene = scenes.render(np.arange(3), seed=3)
    scores = reward(scene.image, scene.caption)
    self.assertEqual(tuple(scores), reward.names)
    for values in scores.values():
      self.assertEqual((values.dtype, values.shape), (np.float32, (3,)))
    total = rewards.combine(scores, reward.weights)
    self.assertEqual((total.dtype, total.shape), (np.float32, (3,)))
    np.testing.assert_allclose(total, 10 * scores["jpeg_size"] + 0.5 * scores["scene_partial"], rtol=1e-6)
    with self.assertRaisesRegex(ValueError, "no scores of other; got jpeg_size"):
      rewards.combine(scores, {"other": 1.0})

  @parameterized.parameters(
    ({"mine": [1.0, float("nan"), 0.0]}, "reward 'mine': 1 of 3 values are not finite, the first is nan for picture 1"),
    ({"mine": [1.0, 2.0]}, r"reward 'mine': expected one number for each of 3 pictures, got shape \(2,\)"),
    ({"other": [1.0, 2.0, 3.0]}, "reward 'mine': its source returned 'other' instead"),
  )
  def test_wrong_answers_are_named(self, answer, message):
    reward = rewards.Reward({("mine",): lambda *_: answer}, {"mine": 1})
    with self.assertRaisesRegex(ValueError, message):
      reward(_IMAGES, _PROMPTS)

  def test_errors_of_a_source_come_through(self):
    reward = rewards.from_config(_weights("scene_strict=1"))
    with self.assertRaisesRegex(ValueError, "'a photo of a dog' is not a caption"):
      reward(_IMAGES, ["a photo of a dog"] * 3)

  @parameterized.parameters(
    ((_IMAGES, _PROMPTS[:2]), "got 3 images, 2 prompts and 2 metadata"),
    ((_IMAGES, _PROMPTS, [{}]), "got 3 images, 3 prompts and 1 metadata"),
    ((_IMAGES / 255, _PROMPTS), "images: expected uint8"),
  )
  def test_refuses_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      rewards.from_config({})(*arguments)

  def test_scores_beside_the_caller_and_in_parallel(self):
    """Two batches of two sources meet at one barrier, while the caller goes on."""
    barrier = threading.Barrier(5, timeout=20)

    def source(name):
      def score(images, prompts, metadata):
        barrier.wait()
        return {name: [row["value"] for row in metadata]}

      return score

    reward = rewards.Reward({("a",): source("a"), ("b",): source("b")}, {"a": 1, "b": 2}, threads=4)
    batches = [reward.submit(_IMAGES, _PROMPTS, [{"value": base + i} for i in range(3)]) for base in (0, 10)]
    barrier.wait()
    for base, pending in zip((0, 10), batches, strict=True):
      scores = reward.collect(pending)
      np.testing.assert_array_equal(rewards.combine(scores, reward.weights), 3 * (base + np.arange(3)))

  def test_a_source_nobody_weighs_is_not_called(self):
    called = []
    sources = {("a",): lambda *_: {"a": np.ones(3)}, ("b",): lambda *_: called.append(1)}
    rewards.Reward(sources, {"a": 1})(_IMAGES, _PROMPTS)
    self.assertEmpty(called)


if __name__ == "__main__":
  absltest.main()
