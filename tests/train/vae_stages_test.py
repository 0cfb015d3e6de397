"""The two stages on a codec of a few hundred parameters: what each trains, the boundary, resuming, mistakes."""

import dataclasses
import functools
import types
import unittest
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from configs import vae as vae_config
from elasticdit_jax.data import scenes
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import tdvae
from elasticdit_jax.train import vae, vae_stages, vae_steps, vae_teacher
from elasticdit_jax.types import to_float
from tests.evals import tiny_model
from tests.train import small

_SMALL = {
  8: dataclasses.replace(tdvae.NANO[8], widths=(4, 4, 8), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0)),
  16: dataclasses.replace(tdvae.NANO[16], widths=(4, 4, 4, 8), encoder_blocks=(0,) * 4, decoder_blocks=(0,) * 4),
}


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here
  small.reuse_programs(types.SimpleNamespace(addCleanup=unittest.addModuleCleanup))


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def _breaking(make_batches, broken_at, *args, start_step, **options):
  """Batches up to a step, and then an error."""
  with make_batches(*args, start_step=start_step, **options) as batches:
    for _ in range(start_step, broken_at):
      yield next(batches)
    raise ValueError("no more pictures")


def _change(before, after):
  """Largest change of any parameter."""
  return max(
    jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), before, after))
  )


class VaeStagesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(tdvae.NANO, _SMALL))
    self.workdir = small.new_workdir(self)
    self.teachers = self.workdir.parent / "teacher"
    model_dir.save_codecs(self.teachers, tiny_model.make((8,)).codecs)

  def _config(self, arg="stages=two", **fields):
    config = vae_config.get_config(f"{arg},debug").unlock()
    config.teacher = str(self.teachers)
    config.data.update({"size": 32, "batch_size": 2})
    config.stage1.steps, config.stage2.steps, config.stage2.gan_start = 2, 4, 2
    config.critic.update({"width": 4, "layers": 1})
    config.perceptual.kind = "none"
    config.optimizer.update({"warmup_steps": 0, "weight_decay": 0.5})
    config.train.update({"log_every": 2, "save_every": 2})
    for name, value in fields.items():
      *sections, last = name.split("__")
      (config[sections[0]] if sections else config)[last] = value
    return config.lock()

  def test_each_stage_trains_its_part_and_no_bit_of_another(self):
    job = vae_stages.prepare(self._config())
    before = jax.device_get(vae_stages.initial_state(job))
    seen = {}

    def keep(number, state):
      seen[number] = jax.device_get(state)
      return state

    original = vae_stages.loop.run

    def watched(state, batches, step, settings, **options):
      return original(state, batches, lambda s, b, n: step(keep(n, s), b, n), settings, **options)

    with mock.patch.object(vae_stages.loop, "run", watched):
      end = jax.device_get(vae_stages.train(job, vae_stages.initial_state(job)))
    # Stage 1: the encoder alone.
    small.same(self, before.params["decoder"], seen[2].params["decoder"])
    self.assertGreater(_change(before.params["encoder"], seen[1].params["encoder"]), 1e-4)
    small.same(self, before.opt_state["stage2"], seen[2].opt_state["stage2"])
    # The boundary: the averaged encoder is the frozen one, whatever momentum and weight decay say.
    small.same(self, seen[2].params["encoder"], seen[2].ema["encoder"])
    for later in (seen[3], seen[5], end):
      small.same(self, seen[2].params["encoder"], later.params["encoder"])
      small.same(self, seen[2].params["encoder"], later.ema["encoder"])
      small.same(self, seen[2].opt_state["stage1"], later.opt_state["stage1"])
    self.assertGreater(_change(seen[2].params["decoder"], end.params["decoder"]), 1e-4)
    # The critic sleeps until its start.
    small.same(self, before.critic, seen[4].critic)
    small.same(self, before.opt_state["critic"], seen[4].opt_state["critic"])
    self.assertGreater(_change(seen[4].critic, end.critic), 1e-5)
    self.assertGreater(_change(seen[4].params["decoder"], end.params["decoder"]), 1e-4)
    # The latents stay the teacher's.
    np.testing.assert_array_equal(end.shift, 0)
    self.assertEqual(end.scale, 1)

  def test_resumes_bit_for_bit(self):
    whole = self.workdir.parent / "whole"
    vae.run(self._config(), str(whole))
    original = vae_stages.pipeline.make_batches
    for broken_at in (1, 5):  # the second start passes the boundary, the third only ends
      with mock.patch.object(vae_stages.pipeline, "make_batches", functools.partial(_breaking, original, broken_at)):
        with self.assertRaisesRegex(ValueError, "no more pictures"):
          vae.run(self._config(), str(self.workdir))
    self.assertFalse((self.workdir / "vae_f8.safetensors").exists())
    vae.run(self._config(), str(self.workdir))
    got, want = (model_dir.load_codecs(path)[8] for path in (self.workdir, whole))
    small.same(self, got, want)

  def test_stage1_reaches_the_teacher(self):
    """A student of the teacher's own shape starts at its weights: the loss is zero, and stays at zero."""
    teacher = tiny_model.make((8,)).codecs[8]
    config = self._config(stage1__steps=1)
    with mock.patch.dict(tdvae.NANO, {8: teacher.cfg}):
      job = vae_stages.prepare(config)
    job = dataclasses.replace(job, held_out=job.held_out[:1])
    same = dataclasses.replace(teacher, shift=jnp.zeros(16), scale=jnp.float32(1))
    self.assertGreater(vae_stages.alignment(job, same), 1.0)
    raw = jax.tree.map(lambda x: x, teacher)  # its latents before normalisation, normalised by hand
    error = vae_stages.alignment(dataclasses.replace(job, teacher=vae_teacher.Teacher(same)), raw)
    self.assertLess(error, 1e-6)

  def test_f16_learns_averaged_latents(self):
    config = self._config("stages=two,factor=16")
    self.assertEqual(config.stage1.target, "average")
    teacher = vae_teacher.load(config, 16)
    image = to_float(scenes.render(np.arange(2), seed=1, size=32).image)
    fine = np.asarray(teacher.codec.encode(image))
    got = np.asarray(jax.jit(lambda t, x: t.latents(x))(teacher, image))
    self.assertEqual(got.shape, (2, 2, 2, 16))
    np.testing.assert_allclose(got[1, 1, 0], fine[1, 2:4, 0:2].mean((0, 1)), rtol=1e-4, atol=1e-5)

  def test_without_a_teacher_statistics_are_measured(self):
    config = self._config(teacher="", stage1__target="reconstruction", stage2__gan=0.0, branches=True)
    vae.run(config, str(self.workdir))
    codec = model_dir.load_codecs(self.workdir)[8]
    self.assertFalse(codec.cfg.branches)  # merged for deployment
    image = scenes.render(np.arange(8), seed=3, size=32).image
    latents = jax.jit(lambda codec, image: codec.encode(to_float(image)))(codec, image)
    self.assertBetween(float(jnp.sqrt(jnp.mean(latents**2))), 0.7, 1.4)

  @parameterized.parameters(
    ({"stage1__target": "latents"}, "config.stage1.target: expected one of teacher, average, reconstruction"),
    ({"stage1__target": "average"}, "'average' halves the grid of an f8 teacher for an f16 student, here is f8"),
    ({"teacher": ""}, "config.teacher: stage 1 needs a teacher, got ''"),
    ({"teacher": "/nowhere"}, "/nowhere"),
    (
      {"arg": "stages=two,factor=16", "stage1__target": "teacher"},
      "has no f16 VAE; set --config.stage1.target=average",
    ),
    ({"critic__layers": 4}, "config.data.size: 32 pixels are too few for a critic of 4 layers, expected at least 48"),
    ({"model": "huge"}, "config.model: expected one of .*nano.* for f8, got 'huge'"),
    ({"perceptual__kind": "vgg"}, "config.perceptual.kind: expected one of wavelet, lpips, none, got 'vgg'"),
    ({"perceptual__kind": "lpips"}, "config.perceptual.weights: lpips weights: no file ''; make the file once"),
    ({"stage2__gan_start": -1}, "config.stage2.gan_start: expected a number of steps"),
  )
  def test_a_mistake_leaves_nothing(self, fields, message):
    with self.assertRaisesRegex(ValueError, message) as caught:
      vae.run(self._config(**fields), str(self.workdir))
    self.assertNotIn("\n", str(caught.exception))
    self.assertFalse(self.workdir.exists())

  def test_another_latent_width_is_refused(self):
    wide = dataclasses.replace(_SMALL[8], latent_channels=4)
    with mock.patch.dict(tdvae.NANO, {8: wide}):
      with self.assertRaisesRegex(ValueError, "its latents have 16 channels, those of the student 4"):
        vae_stages.prepare(self._config())


class StepsTest(absltest.TestCase):
  def test_last_layer_exists_in_every_preset(self):
    for name, cfg in tdvae.PRESETS.items():
      none = (0,) * cfg.levels
      thin = dataclasses.replace(
        cfg, encoder_blocks=none, decoder_blocks=none, mid_blocks=0
      )  # its last layer is no block
      for branches in (False, True):
        shapes = tdvae.init_shapes(dataclasses.replace(thin, branches=branches))
        self.assertIn("kernel", shapes["decoder"][vae_steps._LAST_LAYER], name)


if __name__ == "__main__":
  absltest.main()
