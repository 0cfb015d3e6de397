"""The task `evaluate`, from a model on disk to a report."""

import dataclasses
import json
import os
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from configs import evaluate as evaluate_config
from elasticdit_jax.data.text import WordEncoder
from elasticdit_jax.evals import evaluate
from elasticdit_jax.interop import model_dir
from tests.evals import tiny_model


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class EvaluateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.enterContext(tempfile.TemporaryDirectory())
    self.workdir = f"{self.directory}/out"
    model = tiny_model.make((16,))
    model_dir.save(f"{self.directory}/run/model", model)
    encoder = WordEncoder(("cat", "dog"), 8, model.cfg.text_dim)
    model_dir.save(f"{self.directory}/pets", dataclasses.replace(model, encoder=encoder))

  def _config(self, **changes):
    config = evaluate_config.get_config("debug").copy_and_resolve_references()
    with config.unlocked():
      config.update(
        {"checkpoint": f"{self.directory}/run", "routes": "all", "steps": 1, "validation": 2, "pictures": 3}
      )
      config.update(changes)
    return config.lock()

  def _report(self):
    with open(f"{self.workdir}/report.json") as f:
      return json.load(f)

  def test_scenes(self):
    evaluate.run(self._config(), self.workdir)
    report = self._report()
    # Of the five routes those two whose VAE is there.
    self.assertEqual(list(report["routes"]), ["max-f16", "lite-f16"])
    for route in report["routes"].values():
      self.assertEqual(route["score"]["unseen"]["prompts"], 6)
      self.assertLen(route["loss_by_time"], 8)
      self.assertEqual(route["profile"]["steps"], 1)
    self.assertEqual(report["pictures"], ["images/routes.png"])
    self.assertLen(report["prompts"], 3)
    with open(f"{self.workdir}/report.md") as f:
      self.assertIn("lite-f16", f.read())

  def test_folder(self):
    os.makedirs(f"{self.directory}/pictures")
    for number, caption in enumerate(("cat", "a dog", "dog", "cat, dog") * 5):
      image = np.full((64, 64, 3), 10 * number, np.uint8)
      Image.fromarray(image).save(f"{self.directory}/pictures/{number}.png")
      with open(f"{self.directory}/pictures/{number}.txt", "w") as f:
        f.write(caption)
    data = {"source": "folder", "path": f"{self.directory}/pictures"}
    config = self._config(checkpoint=f"{self.directory}/pets", routes="lite-f16", data=data)
    evaluate.run(config, self.workdir)
    report = self._report()
    self.assertIsNone(report["routes"]["lite-f16"]["score"])
    self.assertGreater(report["routes"]["lite-f16"]["loss"], 0)
    self.assertContainsSubset(set(" ".join(report["prompts"]).split()), {"cat", "dog"})
    self.assertTrue(os.path.isfile(f"{self.workdir}/images/routes.png"))

  @parameterized.parameters(
    ({"checkpoint": "/nowhere"}, "no model.json in /nowhere"),
    ({"routes": "lite-f16,best"}, "unknown route 'best'"),
    ({"routes": "max-f8"}, "needs vae_f8.safetensors"),
    ({"per_task": -1}, "config.per_task: expected at least 0, got -1"),
    ({"steps": 0}, "steps: expected at least 1"),
    ({"data": {"source": "disk"}}, "unknown source 'disk'"),
  )
  def test_bad_input_writes_nothing(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      evaluate.run(self._config(**changes), self.workdir)
    self.assertFalse(os.path.exists(self.workdir))

  def test_the_workdir_of_a_training_run_is_left_alone(self):
    run = f"{self.directory}/run"
    with open(f"{run}/config.json", "w") as f:
      f.write("{}")
    with self.assertRaisesRegex(
      ValueError, "holds a training run, whose report would be lost; choose another --workdir"
    ):
      evaluate.run(self._config(), run)
    self.assertEqual(sorted(os.listdir(run)), ["config.json", "model"])

  def test_model_of_other_pictures_names_the_remedy(self):
    with self.assertRaisesRegex(ValueError, "--config.data.source=folder --config.data.path=DIR"):
      evaluate.run(self._config(checkpoint=f"{self.directory}/pets"), self.workdir)


if __name__ == "__main__":
  absltest.main()
