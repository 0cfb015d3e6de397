import collections
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.data import folder, pipeline, scene_prompts, scenes, text
from elasticdit_jax.types import Batch
from tests.data import pictures

SCENES = pipeline.ScenesSource(seed=3, size=32)
ENCODER = text.WordEncoder(scenes.VOCABULARY, scenes.MAX_WORDS, 16)
NUMBERS = text.WordEncoder(("number", *map(str, range(40))), 8, 16)


def take(source, encoder, steps: int, **options) -> list[Batch]:
  defaults = {"batch_size": 8, "seed": 1, "threads": 0}
  with pipeline.make_batches(source, encoder, **{**defaults, **options}) as batches:
    return [next(batches) for _ in range(steps)]


def joined(parts: list[Batch]) -> Batch:
  """The global batch from the shares of all hosts."""
  text_parts = [part.text for part in parts]
  return Batch(
    image=np.concatenate([part.image for part in parts]),
    text=text.Text(
      embedding=np.concatenate([t.embedding for t in text_parts]), mask=np.concatenate([t.mask for t in text_parts])
    ),
    bad=np.concatenate([part.bad for part in parts]),
  )


class PipelineTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pictures.new_folder(self)
    pictures.write_folder(self.path, 12)
    self.folder = folder.FolderSource(self.path, 32)
    self.sources = {
      "scenes": (SCENES, ENCODER),
      "folder": (self.folder, NUMBERS),
      "mix": (pipeline.Mix((self.folder, SCENES), (8, 2)), text.WordEncoder(NUMBERS.words + ENCODER.words, 8, 16)),
    }

  def assert_same(self, got: Batch, want: Batch) -> None:
    np.testing.assert_array_equal(got.image, want.image)
    np.testing.assert_array_equal(got.text.embedding, want.text.embedding)
    np.testing.assert_array_equal(got.text.mask, want.text.mask)
    np.testing.assert_array_equal(got.bad, want.bad)

  @parameterized.parameters("scenes", "folder", "mix")
  def test_batches_are_valid_numpy(self, kind):
    (batch,) = take(*self.sources[kind], 1)
    batch.validate()
    self.assertIsInstance(batch.image, np.ndarray)
    self.assertEqual(batch.image.shape, (8, 32, 32, 3))
    self.assertEqual((batch.bad.dtype, batch.bad.sum()), (np.int32, 0))
    self.assertGreater(batch.text.mask.sum(), 8)

  @parameterized.parameters("scenes", "folder", "mix")
  def test_threads_and_start_step_change_nothing(self, kind):
    whole = take(*self.sources[kind], 7)
    for start, threads in ((0, 3), (5, 0), (4, 2)):
      later = take(*self.sources[kind], 7 - start, start_step=start, threads=threads)
      for got, want in zip(later, whole[start:], strict=True):
        self.assert_same(got, want)

  @parameterized.parameters("scenes", "folder", "mix")
  def test_hosts_share_one_global_batch(self, kind):
    whole = take(*self.sources[kind], 3, caption_dropout=0.5)
    for hosts in (2, 4):
      shares = [take(*self.sources[kind], 3, caption_dropout=0.5, host_index=h, host_count=hosts) for h in range(hosts)]
      for step in range(3):
        self.assert_same(joined([share[step] for share in shares]), whole[step])

  @parameterized.parameters("scenes", "folder", "mix")
  def test_seeds_and_steps_differ(self, kind):
    first, second = take(*self.sources[kind], 2)
    (other,) = take(*self.sources[kind], 1, seed=2)
    self.assertFalse(np.array_equal(first.image, second.image))
    self.assertFalse(np.array_equal(first.image, other.image))

  def test_far_steps_cost_nothing(self):
    (batch,) = take(SCENES, ENCODER, 1, start_step=10_000_000)
    batch.validate()

  def test_scenes_are_those_of_the_renderer(self):
    (batch,) = pipeline.validation_batch(SCENES, ENCODER, 6, 1)
    made = scenes.render(np.arange(6), seed=3, size=32)
    np.testing.assert_array_equal(batch.image, made.image)
    np.testing.assert_array_equal(batch.text.embedding, ENCODER.encode(made.caption).embedding)

  def test_every_epoch_shows_each_picture_once_in_another_order(self):
    batches = take(self.folder, NUMBERS, 4, batch_size=6, caption_dropout=0.0)
    keys = [[image.tobytes() for image in batch.image] for batch in batches]
    self.assertLen(set(keys[0] + keys[1]), 12)
    self.assertEqual(set(keys[0] + keys[1]), set(keys[2] + keys[3]))
    self.assertNotEqual(keys[0] + keys[1], keys[2] + keys[3])

  def test_images_and_captions_stay_together(self):
    (batch,) = take(self.folder, NUMBERS, 1, caption_dropout=0.0)
    known = {self.folder[i][0].tobytes(): NUMBERS.encode([self.folder[i][1]]).embedding[0] for i in range(12)}
    for image, embedding in zip(batch.image, batch.text.embedding, strict=True):
      np.testing.assert_array_equal(known[image.tobytes()], embedding)

  def test_caption_dropout(self):
    kept = np.concatenate([b.text.mask.any(1) for b in take(SCENES, ENCODER, 40, batch_size=32, caption_dropout=0.25)])
    self.assertBetween(kept.mean(), 0.70, 0.80)
    self.assertTrue(np.concatenate([b.text.mask.any(1) for b in take(SCENES, ENCODER, 5, caption_dropout=0.0)]).all())
    self.assertFalse(take(SCENES, ENCODER, 1, caption_dropout=1.0)[0].text.mask.any())

  def test_mix_keeps_its_proportions(self):
    source, encoder = self.sources["mix"]
    number = text.word_vector("number", 16)
    real = [b.text.embedding[:, 0] == number for b in take(source, encoder, 5, batch_size=10, caption_dropout=0.0)]
    np.testing.assert_array_equal([r.all(1).sum() for r in real], [8] * 5)

  def test_rare_words_of_people_are_left_out(self):
    encoder = text.WordEncoder(("number",), 8, 16)
    (batch,) = take(self.folder, encoder, 1, caption_dropout=0.0)
    np.testing.assert_array_equal(batch.text.mask.sum(1), 1)
    with self.assertRaisesRegex(ValueError, "unknown words"):
      take(SCENES, encoder, 1)

  def test_broken_pictures_are_counted(self):
    pictures.truncate(os.path.join(self.path, "004.png"))
    source = folder.FolderSource(self.path, 32, max_bad_fraction=0.2)
    batches = take(source, NUMBERS, 2, batch_size=12)
    self.assertEqual([b.bad.sum() for b in batches], [1, 1])
    self.assertEqual(next(b.image for b in batches).shape, (12, 32, 32, 3))

  @parameterized.parameters(0, 2)
  def test_too_many_broken_pictures_end_the_stream(self, threads):
    source = folder.FolderSource(self.path, 32)
    pictures.truncate(os.path.join(self.path, "004.png"))
    with self.assertRaisesRegex(ValueError, "1 of 12"):
      take(source, NUMBERS, 2, batch_size=12, threads=threads)

  def test_validation_is_fixed_and_wraps(self):
    one, two = (pipeline.validation_batch(self.folder, NUMBERS, 8, 2) for _ in range(2))
    for got, want in zip(one, two, strict=True):
      self.assert_same(got, want)
    np.testing.assert_array_equal(one[1].image[4], one[0].image[0])
    self.assertTrue(one[0].text.mask.any(1).all())

  def test_step_is_where_to_resume(self):
    with pipeline.make_batches(SCENES, ENCODER, batch_size=4, seed=0, start_step=3) as batches:
      next(batches)
      self.assertEqual(batches.step, 4)

  @parameterized.parameters(
    ({"batch_size": 6, "host_count": 4}, "multiple of the 4 hosts"),
    ({"batch_size": 0}, "data.batch_size"),
    ({"host_count": 2, "host_index": 2}, "host_index"),
    ({"caption_dropout": 1.1}, "data.caption_dropout"),
    ({"start_step": -1}, "start_step"),
  )
  def test_arguments_out_of_range(self, options, pattern):
    with self.assertRaisesRegex(ValueError, pattern):
      take(SCENES, ENCODER, 1, **options)

  def test_mix_needs_weights_and_one_size(self):
    with self.assertRaisesRegex(ValueError, "Mix.weights"):
      pipeline.Mix((SCENES, self.folder), (1.0,))
    with self.assertRaisesRegex(ValueError, "Mix.sources.*one size"):
      pipeline.Mix((SCENES, folder.FolderSource(self.path, 16)), (1.0, 1.0))


