"""The task `vae` on a codec of a few hundred parameters: files, resume, and mistakes that leave nothing behind."""

import dataclasses
import json
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from configs import vae as vae_config
from elasticdit_jax.data import scenes
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import codec, tdvae
from elasticdit_jax.train import optim, state, vae, vae_report
from tests.evals import tiny_model
from tests.train import small

_SMALL = {8: dataclasses.replace(tdvae.NANO[8], widths=(4, 4, 8), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))}


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class VaeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(tdvae.NANO, _SMALL))
    self.workdir = small.new_workdir(self)

  def _config(self, field="", value=None):
    config = vae_config.get_config("factor=8,debug").unlock()
    config.data.update({"size": 32, "batch_size": 2})
    config.train.update({"steps": 4, "log_every": 2, "save_every": 2})
    if field:
      *sections, name = field.split(".")
      (config[sections[0]] if sections else config)[name] = value
    return config.lock()

  def test_leaves_a_codec_whose_latents_are_normal_and_goes_on_where_it_stopped(self):
    small.reuse_programs(self)
    vae.run(self._config(), str(self.workdir))
    made = model_dir.load_codecs(self.workdir)[8]
    image = scenes.render(np.arange(8), seed=3, size=32).image.astype(np.float32) / 127.5 - 1
    latents = np.asarray(jax.jit(lambda codec, image: codec.encode(image))(made, image))
    self.assertEqual(latents.shape, (8, 4, 4, 16))
    self.assertBetween(float(np.sqrt(np.mean(latents**2))), 0.7, 1.4)
    self.assertNotEmpty(list(self.workdir.glob("events.out.tfevents*")))
    self.assertEqual(json.loads((self.workdir / "config.json").read_text())["factor"], 8)
    with self.assertRaisesRegex(ValueError, "train.steps: 4 -> 6"):
      vae.run(self._config("train.steps", 6), str(self.workdir))
    (self.workdir / "vae_f8.safetensors").unlink()
    with mock.patch.object(vae.loop.jax, "block_until_ready", side_effect=AssertionError("a step was taken")):
      vae.run(self._config(), str(self.workdir))
    again = model_dir.load_codecs(self.workdir)[8]
    small.same(self, made.params, again.params)

  def test_the_teacher_is_an_autoencoder_of_another_kind(self):
    config = vae_config.get_config("teacher")
    cfg = vae_report.shape(config)
    tx = optim.make(config.optimizer, codec.init_shapes(cfg), 1e-3)
    current = jax.eval_shape(lambda key: state.create(vae_report.init(cfg, key), tx, 0), jax.random.key(0))
    step = vae.make_step(cfg, tx, config.loss, 0.9)
    after, metrics = jax.eval_shape(step, current, small.batch(tiny_model.make(()).cfg, 2, 32))
    self.assertEqual(jax.tree.structure(after), jax.tree.structure(current))
    self.assertIn("psnr", metrics)
    self.assertEqual(cfg.factor, 8)
    with self.assertRaisesRegex(ValueError, "a student is a T-DVAE, got 'teacher'"):
      student = vae_config.get_config("stages=two").unlock()
      student.model = "teacher"
      vae.run(student.lock(), str(self.workdir))

  @parameterized.parameters(
    ("factor", 9, "config.factor: expected 8 or 16, got 9"),
    ("optimizer.name", "sgd", "config.optimizer.name: expected adamw or muon"),
    ("train.log_every", 0, "config.train.log_every: expected at least 1 step, got 0"),
    ("train.steps", 0, "config.train.steps: expected at least 1 step, got 0"),
    ("loss.noise", -1.0, "config.loss.noise"),
    ("data.batch_size", 0, "config.data.batch_size"),
    ("data.size", 40, "size: got 40, expected a multiple of 16"),
    ("data.source", "web", "unknown source 'web'"),
  )
  def test_a_mistake_leaves_nothing(self, field, value, message):
    with self.assertRaisesRegex(ValueError, message):
      vae.run(self._config(field, value), str(self.workdir))
    self.assertFalse(self.workdir.exists())

  def test_a_full_disk_leaves_nothing(self):
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=10)):
      with self.assertRaisesRegex(OSError, "make room or choose another --workdir$"):
        vae.run(self._config(), str(self.workdir))
    self.assertFalse(self.workdir.exists())


if __name__ == "__main__":
  absltest.main()
