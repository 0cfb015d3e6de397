"""The embedded world: determinism, exactness of the scenes and honesty of the held-out combinations."""

import hashlib

import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.data import scene_pixels, scene_prompts, scenes

_MANY = 6000


def _draw(split: str, count: int = _MANY, **kwargs) -> scenes.Scenes:
  return scenes.render(np.arange(count), seed=11, size=16, split=split, **kwargs)


class RenderTest(parameterized.TestCase):
  def test_row_does_not_depend_on_its_batch(self):
    whole = scenes.render(np.arange(70), seed=3, size=32)
    order = np.array([65, 2, 40, 41])
    part = scenes.render(order, seed=3, size=32)
    np.testing.assert_array_equal(whole.image[order], part.image)
    self.assertEqual([whole.caption[i] for i in order], part.caption)
    np.testing.assert_array_equal(whole.cy[order], part.cy)
    np.testing.assert_array_equal(whole.shape[order], part.shape)

  def test_seed_and_index_change_the_picture(self):
    first = scenes.render(np.arange(8), seed=0, size=32).image
    self.assertFalse(np.array_equal(first, scenes.render(np.arange(8), seed=1, size=32).image))
    self.assertLen({row.tobytes() for row in scenes.render(np.arange(500), seed=0, size=32).image}, 500)

  def test_scene_does_not_depend_on_the_size(self):
    small, large = (scenes.render(np.arange(40), seed=5, size=size) for size in (32, 128))
    self.assertEqual(small.caption, large.caption)
    np.testing.assert_array_equal(small.color, large.color)
    np.testing.assert_allclose(small.size * 4, large.size, rtol=1e-6)

  def test_pictures_stay_what_they_are(self):
    """Published figures and shipped weights stand on them."""
    scene = scenes.render(np.arange(64), seed=0)
    digest = hashlib.sha256("|".join(scene.caption).encode()).hexdigest()
    self.assertEqual(digest[:16], "58858d744312c448")
    means = scene.image[:3].mean((1, 2)).round(2)
    np.testing.assert_allclose(
      means, [[225.04, 221.78, 221.88], [242.07, 221.41, 235.31], [233.38, 218.52, 222.3]], atol=0.02
    )

  @parameterized.parameters(16, 64, 96, 128, 256)
  def test_objects_are_where_the_record_says(self, size):
    scene = scenes.render(np.arange(24), seed=2, size=size)
    self.assertEqual(scene.image.shape, (24, size, size, 3))
    self.assertEqual(scene.image.dtype, np.uint8)
    for row in range(24):
      for k in range(scene.count[row]):
        pixel = scene.image[row, int(scene.cy[row, k]), int(scene.cx[row, k])] / 255
        self.assertLess(np.abs(pixel - scene_pixels.PALETTE[scene.color[row, k]]).max(), 0.06)

  def test_objects_stay_in_their_cells_and_apart(self):
    scene = _draw("any")
    cell = 4
    used = scene.shape >= 0
    np.testing.assert_array_equal(used.sum(1), scene.count)
    for middle in (scene.cy, scene.cx):
      offset = np.abs(middle % cell - cell / 2) + scene.size
      self.assertLessEqual(offset[used].max(), cell / 2 + 1e-5)
    y, x = scene.cy // cell, scene.cx // cell
    gap = np.abs(y[:, :, None] - y[:, None]) + np.abs(x[:, :, None] - x[:, None])
    pairs = used[:, :, None] & used[:, None] & ~np.eye(4, dtype=bool)
    self.assertGreaterEqual(gap[pairs].min(), 2)

  def test_every_cell_color_and_background_occurs(self):
    scene = _draw("train")
    cells = (scene.cy // 4 * 4 + scene.cx // 4)[scene.shape >= 0]
    self.assertGreater(np.bincount(cells.astype(int), minlength=16).min(), 0.04 * len(cells))
    colors = np.bincount(scene.color[scene.shape >= 0], minlength=6)
    self.assertGreater(colors.min(), 0.12 * colors.sum())
    backgrounds = np.bincount(scene.background, minlength=3) / _MANY
    np.testing.assert_allclose(backgrounds, [0.8, 0.1, 0.1], atol=0.02)

  def test_backgrounds_are_nearly_grey(self):
    image = scenes.render(np.arange(200), seed=9, size=64).image.astype(int)
    border = image[:, 0]  # objects leave most of it free
    spread = np.median(border.max(-1) - border.min(-1), axis=1)
    self.assertLess(spread.max(), 0.13 * 255)

  def test_task_weights(self):
    share = np.bincount(_draw("train").task, minlength=6) / _MANY
    np.testing.assert_allclose(share, scenes.TASK_WEIGHTS, atol=0.02)
    only = _draw("train", 50, task_weights=(0, 0, 1, 0, 0, 0))
    self.assertEqual(set(only.task.tolist()), {2})

  @parameterized.parameters(
    ({"size": 100}, "size: got 100.*nearest is 96"),
    ({"size": 0}, "size: got 0.*nearest is 16"),
    ({"split": "seen"}, "split: got 'seen'.*train"),
    ({"task_weights": (1, 1)}, "task_weights"),
    ({"indices": np.array([-1])}, "indices"),
    ({"indices": np.zeros((2, 2))}, "indices"),
  )
  def test_bad_arguments(self, change, message):
    arguments = {"indices": np.arange(2), "seed": 0, **change}
    with self.assertRaisesRegex(ValueError, message):
      scenes.render(arguments.pop("indices"), **arguments)


class CaptionTest(parameterized.TestCase):
  @parameterized.parameters("train", "unseen", "any")
  def test_picture_shows_exactly_its_caption(self, split):
    scene = _draw(split)
    for row, caption in enumerate(scene.caption):
      spec = scene_prompts.parse(caption)
      self.assertEqual(scenes.TASKS[scene.task[row]], spec.task)
      self.assertEqual(scene.count[row], len(spec.objects))
      for k, wanted in enumerate(spec.objects):
        self.assertEqual(scenes.SHAPES[scene.shape[row, k]], wanted.shape)
        if wanted.color:
          self.assertEqual(scenes.COLORS[scene.color[row, k]], wanted.color)
        low, high = scene_pixels.RADIUS[wanted.size]
        self.assertBetween(scene.size[row, k] / 4, low - 1e-5, high + 1e-5)
      if spec.relation:
        right, down = (a[row, 1] - a[row, 0] for a in (scene.cx, scene.cy))
        main, side = {"left of": (right, down), "right of": (-right, down)}.get(
          spec.relation, (down if spec.relation == "above" else -down, right)
        )
        self.assertGreaterEqual(main / 4, 1.5)
        self.assertGreater(main, abs(side))

  def test_training_never_shows_held_out_combinations(self):
    scene = _draw("train")
    pairs = zip(scene.color.ravel(), scene.shape.ravel(), strict=True)
    shown = {(scenes.COLORS[c], scenes.SHAPES[s]) for c, s in pairs if s >= 0}
    self.assertEqual(len(shown), 15)
    self.assertFalse(shown & scene_prompts.HELD_COLOR_SHAPE)
    for caption in set(scene.caption):
      spec = scene_prompts.parse(caption)
      a, b = spec.objects[0], spec.objects[-1]
      self.assertNotIn(frozenset({a.color, b.color}), scene_prompts.HELD_COLOR_COUPLE, caption)
      if spec.task == "single_obj":
        self.assertNotIn((a.size, a.shape), scene_prompts.HELD_SIZE_SHAPE, caption)
      elif spec.task == "two_obj":
        self.assertNotIn((a.shape, b.shape), scene_prompts.HELD_TWO, caption)
      elif spec.task == "counting":
        count = scene_prompts.COUNTS[len(spec.objects) - 2]
        self.assertNotIn((count, a.shape), scene_prompts.HELD_COUNT_SHAPE, caption)
      elif spec.task == "position":
        self.assertNotIn((a.shape, spec.relation, b.shape), scene_prompts.HELD_POSITION, caption)

  def test_splits_share_no_caption_and_cover_every_task(self):
    train, unseen = set(_draw("train").caption), set(_draw("unseen").caption)
    self.assertFalse(train & unseen)
    for captions in (train, unseen):
      self.assertEqual({scene_prompts.parse(caption).task for caption in captions}, set(scenes.TASKS))
    everything = set(_draw("any", 40000).caption)
    self.assertTrue(train < everything and unseen < everything)

  def test_training_still_shows_every_part_of_a_held_out_combination(self):
    specs = [spec for spec in scene_prompts.specs() if spec.split == "train"]
    words = {task: {w for spec in specs if spec.task == task for w in spec.caption.split()} for task in scenes.TASKS}
    for spec in scene_prompts.specs():
      self.assertFalse(set(spec.caption.split()) - words[spec.task], spec.caption)

  def test_vocabulary(self):
    used = {word for spec in scene_prompts.specs() for word in spec.caption.split()}
    self.assertEqual(used, set(scenes.VOCABULARY))
    self.assertLen(scenes.VOCABULARY, len(used))
    self.assertEqual(max(len(spec.caption.split()) for spec in scene_prompts.specs()), scenes.MAX_WORDS)
    captions = [spec.caption for spec in scene_prompts.specs()]
    self.assertLen(set(captions), len(captions))

  def test_unknown_caption_offers_the_closest(self):
    with self.assertRaisesRegex(ValueError, "closest one is 'a red circle'"):
      scene_prompts.parse("a red circel")


class EvalPromptsTest(parameterized.TestCase):
  def test_seen_prompts_are_trained_and_unseen_are_not(self):
    trained = set(_draw("train", 40000).caption)
    seen = {prompt.caption for prompt in scenes.eval_prompts(60, "seen")}
    unseen = {prompt.caption for prompt in scenes.eval_prompts(60, "unseen")}
    self.assertFalse(unseen & trained)
    self.assertFalse(seen - {spec.caption for spec in scene_prompts.specs() if spec.split == "train"})
    self.assertGreater(len(seen & trained), 0.98 * len(seen))

  @parameterized.parameters("seen", "unseen")
  def test_even_and_deterministic(self, split):
    prompts = scenes.eval_prompts(40, split)
    self.assertEqual(prompts, scenes.eval_prompts(40, split))
    self.assertNotEqual(prompts, scenes.eval_prompts(40, split, seed=1))
    for task in scenes.TASKS:
      specs = [scene_prompts.parse(prompt.caption) for prompt in prompts if prompt.task == task]
      self.assertLen(specs, 40)
      groups = [spec.group for spec in specs]
      counts = [groups.count(group) for group in set(groups)]
      self.assertLessEqual(max(counts) - min(counts), 1)
      if task in ("counting", "position"):
        self.assertBetween(sum(bool(spec.objects[0].color) for spec in specs) / 40, 0.6, 0.8)

  def test_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, "split: got 'train'.*seen, unseen"):
      scenes.eval_prompts(3, "train")
    with self.assertRaisesRegex(ValueError, "per_task: got 0"):
      scenes.eval_prompts(0, "seen")


if __name__ == "__main__":
  absltest.main()
