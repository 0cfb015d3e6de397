"""The whole task on a few thousand parameters: phases, files, and a run that dies in the middle of a phase."""

import json
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from elasticdit_jax import elastic
from elasticdit_jax.generate import Pipeline
from elasticdit_jax.interop import model_dir, weights
from elasticdit_jax.train import step, uwco, workdir
from tests.evals import tiny_model
from tests.train import small


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class _KilledError(Exception):
  pass


def _dies_at(number):
  """make_step whose update raises before it completes update `number`."""
  original = step.make_step

  def make_step(*args, **kwargs):
    update = original(*args, **kwargs)

    def dying(current, *rest, **named):
      if int(current.step) == number:
        raise _KilledError
      return update(current, *rest, **named)

    return dying

  return mock.patch.object(step, "make_step", make_step)


def _made_once():
  """make_step that gives one update to every run of the test: what runs share is compiled once."""
  made, original = [], step.make_step

  def make_step(*args, **kwargs):
    made.extend([] if made else [original(*args, **kwargs)])
    return made[0]

  return mock.patch.object(step, "make_step", make_step)


def _listens(heard):
  """make_step whose update notes (distilled, teacher before the step, EMA before the step) in `heard`."""
  original = step.make_step

  def make_step(*args, **kwargs):
    update = original(*args, **kwargs)

    def noting(current, *rest, **named):
      heard.append((named["distilled"], *jax.tree.map(np.array, (current.teacher, current.ema))))
      return update(current, *rest, **named)

    return noting

  return mock.patch.object(step, "make_step", make_step)


class UwcoTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(small.small_backbone())
    self.workdir = small.new_workdir(self)
    # One VAE: a second doubles the programs.
    self.config = small.config(self.workdir, (16,), init=1, warmup=3, specialise=4, recover=2)
    init = self.workdir.parent / "given"
    model_dir.save(init, tiny_model.make((16,)))
    with self.config.unlocked():
      self.config.init = str(init)  # a compiled initialiser would take longer than a phase
      self.config.phases.init.routes = "max-f16+drop-f16"
      self.config.phases.warmup.routes = self.config.phases.recover.routes = "max-f16+lite-f16"
      self.config.phases.specialise.routes = "lite-f16"

  def test_run_that_dies_inside_a_phase_ends_like_one_that_does_not(self):
    other = self.workdir.parent / "other"
    heard = []
    self.enter_context(_made_once())
    with _listens(heard), mock.patch.object(uwco, "Snapshots"):
      uwco.run(self.config, str(other))
    self._check_teacher(heard)
    with _dies_at(7), self.assertRaises(_KilledError):
      uwco.run(self.config, str(self.workdir))
    self.assertFalse((self.workdir / "model").exists())
    uwco.run(self.config, str(self.workdir))
    straight, resumed = (weights.load_tree(w / "model" / "dit.safetensors") for w in (other, self.workdir))
    small.same(self, straight, resumed)
    self._check_files()

  def _check_teacher(self, heard):
    """Silent in phase 1; from then on the average of its end, unchanged."""
    self.assertEqual([distilled for distilled, _, _ in heard], [False] + [True] * 9)
    taught = heard[1][2]
    self.assertTrue(any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (heard[0][1], taught)), strict=True)))
    for _, teacher, _ in heard[1:]:
      small.same(self, teacher, taught)

  def _check_files(self):
    routes = elastic.load_routes(self.workdir / "routes.json")
    self.assertLen(routes, 4)
    self.assertEqual(routes["lite-f8"].active, (0, 2))
    self.assertEqual(routes, elastic.load_routes(self.workdir / "model" / "routes.json"))
    steps = sorted(json.loads(p.read_text())["step"] for p in (self.workdir / "snapshots").glob("*.json"))
    self.assertEqual(steps, [1, 4, 8, 10])
    report = json.loads((self.workdir / "report.json").read_text())
    self.assertLen(report["snapshots"], 4)
    self.assertIn("lite-f16", (self.workdir / "report.md").read_text())
    self.assertTrue((self.workdir / "images" / "routes.png").is_file())
    self.assertNotEmpty(list(self.workdir.glob("events.out.tfevents*")))
    drawn = Pipeline.load(self.workdir)("a red circle", "lite-f16", steps=1)
    self.assertEqual((drawn.shape, drawn.dtype), ((1, 64, 64, 3), np.uint8))

  def test_bad_input_is_answered_before_anything_is_written(self):
    cases = {
      "config.data.size: 72 is not a multiple of .* nearest is 64": lambda c: c.data.update({"size": 72}),
      "config.vae": lambda c: c.update({"vae": ""}),
      "config.model.size": lambda c: c.model.update({"size": "XXL"}),
      "unknown route 'max-f9'": lambda c: c.phases.warmup.update({"routes": "max-f9"}),
      "config.phases.specialise.routes: drop-f16 belongs to": lambda c: c.phases.specialise.update(
        {"routes": "drop-f16"}
      ),
      "config.init: no dit.safetensors": lambda c: c.update({"init": "/nowhere"}),
      "lite.skip": lambda c: c.lite.update({"skip": 2}),
      "config.train.profile: expected 'FIRST:STOP'": lambda c: c.train.update({"profile": "7"}),
      "config.mesh: fsdp=2, tensor=1 do not divide": lambda c: c["mesh"].update({"fsdp": 2}),
      "config.data.batch_size: expected a multiple of 3": lambda c: c.train.update({"accumulate": 3}),
      "config.report.steps: expected at least 1 step, got 0": lambda c: c.report.update({"steps": 0}),
      "config.optimizer.learning_rate": lambda c: c.optimizer.update({"learning_rate": -1.0}),
    }
    for message, spoil in cases.items():
      with self.subTest(message):
        config = self.config.copy_and_resolve_references().unlock()
        spoil(config)
        with self.assertRaisesRegex(ValueError, message):
          uwco.run(config.lock(), str(self.workdir))
        self.assertFalse(self.workdir.exists())

  def test_a_full_disk_is_answered_before_anything_is_written(self):
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=10)):
      with self.assertRaisesRegex(OSError, "make room or choose another --workdir$"):
        uwco.run(self.config, str(self.workdir))
    self.assertFalse(self.workdir.exists())

  def test_what_snapshots_measure_cannot_change_within_a_run(self):
    workdir.claim_workdir(self.workdir, self.config)
    for field, value, good in (
      ("per_task", 7, True),
      ("pictures", 3, False),
      ("steps", 9, False),
      ("guidance", 1.0, False),
    ):
      config = self.config.copy_and_resolve_references().unlock()
      config.report[field] = value
      if good:
        workdir.check_workdir(self.workdir, config, uwco.NEUTRAL)
      else:
        with self.assertRaisesRegex(ValueError, f"report.{field}: .* -> {value}"):
          uwco.run(config.lock(), str(self.workdir))


if __name__ == "__main__":
  absltest.main()
