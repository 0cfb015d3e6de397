"""Files that official evaluators write become the lines of the paper's tables."""

import json
import os
import pathlib
import tempfile

from absl import logging
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from elasticdit_jax.evals import benchmark_tables as tables

# Line "ElasticDiT-GRPO" of Table 1: right pictures of each task, of 553 prompts x 4.
_RIGHT = {
  "single_object": (319, 320),
  "two_object": (365, 396),
  "counting": (253, 320),
  "colors": (316, 376),
  "position": (83, 400),
  "color_attr": (264, 400),
}
_HPS = "-----------benchmark score ---------------- \n" + "".join(
  f"lite-f16 {style:<15} {score:.2f} \t 0.1234\n"
  for style, score in (("photo", 31.22), ("anime", 33.95), ("concept-art", 32.46), ("paintings", 32.63))
)
_DPG = (
  "1.png, 1.0, 0.5, 1.0, 1.0, 0.875\nModel: lite-f16\nL1 category scores:\n\tentity: 88.5\n\tglobal: 91.25\n"
  "L2 category scores:\n\tentity - whole: 88.5\nImage path: x\nSave results to: y\nDPG-Bench score: 83.125\n"
)


class TablesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    logging.set_verbosity(logging.ERROR)
    self.addCleanup(logging.set_verbosity, logging.INFO)

  def _write(self, name, text):
    path = self.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

  def _run(self, name, benchmark="geneval", route="lite-f16", weights="abcdef0123", size=1024):
    described = {
      "benchmark": benchmark,
      "weights": weights,
      "settings": {"size": size},
      "routes": {route: {"vae": 16, "blocks": 24, "sparsity": 0.8416}},
    }
    self._write(f"{name}/benchmark.json", json.dumps(described))
    return str(self.directory / name)

  def _geneval(self):
    lines = []
    for tag, (right, number) in _RIGHT.items():
      record = {"filename": "x", "tag": tag, "prompt": "p", "reason": "", "metadata": "{}", "details": "{}"}
      lines += [json.dumps(record | {"correct": i < right}) for i in range(number)]
    return "\n".join(lines) + "\n"

  def test_geneval_as_the_paper_counts_it(self):
    scores = tables.read_geneval(self._write("r.jsonl", self._geneval()))
    self.assertAlmostEqual(scores["two_object"], 0.9217, places=4)
    self.assertAlmostEqual(scores["overall"], 0.7362, places=4)

  @parameterized.parameters(1.0, 0.01, 100.0)
  def test_hpsv2_whatever_the_version_prints(self, factor):
    text = _HPS
    for score in ("31.22", "33.95", "32.46", "32.63"):
      text = text.replace(score, f"{float(score) * factor:.4f}")
    scores = tables.read_hpsv2(self._write("hps.txt", text))
    self.assertAlmostEqual(scores["photo"], 31.22, places=4)
    self.assertAlmostEqual(scores["average"], (31.22 + 33.95 + 32.46 + 32.63) / 4, places=4)

  def test_hpsv2_of_several_roots(self):
    scores = tables.read_hpsv2(self._write("hps.txt", "0 photo 30.00 \t 0.1\n1 photo 32.00 \t 0.1\n"))
    self.assertEqual(scores, {"photo": 31.0, "average": 31.0})

  def test_dpg(self):
    scores = tables.read_dpg(self._write("dpg.txt", _DPG))
    self.assertEqual(scores, {"entity": 88.5, "global": 91.25, "overall": 83.125})

  def test_t2i_compbench(self):
    self._write("color/annotation_blip/vqa_result.json", '[{"question_id": 0, "answer": "0.5000"}, {"answer": "0.25"}]')
    self._write("spatial/labels/annotation_obj_detection_2d/vqa_result.json", '[{"question_id": 1, "answer": 0.75}]')
    self.assertEqual(tables.read_t2i_compbench(self.directory), {"color": 0.375, "spatial": 0.75})
    self.assertEqual(tables.read_t2i_compbench(self.directory / "nothing"), {})

  def test_two_benchmarks_of_one_model_become_one_line(self):
    self._run("a")
    self._run("b", "hpsv2")
    self._write("a/results/lite-f16/geneval.jsonl", self._geneval())
    self._write("b/results/lite-f16/hpsv2.txt", _HPS)
    out = self.directory / "out"
    tables.run(ConfigDict({"runs": f"{self.directory}/a, {self.directory}/b"}), str(out))
    lines = (out / "tables.md").read_text().splitlines()
    self.assertLen(lines, 3)
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    # As printed in Table 1, columns in its order.
    expected = "lite-f16 84.16% 1024 31.22 33.95 32.46 32.63 32.56 92.17% 20.75% 99.69% 79.06% 66.00% 84.04% 73.62%"
    self.assertEqual(" ".join(cells), expected)
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    self.assertEqual(heads[3:8], [f"HPSv2.1 {c}" for c in ("Photo", "Animation", "Concept", "Paint", "Averaged")])
    self.assertEqual(heads[8:10] + heads[-1:], ["GenEval two_obj", "GenEval position", "GenEval Overall"])
    saved = json.loads((out / "tables.json").read_text())
    self.assertAlmostEqual(saved[0]["geneval"]["overall"], 0.7362, places=4)

  def test_other_weights_get_a_line_of_their_own_and_gaps_stay_open(self):
    runs = [self._run("a"), self._run("b", weights="ffffff0000")]
    self._write("a/results/lite-f16/dpg.txt", _DPG)
    self._write("b/results/lite-f16/hpsv2.txt", _HPS)
    results = tables.collect(runs)
    self.assertEqual([r.model for r in results], ["lite-f16 (abcdef)", "lite-f16 (ffffff)"])
    text = tables.text(results)
    self.assertIn("| lite-f16 (abcdef) | 84.16% | 1024 | – | – |", text)
    self.assertIn("| lite-f16 (abcdef) | 84.16% | 1024 | 88.50 | 91.25 | 83.12 |", text)

  @parameterized.parameters(
    (tables.read_geneval, "", "holds no records"),
    (tables.read_geneval, '{"tag": "colors"}\n', ":1: expected a record of evaluate_images.py"),
    (tables.read_geneval, "<html>\n", ":1: expected a record of evaluate_images.py"),
    (tables.read_geneval, '{"tag": "colors", "correct": "yes"}\n', ":1: expected a record"),
    (tables.read_hpsv2, "Traceback\n", "expected lines of hpsv2.evaluate like"),
    (tables.read_dpg, "1.png, 1.0, 1.0\n", "no line 'DPG-Bench score: ...'; the evaluation has not ended"),
  )
  def test_files_that_are_not_results(self, read, text, message):
    with self.assertRaisesRegex(ValueError, message):
      read(self._write("result", text))

  def test_directories_without_results(self):
    with self.assertRaisesRegex(ValueError, "config.runs: no .*benchmark.json"):
      tables.collect([self.directory])
    with self.assertRaisesRegex(ValueError, "config.runs: expected workdirs"):
      tables.run(ConfigDict({"runs": " "}), "out")
    run = self._run("a")
    with self.assertRaisesRegex(ValueError, "config.runs: no results of evaluators in "):
      tables.run(ConfigDict({"runs": run}), str(self.directory / "out"))
    self.assertFalse(os.path.exists(self.directory / "out"))
    self._write("a/lite-f16/color/annotation_blip/vqa_result.json", '{"answer": 1}')
    with self.assertRaisesRegex(ValueError, "vqa_result.json: expected a list of objects with 'answer'"):
      tables.collect([run])


if __name__ == "__main__":
  absltest.main()
