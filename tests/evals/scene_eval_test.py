"""Routes are scored on the pictures they draw, split by split."""

import types

import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.data import scene_prompts, scenes
from elasticdit_jax.evals import scene_eval


class _Painter:
  """Draws every caption exactly on the route "right", the next caption's picture on the route "wrong"."""

  def __init__(self, words=scene_prompts.VOCABULARY):
    self.model = types.SimpleNamespace(encoder=types.SimpleNamespace(words=words))
    self.calls = []

  def __call__(self, captions, route, steps, guidance, seed, solver):
    self.calls.append((route, tuple(captions), steps, guidance, seed, solver))
    indices, found = np.arange(2000), {}
    while set(captions) - set(found):
      made = scenes.render(indices, seed=3, size=64, split="any")
      found.update({c: made.image[i] for i, c in enumerate(made.caption) if c in captions})
      indices = indices + 2000
    images = np.stack([found[caption] for caption in captions])
    return images if route == "right" else np.roll(images, 1, axis=0)


class SceneEvalTest(parameterized.TestCase):
  def test_scores_per_route_and_split(self):
    painter = _Painter()
    scores = scene_eval.evaluate_routes(painter, ("right", "wrong"), per_task=2, steps=7, guidance=2.5, seed=11)
    self.assertEqual(list(scores), ["right", "wrong"])
    for split in ("seen", "unseen"):
      right, wrong = scores["right"][split], scores["wrong"][split]
      self.assertEqual(right["prompts"], 12)
      self.assertCountEqual(right["strict"], [*scene_prompts.TASKS, "overall"])
      self.assertGreaterEqual(right["strict"]["overall"], 0.9)
      self.assertLessEqual(right["extra"]["overall"], 0.1)
      self.assertLess(wrong["strict"]["overall"], 0.5)
      self.assertGreater(wrong["partial"]["overall"], wrong["strict"]["overall"])
    first, second = painter.calls
    self.assertEqual(first[1:], second[1:])
    self.assertEqual(first[2:], (7, 2.5, 11, "euler"))

  def test_one_split(self):
    scores = scene_eval.evaluate_routes(_Painter(), ("right",), per_task=1, splits=("unseen",))
    self.assertEqual(list(scores["right"]), ["unseen"])

  def test_needs_a_model_of_the_scenes(self):
    with self.assertRaisesRegex(ValueError, "does not know the words of the embedded scenes"):
      scene_eval.evaluate_routes(_Painter(words=("cat",)), ("right",), per_task=1)

  @parameterized.parameters(1, 6, 8, 12, 13)
  def test_fixed_prompts_cover_the_tasks_and_both_splits(self, count):
    captions = scene_eval.fixed_prompts(count)
    self.assertLen(captions, count)
    self.assertLen(set(captions), count)
    specs = [scene_prompts.parse(caption) for caption in captions]
    self.assertLen({spec.task for spec in specs[:6]}, min(count, 6))
    if count >= 6:
      self.assertEqual({spec.split for spec in specs[:6]}, {"train", "unseen"})


if __name__ == "__main__":
  absltest.main()
