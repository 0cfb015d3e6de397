"""The whole task on a few thousand parameters: files, a run that dies between epochs, early stop, bad input."""

import dataclasses
import json
import types
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from configs import grpo as grpo_config
from elasticdit_jax.generate import Pipeline
from elasticdit_jax.interop import model_dir, weights
from elasticdit_jax.train import aligned, grpo, optim, policy, prompts, rewards, rollout, sharding, watch, workdir
from tests.evals import tiny_model
from tests.train import small


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class _KilledError(Exception):
  pass


def _dies_at(number):
  """Raises before epoch `number` is complete, after its rollout."""
  original = grpo.Run._updates

  def dying(self, state, drawing, drawn, n):
    if n == number:
      raise _KilledError
    return original(self, state, drawing, drawn, n)

  return mock.patch.object(grpo.Run, "_updates", dying)


class GrpoTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = small.new_workdir(self)
    init = self.workdir.parent / "given"
    model_dir.save(init, tiny_model.make((16,)))
    config = grpo_config.get_config("debug,fast").unlock()
    config.init = str(init)
    config.data.size = 0  # the model's
    # Random weights draw no shapes; the size of a file differs between any two pictures.
    config.rewards.weights = "jpeg_size=1"
    config.rollout.update({"routes": "max-f16+lite-f16", "prompts": 2, "group": 2, "steps": 3, "window": 2, "batch": 4})
    config.objective.updates = 2
    config.optimizer.learning_rate = 1e-3
    config.train.update({"epochs": 4, "save_every": 1})
    config.watch.update({"every": 2, "prompts": 1, "pictures": 2, "loss": 10.0})
    config.report.update({"per_task": 0, "steps": 1, "pictures": 1})
    self.config = config.lock()
    small.reuse_programs(self)

  def _model(self, workdir, name="model"):
    return weights.load_tree(workdir / name / "dit.safetensors")

  def _changed(self, **sections):
    config = self.config.copy_and_resolve_references().unlock()
    for section, values in sections.items():
      config[section].update(values)
    return config.lock()

  def test_run_that_dies_inside_an_epoch_ends_like_one_that_does_not(self):
    other = self.workdir.parent / "other"
    with mock.patch.object(grpo, "Snapshots"):
      grpo.run(self.config, str(other))
    with _dies_at(3), self.assertRaises(_KilledError):
      grpo.run(self.config, str(self.workdir))
    self.assertFalse((self.workdir / "model").exists())
    self._check_other_prompts_are_refused()
    grpo.run(self.config, str(self.workdir))
    small.same(self, self._model(self.workdir), self._model(other))
    records, again = (json.loads((w / "watch.json").read_text()) for w in (self.workdir, other))
    self.assertEqual(records, again)
    self._check_files(records)

  def _check_other_prompts_are_refused(self):
    def fewer(*args, original=prompts.scenes):
      found = original(*args)
      return dataclasses.replace(found, held_out=found.held_out[1:])

    with mock.patch.object(prompts, "scenes", fewer):
      with self.assertRaisesRegex(ValueError, "config.prompts: other prompts than those of the 3 epochs in "):
        grpo.run(self.config, str(self.workdir))

  def _check_files(self, records):
    self.assertEqual([record["step"] for record in records], [0, 2, 4])
    self.assertIsNone(records[0]["training_reward"])
    self.assertLess(records[2]["training_reward"], 0)
    self.assertCountEqual(records[2]["routes"], ["max-f16", "lite-f16"])
    steps = sorted(json.loads(p.read_text())["step"] for p in (self.workdir / "snapshots").glob("*.json"))
    self.assertEqual(steps, [0, 4])
    report = json.loads((self.workdir / "report.json").read_text())
    self.assertLen(report["snapshots"], 2)
    self.assertIn("held-out flow-matching loss", (self.workdir / "report.md").read_text())
    self.assertTrue((self.workdir / "images" / "routes.png").is_file())
    self.assertNotEmpty(list(self.workdir.glob("events.out.tfevents*")))
    drawn = Pipeline.load(self.workdir)("a red circle", "lite-f16", steps=1)
    self.assertEqual(drawn.shape, (1, 64, 64, 3))

  def test_ratios_of_weights_that_have_not_moved_are_one(self):
    """Velocities of the sampler stand for those of the weights that drew, whatever the batch they were computed in."""
    config = self._changed(rollout={"routes": "lite-f16", "guidance": 2.0}, optimizer={"learning_rate": 1e-12})
    setup = aligned.prepare(config, str(self.workdir))
    run = grpo.Run(setup)
    run.policy = setup.policy(lambda trained: optim.make(config.optimizer, trained, 1e-12))
    run.sampler = rollout.Sampler(setup.job, setup.plan, run.policy.objective, "group", setup.reward)
    state = run.policy.create(setup.weights, 0)
    after, metrics = run._epoch(state, setup.prompts.draw(2, 0, 0), 0)
    self.assertEqual(int(after.updates), 2)
    self.assertLess(metrics["ratio_off"], 1e-6)  # the range that is not clipped is a hundred times as wide
    self.assertEqual(metrics["clip_fraction"], 0)

  def test_adapters_and_the_forward_process(self):
    changes = {
      "lora": {"rank": 2, "alpha": 4.0},
      "objective": {"name": "nft", "kl": 1e-4, "divergence": "v", "lag": 0.5},
      "rollout": {"noise": "ode", "guidance": 2.0, "routes": "lite-f16"},
      "train": {"epochs": 2},
    }
    with mock.patch.object(grpo, "Snapshots"):
      grpo.run(self._changed(**changes), str(self.workdir))
    given, after = self._model(self.workdir.parent, "given"), self._model(self.workdir)
    small.same(self, given["modulation"], after["modulation"])

  def test_watch_ends_the_run_and_keeps_the_best(self):
    def judge(records, limits):
      del limits
      return watch.Verdict(0, "it is a test" if len(records) == 2 else "")

    with mock.patch.object(watch, "judge", judge), mock.patch.object(grpo, "Snapshots") as snapshots:
      with self.assertLogs(level="WARNING") as logs:
        grpo.run(self._changed(rollout={"routes": "lite-f16"}), str(self.workdir))
    self.assertIn("stopped at epoch 2: it is a test", "\n".join(logs.output))
    small.same(self, self._model(self.workdir), self._model(self.workdir.parent, "given"))
    notes = snapshots.return_value.report.call_args.kwargs["notes"]
    self.assertEqual(notes[-1], "Stopped at epoch 2: it is a test.")

  def test_a_checkpoint_holds_the_rewards_of_its_own_epochs(self):
    """It is written in the background, while the next epoch goes on."""
    held = []

    def save(self, step, state, meta):
      held.append((step, meta["rewards"]))

    def epoch(self, state, prompts, n):
      self._rewards.append(float(n))
      return state.advanced(), {"loss": 0.5}

    with (
      mock.patch.object(grpo.Run, "_epoch", epoch),
      mock.patch.object(grpo.Run, "look", lambda self, n, state: state),
      mock.patch.object(grpo, "Watch"),
      mock.patch.object(grpo, "Snapshots"),
      mock.patch.object(grpo.Checkpointer, "save", save),
    ):
      grpo.run(self._changed(watch={"every": 4}), str(self.workdir))
    self.assertEqual(held[:3], [(1, [0.0]), (2, [0.0, 1.0]), (3, [0.0, 1.0, 2.0])])

  def test_a_batch_that_the_devices_cannot_share_is_explained(self):
    with mock.patch.object(sharding, "from_config", return_value=mock.Mock(batch_shards=3)):
      with self.assertRaisesRegex(ValueError, "config.rollout.batch: expected a multiple of the 3 parts .*, got 4"):
        grpo.run(self.config, str(self.workdir))
    self.assertFalse(self.workdir.exists())

  def test_nothing_to_compare_is_explained(self):
    def blank(images, prompts, metadata):
      del prompts, metadata
      return {"jpeg_size": np.ones(len(images))}

    with mock.patch.object(grpo, "_SILENT_EPOCHS", 2), mock.patch.dict(rewards.LOCAL, {("jpeg_size",): blank}):
      with self.assertRaisesRegex(ValueError, "in 2 epochs no prompt had two pictures with different rewards"):
        grpo.run(self._changed(rollout={"routes": "lite-f16"}), str(self.workdir))

  def test_bad_input_is_answered_before_anything_is_written_or_drawn(self):
    cases = {
      "config.rollout.group: expected at least 2 pictures .* got 1": {"rollout": {"group": 1}},
      "config.rollout.window: expected at most the 2 steps from first to last, got 3": {"rollout": {"window": 3}},
      "config.rollout.last: expected a step up to 1; .* got 2": {"rollout": {"last": 2}},
      "config.rollout.first: expected a step from 0 to 1, got 2": {"rollout": {"first": 2}},
      "config.rollout.noise: expected one of sde, constant, cps, got 'ode'": {"rollout": {"noise": "ode"}},
      "config.rollout.level: expected noise above 0": {"rollout": {"level": 0.0}},
      "config.rollout.routes: route: unknown route 'max-f9'": {"rollout": {"routes": "max-f9"}},
      "config.rollout.noise: expected one of sde, constant, got 'cps'": {
        "objective": {"name": "grpo-guard"},
        "rollout": {"noise": "cps"},
      },
      "config.rollout.first: expected 0 where no step has noise": {
        "objective": {"name": "nft", "divergence": "v"},
        "rollout": {"noise": "ode", "first": 1},
      },
      "config.rollout.window: expected at least 1 time": {
        "objective": {"name": "nft", "divergence": "v"},
        "rollout": {"noise": "ode", "window": 0},
      },
      "config.optimizer.name: expected 'adamw' for adapters": {"optimizer": {"name": "muon"}, "lora": {"rank": 2}},
      "rewards.timeout: expected a positive number": {"rewards": {"timeout": 0.0, "servers": "x=http://127.0.0.1:9"}},
      "config.objective.name: expected one of grpo, grpo-guard, nft, got 'ppo'": {"objective": {"name": "ppo"}},
      "config.objective.guidance: expected 1 where objective.kl is 0": {"objective": {"guidance": 1.5, "kl": 0.0}},
      "config.objective.guidance: expected 1 where rollout.guidance is not": {
        "objective": {"guidance": 1.5, "kl": 1.0},
        "rollout": {"guidance": 2.0},
      },
      "config.objective.clip": {"objective": {"clip": 0.0}},
      "config.objective.anchor: expected a weight of at least 0, got -1.0": {"objective": {"anchor": -1.0}},
      "config.objective.lag: expected a share of at least 0, below 1": {"objective": {"lag": 1.0}},
      "config.objective.lag: expected 0 where it is not nft": {"objective": {"lag": 0.5}},
      "unknown reward 'beauty'; there are .*scene_strict": {"rewards": {"weights": "beauty=1"}},
      "jpeg_size: expected a finite weight of at least 0": {"rewards": {"weights": "jpeg_size=-1"}},
      "config.prompts.tasks": {"prompts": {"tasks": "counts=1"}},
      "config.train.epochs: expected at least 1 epoch, got 0": {"train": {"epochs": 0}},
      "config.data.size: 72 is not a multiple": {"data": {"size": 72}},
      "config.optimizer.learning_rate": {"optimizer": {"learning_rate": -1.0}},
    }
    for message, changes in cases.items():
      with self.subTest(message), mock.patch.object(policy, "gradients", side_effect=AssertionError):
        with self.assertRaisesRegex(ValueError, message):
          grpo.run(self._changed(**changes), str(self.workdir))
        self.assertFalse(self.workdir.exists())

  def test_captions_that_scene_rewards_do_not_know(self):
    file = self.workdir.parent / "prompts.txt"
    file.write_text("a red circle.\na blue circle.\na green square.\n")
    changes = {"rewards": {"weights": "scene_strict=1"}, "prompts": {"file": str(file), "tasks": ""}}
    with self.assertRaisesRegex(ValueError, "config.prompts.file: .* is not a .*; scene rewards need captions"):
      grpo.run(self._changed(**changes), str(self.workdir))

  def test_a_reward_that_fails_says_so_before_the_first_rollout(self):
    def nan(images, prompts, metadata):
      del prompts, metadata
      return {"jpeg_size": np.full(len(images), np.nan)}

    with mock.patch.dict(rewards.LOCAL, {("jpeg_size",): nan}):
      # One request for all prompts that are watched.
      with self.assertRaisesRegex(ValueError, "reward 'jpeg_size': 2 of 2 values are not finite"):
        grpo.run(self._changed(watch={"prompts": 2}), str(self.workdir))
    self.assertFalse(self.workdir.exists())

  def test_a_reward_that_fails_on_the_way_costs_no_epoch_before(self):
    config, calls = self._changed(train={"save_every": 100}, watch={"every": 100}), []

    def breaks(images, prompts, metadata):
      calls.append(len(prompts))
      return {"jpeg_size": np.full(len(images), np.nan) if len(calls) == 6 else images.mean((1, 2, 3), np.float32)}

    with mock.patch.object(grpo, "Snapshots"), mock.patch.dict(rewards.LOCAL, {("jpeg_size",): breaks}):
      with self.assertRaisesRegex(ValueError, "reward 'jpeg_size': 4 of 4 values are not finite"):
        grpo.run(config, str(self.workdir))
      failed = [int(p.name) for p in (self.workdir / "checkpoints").iterdir()]
      grpo.run(config, str(self.workdir))
      whole, other = self._model(self.workdir), self.workdir.parent / "other"
      grpo.run(config, str(other))
    self.assertIn(max(failed), (1, 2, 3))
    for got, want in zip(jax.tree.leaves(whole), jax.tree.leaves(self._model(other)), strict=True):
      np.testing.assert_array_equal(got, want)

  def test_rates_count_the_pictures_of_all_groups(self):
    plan, job = types.SimpleNamespace(group=2), types.SimpleNamespace(workdir="")
    setup = types.SimpleNamespace(config=self.config, job=job, plan=plan, groups=(("a", "b"), ("c",)))
    self.assertEqual(grpo.Run(setup)._settings().batch_size, 2 * 2 * 1.5)

  def test_the_config_has_the_defaults_of_rewards(self):
    given = grpo_config.get_config().rewards.to_dict()
    self.assertEqual(given, rewards.DEFAULTS | {"weights": given["weights"]})

  def test_every_variant_fits_the_weights_inside_the_package(self):
    for arg in ("", "paper", "fast", "cps", "guard", "nft,lora"):
      config = grpo_config.get_config(arg).unlock()
      config.watch.update({"pictures": 2, "prompts": 1})
      setup = aligned.prepare(config.lock(), str(self.workdir))
      self.assertEqual(setup.job.config.data.size, 128, arg)
      names = [[route.name for route in group] for group in setup.groups]
      f8, f16 = ["max-f8", "lite-f8"], ["max-f16", "lite-f16"]
      self.assertEqual(names, [f8] if arg == "guard" else [f8, f16], arg)
      plan = {"": (2, 0, 8), "nft,lora": (2, 0, 8), "paper": (9, 0, 8)}.get(arg, (3, 2, 6))
      self.assertEqual((setup.plan.window, setup.plan.first, setup.plan.last), plan)
    self.assertFalse(self.workdir.exists())

  def test_runs_begun_with_fields_that_are_gone_go_on_where_these_did_nothing(self):
    begun = self.config.copy_and_resolve_references().unlock()
    begun.objective.guard, begun.rollout.same_noise = False, False
    del begun.objective.anchor
    absent = grpo._absent(self.config)
    workdir.claim_workdir(self.workdir, begun, grpo.NEUTRAL, absent)
    workdir.check_workdir(self.workdir, self.config, grpo.NEUTRAL, absent)
    with self.assertRaisesRegex(ValueError, "objective.anchor: 0.0 -> 1.0"):
      workdir.check_workdir(self.workdir, self._changed(objective={"anchor": 1.0}), grpo.NEUTRAL, absent)
    begun.objective.guard = True
    with self.assertRaisesRegex(ValueError, "objective.guard: False -> True"):
      workdir.check_workdir(self.workdir, begun, grpo.NEUTRAL, absent)

  def test_no_model_to_align(self):
    for init, message in (("", "config.init: alignment needs a finished model"), ("/nowhere", "config.init: no dit")):
      config = self.config.copy_and_resolve_references().unlock()
      config.init = init
      with self.assertRaisesRegex(ValueError, message):
        aligned.prepare(config.lock(), str(self.workdir))


if __name__ == "__main__":
  absltest.main()
