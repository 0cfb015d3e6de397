"""Scores follow the captions: exact where everything is there, and nothing passes by chance."""

import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.data import scenes
from elasticdit_jax.evals import detector, scenes_score


def _found(shape: str, color: str, cy: float = 16, cx: float = 16, radius: float = 12.5) -> detector.Detection:
  return detector.Detection(shape, color, cy, cx, radius, np.pi * radius**2, 0.95)


_CIRCLE = _found("circle", "red", 16, 16)
_SQUARE = _found("square", "blue", 20, 100)
_BLOB = _found("", "green", 100, 100)


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(
    ("a circle", [_CIRCLE], True),
    ("a circle", [_CIRCLE, _SQUARE], True),
    ("a circle", [_SQUARE], False),
    ("a circle", [], False),
    ("a circle", [_BLOB], False),
    ("a small circle", [_found("circle", "red", radius=10)], True),
    ("a small circle", [_found("circle", "red", radius=14)], False),
    ("a big circle", [_found("circle", "red", radius=14)], True),
    ("a big circle", [_found("circle", "red", radius=10)], False),
    ("a red circle", [_CIRCLE], True),
    ("a blue circle", [_CIRCLE], False),
    ("a square and a circle", [_CIRCLE, _SQUARE], True),
    ("a square and a triangle", [_CIRCLE, _SQUARE], False),
    ("a red circle and a blue square", [_CIRCLE, _SQUARE], True),
    ("a blue circle and a red square", [_CIRCLE, _SQUARE], False),
    ("two circles", [_CIRCLE, _CIRCLE], True),
    ("two circles", [_CIRCLE], False),
    ("two circles", [_CIRCLE] * 3, False),
    ("two circles", [_CIRCLE, _CIRCLE, _SQUARE], False),
    ("two circles", [_CIRCLE, _CIRCLE, _BLOB], False),
    ("two red circles", [_CIRCLE, _CIRCLE], True),
    ("two red circles", [_CIRCLE, _found("circle", "blue")], False),
    ("a circle left of a square", [_CIRCLE, _SQUARE], True),
    ("a circle left of a square", [_SQUARE, _CIRCLE], True),
    ("a circle right of a square", [_CIRCLE, _SQUARE], False),
    ("a circle above a square", [_CIRCLE, _SQUARE], False),
    ("a square right of a circle", [_CIRCLE, _SQUARE], True),
    ("a red circle left of a blue square", [_CIRCLE, _SQUARE], True),
    ("a red circle left of a green square", [_CIRCLE, _SQUARE], False),
    ("a circle left of a square", [_CIRCLE, _found("square", "red", 16, 34)], False),
    ("a circle above a square", [_CIRCLE, _found("square", "red", 80, 20)], True),
    ("a circle below a square", [_CIRCLE, _found("square", "red", 80, 20)], False),
  )
  def test_strict(self, caption, found, strict):
    score = scenes_score.score(caption, found, 128)
    self.assertEqual(score.strict, strict)
    self.assertEqual(score.partial == 1, strict)
    self.assertBetween(score.partial, 0, 1)

  @parameterized.parameters(
    ("a circle", [_CIRCLE], 0),
    ("a circle", [_CIRCLE, _CIRCLE, _BLOB], 2),
    ("a blue circle", [_CIRCLE], 0),
    ("two circles", [_CIRCLE, _SQUARE], 1),
    ("a circle left of a square", [_CIRCLE, _SQUARE, _SQUARE], 1),
    ("two circles", [], 0),
  )
  def test_extra(self, caption, found, extra):
    self.assertEqual(scenes_score.score(caption, found, 128).extra, extra)

  def test_partial_grows_with_what_is_right(self):
    caption = "a red circle left of a blue square"
    steps = [
      [],
      [_found("circle", "blue")],
      [_CIRCLE],
      [_SQUARE, _found("circle", "red", 100, 100)],
      [_CIRCLE, _SQUARE],
    ]
    partial = [scenes_score.score(caption, found, 128).partial for found in steps]
    self.assertEqual(partial, sorted(set(partial)))
    self.assertEqual((partial[0], partial[-1]), (0, 1))

  def test_unknown_caption(self):
    with self.assertRaisesRegex(ValueError, "closest one"):
      scenes_score.score("a photo of a dog", [], 128)


class TableTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.scene = scenes.render(np.arange(300), seed=8, split="any", task_weights=(1, 1, 1, 1, 1, 1))
    pairs = zip(self.scene.task, self.scene.caption, strict=True)
    self.prompts = [scenes.Prompt(scenes.TASKS[task], caption) for task, caption in pairs]

  def test_ground_truth_is_right_and_shuffled_captions_are_not(self):
    table = scenes_score.evaluate(self.prompts, self.scene.image)
    self.assertEqual(set(table.strict), {*scenes.TASKS, "overall"})
    self.assertGreaterEqual(table.strict["overall"], 0.995)
    self.assertLessEqual(table.extra["overall"], 0.005)
    order = np.random.default_rng(0).permutation(300)
    shuffled = scenes_score.evaluate(self.prompts, self.scene.image[order])
    self.assertLess(shuffled.strict["overall"], 0.15)
    self.assertGreater(shuffled.partial["overall"], shuffled.strict["overall"])
    self.assertGreater(shuffled.extra["overall"], 0.4)

  def test_overall_is_the_mean_of_the_tasks(self):
    white = np.full_like(self.scene.image, 255)
    half = np.where(np.arange(300)[:, None, None, None] % 2, white, self.scene.image)
    table = scenes_score.strict_table(self.prompts, half)
    overall = table.pop("overall")
    self.assertAlmostEqual(overall, np.mean(list(table.values())))
    self.assertBetween(overall, 0.4, 0.6)

  def test_numbers_must_match(self):
    with self.assertRaisesRegex(ValueError, "images: got 2 for 300 prompts"):
      scenes_score.evaluate(self.prompts, self.scene.image[:2])


class CalibrateTest(absltest.TestCase):
  def test_finds_faint_reconstructions_and_keeps_the_truth(self):
    scene = scenes.render(np.arange(40), seed=8, size=64)
    back = np.median(scene.image, axis=(1, 2), keepdims=True)
    faint = np.rint(0.5 * scene.image + 0.5 * back).astype(np.uint8)
    grid = {"saturations": (0.02, 0.15, 0.4), "ious": (0.7, 0.8), "blurs": (0.0,), "truths": 60}
    found = scenes_score.calibrate([(scene.caption, faint)], **grid)
    self.assertEqual((found.saturation, found.blur), (0.15, 0.0))

  def test_nothing_keeps_the_truth(self):
    scene = scenes.render(np.arange(4), seed=8, size=64)
    with self.assertRaisesRegex(ValueError, "floor: no candidate"):
      scenes_score.calibrate([(scene.caption, scene.image)], saturations=(0.9,), blurs=(0.0,), truths=20)
    with self.assertRaisesRegex(ValueError, "round_trips: got none"):
      scenes_score.calibrate([])


if __name__ == "__main__":
  absltest.main()
