"""Prompts of alignment: mixture, held-out ones, files and what is wrong with them."""

import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from elasticdit_jax.data import scene_prompts
from elasticdit_jax.train import prompts

TASKS = "counting=7,position=5,color_attr=3,colors=1"


class ScenesTest(absltest.TestCase):
  def test_an_epoch_is_a_function_of_seed_and_number(self):
    found = prompts.scenes(TASKS, 0.15)
    self.assertEqual(found.draw(12, 3, 40), found.draw(12, 3, 40))
    self.assertNotEqual(found.draw(12, 3, 40), found.draw(12, 3, 41))
    self.assertNotEqual(found.draw(12, 3, 40), found.draw(12, 4, 40))

  def test_the_mixture_is_that_of_the_weights(self):
    found = prompts.scenes(TASKS, 0.15)
    drawn = [row for epoch in range(100) for row in found.draw(12, 0, epoch)]
    self.assertLen(drawn, 1200)
    share = {tag: sum(row.tag == tag for row in drawn) / 1200 for tag in found.weights}
    for tag, weight in {"counting": 7, "position": 5, "color_attr": 3, "colors": 1}.items():
      self.assertAlmostEqual(share[tag], weight / 16, delta=0.02)
    for epoch in range(5):
      texts = [row.text for row in found.draw(12, 0, epoch)]
      self.assertLen(set(texts), 12)

  def test_neither_held_out_nor_unseen_combinations_are_drawn(self):
    found = prompts.scenes(TASKS, 0.15)
    drawn = {row.text for epoch in range(300) for row in found.draw(16, 0, epoch)}
    held = {row.text for row in found.held_out}
    self.assertEmpty(drawn & held)
    self.assertEqual({scene_prompts.parse(text).split for text in drawn | held}, {"train"})
    self.assertLen({row.tag for row in found.held_out[:4]}, 4)
    self.assertEqual(found.held_out, prompts.scenes(TASKS, 0.15).held_out)
    self.assertEqual(found.held_out[0].metadata["tag"], found.held_out[0].tag)

  def test_more_than_a_tag_has_repeats_it(self):
    found = prompts.scenes("single_obj=1", 0.2)
    count = len(found.training["single_obj"])
    self.assertLen({row.text for row in found.draw(count + 2, 0, 0)}, count)


class FileTest(parameterized.TestCase):
  def _file(self, text):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / "prompts.txt"
    path.write_text(text)
    return str(path)

  def test_lines_and_json_lines(self):
    row = {"prompt": "a blue square", "tag": "colors", "include": [{"class": "square", "count": 1}]}
    path = self._file(f"a red circle\ntwo squares\n{json.dumps(row)}\n{json.dumps(row | {'prompt': 'a red square'})}\n")
    found = prompts.from_file(path, "", 0.5)
    self.assertEqual(found.weights, {"all": 2.0, "colors": 2.0})
    rows = [r for group in found.training.values() for r in group] + list(found.held_out)
    self.assertLen(rows, 4)
    self.assertIn(row, [r.metadata for r in rows])
    self.assertEqual(prompts.from_file(path, "colors=2", 0.5).weights, {"colors": 2.0})

  @parameterized.parameters(
    ("a red circle\n\ntwo squares\n", r"prompts.txt:2: expected a prompt, .* got ''; remove the line"),
    ("a red circle\nA  red circle!\n", r"prompts.txt:2: the prompt of line 1 again; remove one"),
    ('{"prompt": "a"\n', r"prompts.txt:1: no JSON"),
    ('{"prompt": "a", "weight": NaN}\n', r"prompts.txt:1: no JSON \(NaN is no number of JSON\)"),
    ("", "prompts.txt is empty; expected one prompt a line"),
    ('{"text": "a"}\n', r"prompts.txt:1: expected a prompt, or JSON with a field 'prompt'"),
    ("a red circle\n", r"1 prompts of 'all' are too few to hold 0.5 out"),
  )
  def test_bad_files_are_explained(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      prompts.from_file(self._file(text), "", 0.5)

  @parameterized.parameters(
    ("counting=7,position=5,counting=1", "expected each task once, of .*counting.*, got 'counting=1'"),
    ("counts=7", "expected each task once, of .*counting.*, got 'counts=7'"),
    ("counting=-1", "counting: expected a weight of at least 0 like counting=1, got '-1'"),
    ("counting", "counting: expected a weight"),
    ("counting=0", "expected a weight above 0"),
  )
  def test_bad_weights_are_explained(self, weights, message):
    with self.assertRaisesRegex(ValueError, f"config.prompts.tasks: {message}"):
      prompts.scenes(weights, 0.15)

  def test_without_weights_hard_tasks_come_often(self):
    found = prompts.scenes("", 0.15)
    self.assertCountEqual(found.weights, scene_prompts.TASKS)
    self.assertEqual(max(found.weights, key=found.weights.get), "counting")

  def test_bad_share(self):
    with self.assertRaisesRegex(ValueError, "config.prompts.held_out: expected a share above 0 and below 1, got 0"):
      prompts.scenes(TASKS, 0.0)


if __name__ == "__main__":
  absltest.main()
