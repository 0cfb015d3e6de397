"""Prompts of GenEval's grammar: sentences, metadata, and what is held out."""

import json
import os
import tempfile

from absl.testing import absltest, parameterized

from elasticdit_jax.data import geneval_prompts as gp

# One line of each task as the original test file has it.
_OFFICIAL = [
  '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
  '{"tag": "two_object", "include": [{"class": "toothbrush", "count": 1}, {"class": "snowboard", "count": 1}], '
  '"prompt": "a photo of a toothbrush and a snowboard"}',
  '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], '
  '"prompt": "a photo of two clocks"}',
  '{"tag": "colors", "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}], '
  '"prompt": "a photo of a blue fire hydrant"}',
  '{"tag": "position", "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, '
  '"position": ["right of", 0]}], "prompt": "a photo of a dog right of a teddy bear"}',
  '{"tag": "color_attr", "include": [{"class": "wine glass", "count": 1, "color": "purple"}, {"class": "apple", '
  '"count": 1, "color": "black"}], "prompt": "a photo of a purple wine glass and a black apple"}',
]


class GenerateTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.all = {json.dumps(row) for row in gp.generate(7000, 0)}

  @parameterized.parameters(_OFFICIAL[:4])
  def test_the_original_lines_are_among_all_of_a_task(self, line):
    self.assertIn(line, self.all)

  @parameterized.parameters(_OFFICIAL[4:])
  def test_lines_of_the_big_tasks(self, line):
    """Byte for byte, found by their number instead of by writing all half million."""
    size, make = gp._GRAMMAR[json.loads(line)["tag"]]
    step = 78 * 79 if "color_attr" in line else 79 * 80
    names = gp._COLORED if "color_attr" in line else gp.CLASSES
    row = json.loads(line)
    first, second = (o["class"] for o in (row["include"] if "color_attr" in line else row["include"][::-1]))
    pair = next(n for n in range(step) if gp._pair(n, names) == (first, second))
    self.assertIn(line, {json.dumps(make(n)) for n in range(pair, size, step)})

  def test_sizes_articles_and_plurals(self):
    rows = [json.loads(line) for line in self.all]
    count = {tag: sum(row["tag"] == tag for row in rows) for tag in gp.TAGS}
    expected = {"single_object": 80, "two_object": 6320, "counting": 240, "colors": 790}
    self.assertEqual(count, expected | {"position": 7000, "color_attr": 7000})
    prompts = {row["prompt"] for row in rows}
    self.assertLen(prompts, len(rows))
    for prompt in ("a photo of an orange orange", "a photo of four buses", "a photo of three hot dogs"):
      self.assertIn(prompt, prompts)
    self.assertFalse([row for row in rows if "color" in str(row) and "person" in str(row)])
    for row in rows:
      colors = [o["color"] for o in row["include"] if "color" in o]
      self.assertLen(set(colors), len(colors))

  def test_the_same_seed_gives_the_same_and_another_others(self):
    self.assertEqual(gp.generate(5, 3), gp.generate(5, 3))
    self.assertNotEqual(gp.generate(5, 3), gp.generate(5, 4))
    self.assertLen(gp.generate(5, 3), 30)

  def test_held_out_content_does_not_return_in_another_order(self):
    held = [json.loads(line) for line in _OFFICIAL]
    rows = gp.generate(25_280, 0, held[:5])
    self.assertLen(rows, 79 + (6320 - 2) + 239 + 789 + (25280 - 4) + 25280)
    prompts = {row["prompt"] for row in rows}
    for gone in (
      "a photo of a bench",
      "a photo of a snowboard and a toothbrush",
      "a photo of a toothbrush and a snowboard",
      "a photo of a dog left of a teddy bear",
      "a photo of a dog right of a teddy bear",
      "a photo of a teddy bear left of a dog",
      "a photo of a teddy bear right of a dog",
    ):
      self.assertNotIn(gone, prompts)
    for there in (
      "a photo of a dog above a teddy bear",
      "a photo of three clocks",
      "a photo of a green fire hydrant",
    ):
      self.assertIn(there, prompts)

  def test_colours_belong_to_their_objects(self):
    row = json.loads(_OFFICIAL[5])
    glass, apple = row["include"]
    same = row | {"include": [apple, glass]}
    other = row | {"include": [glass | {"color": "black"}, apple | {"color": "purple"}]}
    self.assertEqual(gp.content(row), gp.content(same))
    self.assertNotEqual(gp.content(row), gp.content(other))

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, "per_task: expected at least 1, got 0"):
      gp.generate(0, 0)
    with self.assertRaisesRegex(ValueError, "seed: expected 0 or more, got -1"):
      gp.generate(1, -1)
    with self.assertRaisesRegex(ValueError, "expected a list 'include' of objects with 'class'"):
      gp.generate(1, 0, [{"tag": "colors", "prompt": "a photo"}])


class FileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "prompts.jsonl")

  def test_round_trip(self):
    rows = gp.generate(3, 0)
    gp.save(self.path, rows)
    self.assertEqual(gp.read(self.path), rows)

  @parameterized.parameters(
    ("", "prompts.jsonl:2: expected a JSON object, got ''; remove the line"),
    ("a dog", "prompts.jsonl:2: expected a JSON object, got 'a dog'"),
    ('{"tag": "colors"}', "prompts.jsonl:2: expected an object with a field 'prompt'"),
    ('{"prompt": " "}', "prompts.jsonl:2: expected an object with a field 'prompt'"),
    ('{"prompt": "x"}', "prompts.jsonl:2: expected a field 'tag' like one of single_object"),
    ('{"prompt": "x", "tag": "colors", "include": 3}', "prompts.jsonl:2: .*a list 'include'"),
  )
  def test_bad_lines(self, line, message):
    with open(self.path, "w") as f:
      f.write("\n".join([_OFFICIAL[0], line, _OFFICIAL[1]]))
    with self.assertRaisesRegex(ValueError, message):
      gp.read(self.path)


if __name__ == "__main__":
  absltest.main()
