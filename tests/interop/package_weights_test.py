"""Collecting runs into one directory, and the directory inside the package: it loads, is small, and draws."""

import dataclasses
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.data import scenes
from elasticdit_jax.evals import scenes_score
from elasticdit_jax.generate import Pipeline
from elasticdit_jax.interop import model_dir, package_weights
from elasticdit_jax.models.codec import to_uint8
from elasticdit_jax.types import to_float
from tests.evals import tiny_model

_SHIPPED = pathlib.Path(package_weights.__file__).parent.parent / "weights" / "tiny"


class PackageTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.enterContext(tempfile.TemporaryDirectory())
    self.out = f"{self.directory}/out"
    self.model = tiny_model.make()
    for factor, codec in self.model.codecs.items():
      model_dir.save_codecs(f"{self.directory}/f{factor}", {factor: codec})

  def test_vaes_first_and_the_backbone_later(self):
    vaes = [f"{self.directory}/f8", f"{self.directory}/f16"]
    package_weights.package(self.out, vaes)
    self.assertEqual(set(model_dir.load_codecs(self.out)), {8, 16})
    model_dir.save(f"{self.directory}/run/model", dataclasses.replace(self.model, codecs={8: self.model.codecs[8]}))
    size = package_weights.package(self.out, vaes, f"{self.directory}/run", "float16")
    loaded = model_dir.load(self.out)
    self.assertEqual(set(loaded.codecs), {8, 16})
    self.assertEqual(loaded.routes, self.model.routes)
    self.assertEqual(size, sum(f.stat().st_size for f in pathlib.Path(self.out).iterdir()))
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(self.model.params), strict=True):
      np.testing.assert_array_equal(a, np.float32(np.float16(b)))

  def test_a_folder_of_something_else_stays_as_it_is(self):
    pathlib.Path(self.out).mkdir()
    (pathlib.Path(self.out) / "cat.png").touch()
    for model in ("", f"{self.directory}/run"):
      model_dir.save(f"{self.directory}/run/model", self.model)
      with self.assertRaisesRegex(ValueError, "out exists and holds something else; give another path"):
        package_weights.package(self.out, [f"{self.directory}/f8"], model)
    self.assertEqual([f.name for f in pathlib.Path(self.out).iterdir()], ["cat.png"])

  def test_a_mistake_is_one_line(self):
    for flags, message in (([], "nothing to write"), (["--vae=/nowhere"], "no vae_f8.safetensors")):
      command = [sys.executable, "-m", "elasticdit_jax.interop.package_weights", f"--out={self.out}", *flags]
      done = subprocess.run(command, capture_output=True, text=True, check=False)
      self.assertEqual(done.returncode, 1)
      self.assertRegex(done.stderr, f"^error: .*{message}.*\n$")
    self.assertFalse(pathlib.Path(self.out).exists())


class ShippedTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pipeline = Pipeline.load()

  def test_has_four_routes_and_fits_into_a_package(self):
    self.assertEqual(set(self.pipeline.routes), {"max-f8", "lite-f8", "max-f16", "lite-f16"})
    self.assertLessEqual(sum(f.stat().st_size for f in _SHIPPED.iterdir()), 8 * 2**20)

  @parameterized.parameters((8, 0.9), (16, 0.8))
  def test_vaes_keep_what_scenes_show(self, factor, least):
    made = scenes.render(np.arange(64), seed=123, split="any")
    prompts = [
      scenes.Prompt(scenes.TASKS[task], caption) for task, caption in zip(made.task, made.caption, strict=True)
    ]
    back = jax.jit(lambda codec, image: to_uint8(codec.decode(codec.encode(to_float(image)))))
    images = np.asarray(back(self.pipeline.model.codecs[factor], made.image))
    self.assertGreaterEqual(scenes_score.strict_table(prompts, images)["overall"], least)

  def test_flex_max_draws_what_it_is_asked_for(self):
    prompts = scenes.eval_prompts(2, "seen")
    images = self.pipeline([prompt.caption for prompt in prompts], "max-f16", steps=10)
    # Shuffled captions score below a tenth.
    self.assertGreaterEqual(scenes_score.strict_table(prompts, images)["overall"], 0.3)


if __name__ == "__main__":
  absltest.main()
