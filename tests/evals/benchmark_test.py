"""Benchmarks from a model on disk to folders that the official readers accept; interrupted, shared out, repeated."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
from absl import logging
from absl.testing import absltest, parameterized
from PIL import Image

from configs import evaluate as evaluate_config
from elasticdit_jax import distributed, generate
from elasticdit_jax.evals import benchmark, evaluate, layouts, preference
from elasticdit_jax.interop import model_dir
from tests.evals import official_readers, tiny_model

_CAPTIONS = ["a circle", "two squares", "a red circle", "a circle above a square", "a big circle"]
_ROWS = [{"tag": "single_object", "include": [{"class": "x", "count": 1}], "prompt": text} for text in _CAPTIONS]


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def _snapshot(root):
  return {str(p.relative_to(root)): p.read_bytes() for p in pathlib.Path(root).rglob("*") if p.is_file()}


class BenchmarkTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.shared = tempfile.TemporaryDirectory()
    cls.addClassCleanup(cls.shared.cleanup)
    cls.model = f"{cls.shared.name}/model"
    model_dir.save(cls.model, tiny_model.make((16,)))

  def setUp(self):
    super().setUp()
    self.directory = self.enterContext(tempfile.TemporaryDirectory())
    self.workdir = f"{self.directory}/out"
    self.prompts = f"{self.directory}/prompts.jsonl"
    with open(self.prompts, "w") as f:
      f.writelines(json.dumps(row) + "\n" for row in _ROWS)
    logging.set_verbosity(logging.ERROR)
    self.addCleanup(logging.set_verbosity, logging.INFO)

  def _config(self, name="geneval", **changes):
    config = evaluate_config.get_config(f"{name},debug").copy_and_resolve_references()
    config.update({"checkpoint": self.model, "routes": "lite-f16", "steps": 1, "batch_size": 4})
    config.update(changes)
    return config.lock()

  def _run(self, name="geneval", workdir=None, **changes):
    evaluate.run(self._config(name, **changes), workdir or self.workdir)

  @contextlib.contextmanager
  def _host(self, index, count):
    with contextlib.ExitStack() as stack:
      stack.enter_context(absltest.mock.patch.object(jax, "process_index", lambda: index))
      stack.enter_context(absltest.mock.patch.object(jax, "process_count", lambda: count))
      meet = absltest.mock.patch.object(distributed, "exchange", lambda name, value="", seconds=0: [value] * count)
      stack.enter_context(meet)
      yield

  def test_geneval_as_its_evaluator_reads_it(self):
    self._run(prompts=self.prompts, count=2, routes="all")
    self.assertContainsSubset(["lite-f16", "max-f16", "results", "benchmark.json"], os.listdir(self.workdir))
    judged = official_readers.geneval(f"{self.workdir}/lite-f16")
    self.assertCountEqual([prompt for (_, prompt), _ in judged], 2 * _CAPTIONS)
    self.assertLen({picture.tobytes() for _, picture in judged}, 10)
    self.assertEqual({picture.shape for _, picture in judged}, {(64, 64, 3)})

  def test_pictures_are_those_of_the_pipeline(self):
    self._run(prompts=self.prompts, count=1, guidance=2.0, seed=5)
    with Image.open(f"{self.workdir}/lite-f16/00002/samples/00000.png") as image:
      got = np.asarray(image)
    pipeline = generate.Pipeline.load(self.model, 4)
    first = layouts.noise_number("a red circle", 0)
    expected = pipeline(["a red circle"] * 4, "lite-f16", 1, 2.0, 5, first=first)[0]
    np.testing.assert_allclose(got.astype(int), expected, atol=1)

  def test_interrupted_or_shared_out_the_pictures_are_the_same(self):
    self._run(prompts=self.prompts, count=2)
    whole = _snapshot(self.workdir)
    self.assertEmpty([name for name in whole if "partial" in name])
    folders = f"{self.workdir}/lite-f16"
    shutil.rmtree(f"{folders}/00001")
    os.remove(f"{folders}/00003/samples/00001.png")
    with absltest.mock.patch.object(generate, "sample_images", wraps=generate.sample_images) as drawn:
      self._run(prompts=self.prompts, count=2)
    self.assertEqual(drawn.call_count, 2)  # of three batches
    self.assertEqual(_snapshot(self.workdir), whole)
    with self._host(1, 2), self.assertRaisesRegex(OSError, "on a disk that all hosts share"):
      self._run(prompts=self.prompts, count=2, workdir=f"{self.directory}/shared")
    for index in (0, 1):
      with self._host(index, 2):
        self._run(prompts=self.prompts, count=2, workdir=f"{self.directory}/shared")
    self.assertEqual(_snapshot(f"{self.directory}/shared"), whole)
    with absltest.mock.patch.object(jax, "local_devices", lambda: 3 * jax.devices()):
      self._run(prompts=self.prompts, count=2, workdir=f"{self.directory}/devices")
    self.assertEqual(_snapshot(f"{self.directory}/devices"), whole)

  def test_a_kill_between_two_files_leaves_nothing_for_the_evaluator_to_trip_over(self):
    replace, calls = os.replace, []

    def killed(source, target):
      calls.append(target)
      if len(calls) == 6:
        raise KeyboardInterrupt
      replace(source, target)

    with absltest.mock.patch.object(os, "replace", killed), self.assertRaises(KeyboardInterrupt):
      self._run(prompts=self.prompts, count=2)
    judged = official_readers.geneval(f"{self.workdir}/lite-f16")
    self.assertNotEmpty(judged)
    self.assertLess(len(judged), 10)
    self.assertEmpty([name for name in _snapshot(f"{self.workdir}/lite-f16") if "partial" in name])

  def test_the_seed_and_the_prompt_decide(self):
    self._run(prompts=self.prompts, count=1)
    other = f"{self.directory}/other"
    self._run(prompts=self.prompts, count=1, seed=1, workdir=other)
    name = "lite-f16/00000/samples/00000.png"
    self.assertNotEqual(_snapshot(self.workdir)[name], _snapshot(other)[name])

  def test_hpsv2(self):
    meta = f"{self.directory}/meta"
    os.makedirs(meta)
    for number, style in enumerate(layouts.STYLES):
      with open(f"{meta}/{style}.json", "w") as f:
        json.dump([_CAPTIONS[number], _CAPTIONS[4]], f)
    self._run("hpsv2", prompts=meta)
    judged = official_readers.hpsv2(f"{self.workdir}/lite-f16", meta)
    self.assertLen(judged, 8)
    same = [picture for caption, picture in judged if caption == _CAPTIONS[4]]
    self.assertLen({picture.tobytes() for picture in same}, 4)
    self._run("hpsv2", prompts=meta, count=2, workdir=f"{self.directory}/twice")
    for root in ("0", "1"):
      self.assertLen(official_readers.hpsv2(f"{self.directory}/twice/lite-f16/{root}", meta), 8)

  def test_dpg(self):
    self._run("dpg")
    questions = {f"scene{i:02d}" for i in range(12)}
    judged = official_readers.dpg(f"{self.workdir}/lite-f16", questions, 64)
    self.assertLen(judged, 48)
    self.assertLen({picture.tobytes() for _, picture in judged}, 48)

  def test_t2i_compbench(self):
    self._run("t2i_compbench", count=2)
    self.assertCountEqual(os.listdir(f"{self.workdir}/lite-f16"), layouts.CATEGORIES)
    judged = official_readers.t2i_compbench(f"{self.workdir}/lite-f16/color")
    found = [row.prompt for row in layouts.rows("t2i_compbench", "scenes") if row.group == "color"]
    self.assertEqual([prompt for prompt, _ in judged], [prompt for prompt in found for _ in range(2)])

  def test_a_workdir_belongs_to_one_way_of_drawing(self):
    self._run(prompts=self.prompts, count=1)
    with self.assertRaisesRegex(ValueError, r"holds pictures drawn otherwise \(settings in benchmark.json differ\)"):
      self._run(prompts=self.prompts, count=1, steps=2)
    with self.assertRaisesRegex(ValueError, r"drawn otherwise \(benchmark, prompts, pictures, settings in"):
      self._run("t2i_compbench")
    self._run(prompts=self.prompts, count=1, routes="max-f16")
    with open(f"{self.workdir}/benchmark.json") as f:
      self.assertCountEqual(json.load(f)["routes"], ["lite-f16", "max-f16"])

  def test_mistakes_write_nothing(self):
    with open(self.prompts, "a") as f:
      f.write(json.dumps(_ROWS[0] | {"prompt": "a photo of a dog"}) + "\n")
    for changes, message in (
      ({"prompts": self.prompts}, "config.prompts: .*prompts.jsonl:6: prompt 'a photo of a dog': unknown words"),
      ({"prompts": ""}, "config.prompts: expected the file evaluation_metadata.jsonl"),
      ({"routes": "max-f8"}, "max-f8"),
      ({"size": 50}, "size: 50x50"),
      ({"steps": 0}, "steps"),
      ({"name": "dpg", "batch_size": 3}, "config.batch_size: expected at least 4, the pictures of one file, got 3"),
      ({"models": "hps=x"}, "config.models: expected clip_score=DIRECTORY, .*, got 'hps=x'"),
      ({"models": "hps_v2=nowhere"}, "config.models: hps_v2: no directory 'nowhere'"),
      ({"benchmark": "geneval2"}, "config.benchmark: unknown benchmark 'geneval2'; there are geneval, hpsv2"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        self._run(**changes)
    self.assertFalse(os.path.exists(self.workdir))
    os.makedirs(self.workdir)
    pathlib.Path(self.workdir, "config.json").write_text("{}")
    with self.assertRaisesRegex(ValueError, "holds a training run; choose another --workdir"):
      self._run()

  def test_results_become_tables_when_the_command_runs_again(self):
    self._run(prompts=self.prompts, count=1)
    self.assertFalse(os.path.exists(f"{self.workdir}/tables.md"))
    with open(f"{self.workdir}/results/lite-f16/geneval.jsonl", "w") as f:
      f.writelines(json.dumps({"tag": "colors", "correct": bool(i % 4)}) + "\n" for i in range(8))
    self._run(prompts=self.prompts, count=1)
    text = pathlib.Path(self.workdir, "tables.md").read_text()
    self.assertRegex(text, r"\| lite-f16 \| 0.00% \| 64 \|.* 75.00% \| 75.00% \|\n")

  @parameterized.parameters(("hpsv2", 1), ("dpg", 4))
  def test_scores_of_preference_models(self, name, count):
    """A stand-in scores by the mean of the picture and the length of the prompt."""
    os.makedirs(f"{self.directory}/clip")
    calls = []

    def model(images, prompts):
      calls.append(len(images))
      return {"hps_v2": np.float32([image.mean() + len(prompt) for image, prompt in zip(images, prompts, strict=True)])}

    with absltest.mock.patch.object(preference, "load", lambda kind, directory: model):
      for _ in range(2):
        self._run(name, models=f"hps_v2={self.directory}/clip")
    self.assertEqual(sum(calls), 12 * count)  # and not again the second time
    with open(f"{self.workdir}/results/lite-f16/hps_v2.json") as f:
      result = json.load(f)
    expected = {}
    for cell in layouts.cells(name, layouts.rows(name, "scenes"), count):
      image = np.asarray(Image.open(f"{self.workdir}/lite-f16/{cell.file}"))
      place = os.path.basename(os.path.dirname(cell.file))
      expected.setdefault(place, []).append(image.mean() + len(cell.prompt))
    self.assertEqual(result["pictures"], 12 * count)
    self.assertEqual(set(result["folders"]), set(expected))
    for place, values in expected.items():
      self.assertAlmostEqual(result["folders"][place], np.mean(values), places=3)
    text = pathlib.Path(self.workdir, "tables.md").read_text()
    self.assertIn("Computed here, not by the original code", text)
    self.assertIn(f"{name} hps_v2 photo" if name == "hpsv2" else f"{name} hps_v2", text)
    self.assertIn(f" {result['mean']:.4f} |", text)

  def test_scores_wait_for_other_hosts(self):
    os.makedirs(f"{self.directory}/clip")
    load = absltest.mock.Mock(return_value=lambda images, prompts: {"hps_v2": np.zeros(len(images))})
    with absltest.mock.patch.object(preference, "load", load), self._host(0, 2):
      self._run(prompts=self.prompts, count=2, models=f"hps_v2={self.directory}/clip")
    self.assertEmpty(os.listdir(f"{self.workdir}/results/lite-f16"))

  def test_the_command_for_the_evaluator_is_shown(self):
    explained = layouts.BENCHMARKS["dpg"].command.format(root="r", results="s", size=64, count=4)
    self.assertIn("--image-root-path r --resolution 64 --pic-num 4", explained)
    with self.assertLogs(logging.get_absl_logger(), "INFO") as logs:
      benchmark._explain(self.directory, "lite-f16", "geneval", 64, 4)
      benchmark._explain(self.directory, "lite-f16", "hpsv2", 64, 2)
    self.assertIn(f"evaluate_images.py {self.directory}/lite-f16 --outfile", logs.output[0])
    for root, line in zip(("0", "1"), logs.output[1:], strict=True):
      self.assertIn(f"hpsv2.evaluate('{self.directory}/lite-f16/{root}', hps_version='v2.1')", line)


if __name__ == "__main__":
  absltest.main()