class SourceFromConfigTest(parameterized.TestCase):
  def config(self, **changes):
    fields = {
      "source": "scenes",
      "path": "",
      "size": 32,
      "caption_field": "text",
      "seed": 0,
      "batch_size": 4,
      "caption_dropout": 0.1,
      "max_bad_fraction": 0.05,
      "text_length": 8,
      "text_dim": 16,
      "max_words": 30,
      "split": "train",
    }
    return types.SimpleNamespace(**{**fields, **changes})

  def test_scenes(self):
    train, validation, encoder = pipeline.source_from_config(self.config())
    self.assertEqual(encoder.words, tuple(scenes.VOCABULARY))
    self.assertEqual([train.split, validation.split], ["train", "train"])
    (one,) = pipeline.validation_batch(train, encoder, 4, 1)
    (two,) = pipeline.validation_batch(validation, encoder, 4, 1)
    self.assertFalse(np.array_equal(one.image, two.image))

  def test_tasks_weigh_training_alone(self):
    train, validation, _ = pipeline.source_from_config(self.config(tasks="counting=3,colors=1"))
    _, captions, _ = train.read(np.arange(400))
    found = collections.Counter(scene_prompts.parse(caption).task for caption in captions)
    self.assertEqual(set(found), {"counting", "colors"})
    self.assertAlmostEqual(found["counting"] / 400, 0.75, delta=0.1)
    self.assertEqual(validation.task_weights, scenes.TASK_WEIGHTS)

  def test_folder(self):
    path = pictures.new_folder(self)
    pictures.write_folder(path, 40)
    train, validation, encoder = pipeline.source_from_config(self.config(source="folder", path=path))
    self.assertEqual((len(train), len(validation)), (36, 4))
    self.assertLen(encoder.words, 30)
    take(train, encoder, 1)

  def test_folder_without_captions(self):
    path = pictures.new_folder(self)
    for i in range(4):
      pictures.picture(i).save(os.path.join(path, f"{i}.png"))
    config = self.config(source="folder", path=path, caption_field="")
    train, validation, encoder = pipeline.source_from_config(config)
    self.assertEqual((len(train), len(validation)), (3, 1))
    self.assertFalse(take(train, encoder, 1)[0].text.mask.any())

  def test_captions_without_a_word(self):
    path = pictures.new_folder(self)
    pictures.picture(0).save(os.path.join(path, "a.png"))
    with open(os.path.join(path, "a.txt"), "w") as f:
      f.write("!!!")
    with self.assertRaisesRegex(ValueError, f"^data.path: {path}: captions: expected at least one word"):
      pipeline.source_from_config(self.config(source="folder", path=path))

  @parameterized.parameters(
    ({"source": "web"}, "data.source: unknown source 'web'; expected one of scenes, folder"),
    ({"source": "folder"}, "data.path: .*--config.data.path="),
    ({"source": "folder", "path": "/nowhere"}, "data.path: no folder /nowhere"),
    ({"path": "/pictures"}, "data.path: source 'scenes' reads no folder, got '/pictures'; add --config.data.source="),
    ({"size": 33}, "^data.size: got 33"),
    ({"split": "test"}, "^data.split: got 'test'"),
    ({"tasks": "counts=1"}, "^data.tasks: expected each task once, of single_obj.*, got 'counts=1'"),
    ({"text_length": 2}, "data.text_length"),
  )
  def test_mistakes(self, changes, pattern):
    with self.assertRaisesRegex(ValueError, pattern):
      pipeline.source_from_config(self.config(**changes))


