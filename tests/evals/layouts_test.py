"""Layouts of benchmarks: prompts as their authors publish them, and every mistake in them named."""

import collections
import json
import os
import tempfile

from absl import logging
from absl.testing import absltest, parameterized

from elasticdit_jax.data import geneval_prompts
from elasticdit_jax.evals import layouts


class LayoutsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.enterContext(tempfile.TemporaryDirectory())
    logging.set_verbosity(logging.ERROR)
    self.addCleanup(logging.set_verbosity, logging.INFO)

  def _write(self, name, text):
    path = os.path.join(self.directory, name)
    with open(path, "w") as f:
      f.write(text if isinstance(text, str) else json.dumps(text))
    return path

  def _files(self, name, path, count):
    return [cell.file for cell in layouts.cells(name, layouts.rows(name, path), count)]

  def test_geneval(self):
    rows = geneval_prompts.generate(1, 0)
    path = os.path.join(self.directory, "evaluation_metadata.jsonl")
    geneval_prompts.save(path, rows)
    cells = layouts.cells("geneval", layouts.rows("geneval", path), 2)
    self.assertEqual([c.file for c in cells[:3]], [f"0000{i}/samples/0000{k}.png" for i, k in ((0, 0), (0, 1), (1, 0))])
    self.assertLen(cells, 12)
    self.assertEqual(json.loads(cells[3].beside["00001/metadata.jsonl"]), rows[1])
    self.assertEqual([c.prompt for c in cells], [row["prompt"] for row in rows for _ in range(2)])

  def test_hpsv2_once_and_nine_times(self):
    for style in layouts.STYLES:
      self._write(f"{style}.json", [f"{style} one", "two"])
    self._write("drawbench.json", ["not a style"])
    files = self._files("hpsv2", self.directory, 1)
    self.assertEqual(files, [f"{style}/0000{i}.jpg" for style in layouts.STYLES for i in range(2)])
    nine = self._files("hpsv2", self.directory, 9)
    self.assertEqual(nine[8:10], ["8/anime/00000.jpg", "0/anime/00001.jpg"])
    self.assertLen(nine, 72)

  def test_hpsv2_without_styles(self):
    self._write("test.json", ["one"])
    self.assertEqual(self._files("hpsv2", self.directory, 1), ["test/00000.jpg"])

  def test_dpg(self):
    self._write("256.txt", "a red truck\non the sand\n")
    self._write("partiprompts7.txt", "a dog")
    rows = layouts.rows("dpg", self.directory)
    self.assertEqual([row.prompt for row in rows], ["a red truck on the sand", "a dog"])
    cells = layouts.cells("dpg", rows, 4)
    self.assertEqual([c.file for c in cells], ["256.png", "partiprompts7.png"])
    self.assertEqual(cells[0].numbers, (0, 1, 2, 3))

  def test_t2i_compbench(self):
    self._write("color_val.txt", "a red apple and a blue vase\tseen\nIt reads 11:44.\n")
    self._write("complex_val.txt", "The cat, asleep.\n")
    files = self._files("t2i_compbench", self.directory, 10)
    self.assertEqual(files[0], "color/samples/a red apple and a blue vase_000000.png")
    self.assertEqual(files[10], "color/samples/It reads 11:44._000010.png")
    self.assertEqual(files[29], "complex/samples/The cat, asleep._000009.png")

  def test_prompts_given_twice_get_noise_of_their_own(self):
    path = self._write("color_val.txt", "a dog\na cat\na dog\n")
    cells = layouts.cells("t2i_compbench", layouts.rows("t2i_compbench", os.path.dirname(path)), 2)
    self.assertEqual([c.numbers for c in cells], [(0,), (1,), (0,), (1,), (2,), (3,)])
    self.assertLen({c.file for c in cells}, 6)

  def test_noise_is_a_function_of_prompt_and_number(self):
    numbers = {layouts.noise_number(p, k) for p in ("a dog", "a cat", "1\na dog") for k in range(50)}
    self.assertLen(numbers, 150)
    self.assertTrue(all(0 <= n < 2**31 for n in numbers))
    self.assertEqual(layouts.noise_number("a dog", 3), 1742659590)

  @parameterized.parameters(*layouts.BENCHMARKS)
  def test_scenes_try_every_layout(self, name):
    found = layouts.rows(name, layouts.SCENES)
    files = [cell.file for cell in layouts.cells(name, found, layouts.BENCHMARKS[name].count)]
    self.assertLen(files, 12 * layouts.BENCHMARKS[name].count // (4 if name == "dpg" else 1))
    self.assertLen(set(files), len(files))

  def test_scenes_metadata_reads_like_a_prompt(self):
    found = {row.metadata["tag"]: row for row in layouts.rows("geneval", layouts.SCENES)}
    self.assertLen(found, 6)
    self.assertGreater(found["counting"].metadata["include"][0]["count"], 1)
    reference, subject = found["position"].metadata["include"]
    relation, target = subject["position"]
    words = f"{subject['class']} {relation} "
    self.assertIn(words, found["position"].prompt)
    self.assertTrue(found["position"].prompt.endswith(reference["class"]))
    self.assertEqual(target, 0)
    self.assertEqual(collections.Counter(len(o) for o in found["color_attr"].metadata["include"]), {3: 2})

  @parameterized.parameters(
    ("geneval", "x.jsonl", "", "config.prompts: .*x.jsonl holds no prompts, expected the file evaluation_metadata"),
    ("geneval", "x.jsonl", "\n", r"x.jsonl:1: expected a JSON object, got ''"),
    ("hpsv2", "photo.json", "{}", "photo.json: expected a list of prompts"),
    ("hpsv2", "photo.json", "[", "photo.json is no JSON"),
    ("hpsv2", "photo.json", '["a dog", ""]', "photo.json, entry 1: expected a prompt, got ''; remove it"),
    ("dpg", "1.txt", " \n", "1.txt: expected a prompt, got ''"),
    ("dpg", "1.2.txt", "a dog", "1.2.txt: the evaluator cuts names at the first dot; rename the file"),
    ("dpg", "readme.md", "a dog", "holds no prompts, expected the directory dpg_bench/prompts"),
    ("t2i_compbench", "color_val.txt", "a dog\n\na cat", "color_val.txt:2: expected a prompt, got ''"),
    (
      "t2i_compbench",
      "color_val.txt",
      "a dog_cat",
      "color_val.txt:1: a prompt is part of a file name there: .* no '_'",
    ),
    ("t2i_compbench", "color_val.txt", "a" * 245, "color_val.txt:1: .* at most 255 bytes"),
  )
  def test_mistakes_are_named(self, name, file, text, message):
    path = self._write(file, text)
    with self.assertRaisesRegex(ValueError, message):
      layouts.rows(name, path if name == "geneval" else self.directory)

  def test_geneval_refuses_a_prompt_twice(self):
    row = json.dumps(geneval_prompts.generate(1, 0)[0])
    path = self._write("x.jsonl", f"{row}\n{row}\n")
    with self.assertRaisesRegex(ValueError, "x.jsonl:2: the prompt of .*x.jsonl:1 again; remove one"):
      layouts.rows("geneval", path)

  def test_missing_prompts_and_counts(self):
    with self.assertRaisesRegex(ValueError, "config.prompts: expected the file evaluation_metadata.jsonl, got ''; "):
      layouts.rows("geneval", "")
    with self.assertRaisesRegex(ValueError, "config.count: dpg: expected one of 1, 4 pictures per prompt, got 3"):
      layouts.cells("dpg", [], 3)
    with self.assertRaisesRegex(ValueError, "config.count: geneval: expected at least 1 pictures per prompt, got -1"):
      layouts.cells("geneval", [], -1)


if __name__ == "__main__":
  absltest.main()
