"""Several VAEs in one workdir: order, places, resume, and mistakes of any run that leave nothing behind."""

import dataclasses
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from configs import vae as vae_config
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import tdvae
from elasticdit_jax.train import vae, vae_family
from tests.train import small

_SMALL = dataclasses.replace(tdvae.NANO[8], widths=(4, 4, 8), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class VaeFamilyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(tdvae.NANO, {8: _SMALL}))
    self.enter_context(mock.patch.dict(tdvae.PRESETS, {"pico-f8": dataclasses.replace(_SMALL, flow=12)}))
    self.workdir = small.new_workdir(self)

  def _config(self, **fields):
    """A teacher and its student, of few steps; fields by name, sections joined by two underscores."""
    config = vae_config.get_config("debug").unlock()
    config.data.update({"size": 32, "batch_size": 2})
    config.train.update({"log_every": 1, "save_every": 2})
    del config.runs["f16"]
    config.runs.f8.train.steps = 2
    student = config.runs.student
    student.stage1.steps = student.stage2.steps = 2
    student.stage2.gan = 0.0
    student.perceptual.kind = "none"
    for name, value in fields.items():
      *sections, last = name.split("__")
      part = config
      for section in sections:
        part = part[section]
      part[last] = value
    return config.lock()

  def test_a_student_learns_from_the_teacher_trained_before_it(self):
    small.reuse_programs(self)
    seen = []
    original = vae.vae_stages.run

    def watched(config, workdir, codecs):
      seen.append(codecs)
      original(config, workdir, codecs)

    with mock.patch.object(vae.vae_stages, "run", watched):
      vae.run(self._config(), str(self.workdir))
    teacher, student, top = (model_dir.load_codecs(self.workdir / name)[8] for name in ("f8", "student", ""))
    small.same(self, seen[0][8], teacher)
    small.same(self, top, teacher)
    self.assertEqual(student.cfg.flow, 12)
    self.assertEqual(float(student.scale), 1.0)  # the teacher's latent space
    # Started again, no step is taken, and the files come out the same.
    (self.workdir / "vae_f8.safetensors").unlink()
    with mock.patch.object(vae.loop.jax, "block_until_ready", side_effect=AssertionError("a step was taken")):
      vae.run(self._config(), str(self.workdir))
    small.same(self, model_dir.load_codecs(self.workdir)[8], teacher)
    with self.assertRaisesRegex(ValueError, "runs.f8.train.steps: 2 -> 3"):
      vae.run(self._config(runs__f8__train__steps=3), str(self.workdir))

  def test_each_run_alone_is_the_config_of_that_name(self):
    runs = vae_family.members(vae_config.get_config())
    self.assertEqual(list(runs), ["f16", "f8", "student"])
    for name, arg in (("f8", "factor=8"), ("f16", "factor=16")):
      self.assertEqual(runs[name].to_dict(), vae_config.get_config(arg).to_dict())
    alone = vae_config.get_config("stages=two").to_dict() | {"teacher": "f8", "model": "pico"}
    self.assertEqual(runs["student"].to_dict(), alone)

  def test_teachers_come_first_whatever_their_names(self):
    config = vae_config.get_config().unlock()
    config.runs["a student"] = config.runs.student.copy_and_resolve_references()
    config.runs["a student"].teacher = "student"
    self.assertEqual(list(vae_family.members(config)), ["f16", "f8", "student", "a student"])

  @parameterized.parameters(
    ({"runs__f8__train__steps": 0}, "config.runs.f8: config.train.steps: expected at least 1 step, got 0"),
    ({"runs__f8__factor": 9}, "config.runs.f8: config.factor: expected 8 or 16, got 9"),
    (
      {"runs__student__model": "huge"},
      "config.runs.student: config.model: expected one of .*pico.* for f8, got 'huge'",
    ),
    ({"runs__student__teacher": "f32"}, "config.runs.student: .*f32"),
    ({"runs__student__teacher": "student"}, "config.runs.student.teacher: 'student' learns from 'student' itself"),
    ({"runs__student__factor": 16, "runs__student__model": "nano"}, "config.teacher: f8 has no f16 VAE"),
    ({"optimizer__name": "sgd"}, "config.runs.f8: config.optimizer.name: expected adamw or muon"),
    ({"data__size": 40}, "config.runs.f8: .*size: got 40, expected a multiple of 16"),
  )
  def test_a_mistake_in_any_run_leaves_nothing(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      vae.run(self._config(**fields), str(self.workdir))
    self.assertFalse(self.workdir.exists())


if __name__ == "__main__":
  absltest.main()
