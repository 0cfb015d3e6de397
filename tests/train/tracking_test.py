"""Weights & Biases: what it is told, and that a run without it does not notice."""

import sys
import threading
import types
from unittest import mock

from absl.testing import absltest
from ml_collections import ConfigDict

from elasticdit_jax import distributed
from elasticdit_jax.train import tracking


class WandbError(Exception):
  pass


def fake_wandb(**init):
  """Stands in for the modules that mirrored() imports; `init` configures wandb.init."""
  wandb = types.SimpleNamespace(init=mock.Mock(**init), errors=types.SimpleNamespace(Error=WandbError))
  return mock.patch.dict(sys.modules, {"wandb": wandb, "tensorboard": types.ModuleType("tensorboard")}), wandb


class MirroredTest(absltest.TestCase):
  def test_without_a_project_nothing_is_imported(self):
    with mock.patch.dict(sys.modules, {"wandb": None}), tracking.mirrored(None, "runs/a", ConfigDict()):
      pass

  def test_only_the_first_process_mirrors_and_the_others_learn_how_that_went(self):
    modules, wandb = fake_wandb()
    with modules, mock.patch.object(distributed, "on_first") as on_first:
      with tracking.mirrored("p", "a", ConfigDict()):
        on_first.assert_called_once()
    wandb.init.assert_not_called()

  def test_run_is_named_after_the_workdir_and_finished(self):
    modules, wandb = fake_wandb()
    with modules, tracking.mirrored("elastic", "runs/uwco/", ConfigDict({"train": {"steps": 3}})):
      wandb.init.return_value.finish.assert_not_called()
    told = wandb.init.call_args.kwargs
    self.assertEqual((told["project"], told["name"], told["group"]), ("elastic", "uwco", "uwco"))
    self.assertEqual(told["config"], {"train": {"steps": 3}})
    self.assertTrue(told["sync_tensorboard"])
    wandb.init.return_value.finish.assert_called_once_with(exit_code=0)

  def test_the_end_of_the_task_is_the_end_of_the_run(self):
    for error, code in (
      (SystemExit(0), 0),
      (SystemExit(), 0),
      (SystemExit(75), 75),
      (SystemExit("x"), 1),
      (ValueError("bad"), 1),
      (KeyboardInterrupt(), 1),
    ):
      modules, wandb = fake_wandb()
      with modules, self.assertRaises(type(error)), tracking.mirrored("p", "a", ConfigDict()):
        raise error
      wandb.init.return_value.finish.assert_called_once_with(exit_code=code)

  def test_after_an_error_other_processes_do_not_wait_for_the_mirror(self):
    several = {"several": lambda: True, "check_same": mock.Mock(), "on_first": lambda name, work: work()}
    for error in (ValueError("bad"), SystemExit(0)):
      modules, wandb = fake_wandb()
      with modules, mock.patch.multiple(distributed, **several):
        with self.assertRaises(type(error)), tracking.mirrored("p", "a", ConfigDict()):
          raise error
      self.assertEqual(wandb.init.return_value.finish.called, isinstance(error, SystemExit))

  def test_a_mirror_that_does_not_end_changes_nothing(self):
    modules, wandb = fake_wandb()
    wandb.init.return_value.finish.side_effect = RuntimeError("no network")
    with modules, self.assertLogs(level="WARNING") as logs, tracking.mirrored("p", "a", ConfigDict()):
      pass
    self.assertIn("no network", logs.output[0])
    modules, wandb = fake_wandb()
    gate = threading.Event()
    wandb.init.return_value.finish.side_effect = lambda exit_code: gate.wait(30)
    with modules, self.assertLogs(level="WARNING") as logs, mock.patch.object(tracking, "_FINISH_SECONDS", 0.01):
      with self.assertRaisesRegex(ValueError, "of the run"), tracking.mirrored("p", "a", ConfigDict()):
        raise ValueError("of the run")
    gate.set()
    self.assertIn("not finished", logs.output[0])

  def test_missing_package_and_refused_login_name_the_remedy(self):
    with mock.patch.dict(sys.modules, {"wandb": None}):
      with self.assertRaisesRegex(ValueError, r'--wandb: .*; pip install "elasticdit_jax\[wandb\]"'):
        tracking.mirrored("p", "a", ConfigDict()).__enter__()
    modules, _ = fake_wandb(side_effect=WandbError("no key"))
    with modules, self.assertRaisesRegex(ValueError, "--wandb: no key; log in with `wandb login`"):
      tracking.mirrored("p", "a", ConfigDict()).__enter__()


if __name__ == "__main__":
  absltest.main()