SCRIPT = """
import signal, sys
from elasticdit_jax.data import pipeline, scenes, text
encoder = text.WordEncoder(scenes.VOCABULARY, scenes.MAX_WORDS, 16)
batches = pipeline.make_batches(pipeline.ScenesSource(0, 32), encoder, batch_size=4, seed=0)
print(next(batches).image.shape, flush=True)
while sys.argv[1] == "forever":
  next(batches)
"""


class ShutdownTest(absltest.TestCase):
  """An open stream, its threads at work, must not keep the process alive. Flags are not parsed, as in a notebook."""

  def run_script(self, mode: str, interrupt: bool) -> int:
    process = subprocess.Popen(
      [sys.executable, "-c", SCRIPT, mode],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      # Where the tests run in the background of a script, Ctrl-C is ignored, and children inherit that.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    self.addCleanup(process.stdout.close)
    self.addCleanup(process.kill)
    self.assertIn("(4, 32, 32, 3)", process.stdout.readline())
    if interrupt:
      time.sleep(0.2)
      process.send_signal(signal.SIGINT)
    return process.wait(timeout=60)

  def test_ends_by_itself(self):
    self.assertEqual(self.run_script("once", interrupt=False), 0)

  def test_ctrl_c(self):
    self.assertIn(self.run_script("forever", interrupt=True), (1, -signal.SIGINT))


if __name__ == "__main__":
  absltest.main()
