"""A workdir refuses another configuration and says what differs."""

import json
import os
import tempfile

import ml_collections
from absl.testing import absltest

from elasticdit_jax.train import workdir


def _config(**train):
  return ml_collections.ConfigDict(
    {"task": "uwco", "train": {"steps": 10, "log_every": 5} | train, "phases": (1, 2), "note": None}
  )


class WorkdirTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.path = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "run")

  def test_the_same_configuration_may_come_back(self):
    workdir.claim_workdir(self.path, _config())
    with open(f"{self.path}/config.json") as f:
      self.assertEqual(json.load(f)["train"], {"steps": 10, "log_every": 5})
    workdir.claim_workdir(self.path, _config())

  def test_a_difference_is_shown_and_nothing_is_written(self):
    workdir.claim_workdir(self.path, _config())
    with self.assertRaises(ValueError) as caught:
      workdir.claim_workdir(self.path, _config(steps=20, new=1))
    message = str(caught.exception)
    self.assertIn("train.steps: 10 -> 20", message)
    self.assertIn("train.new: '(not set)' -> 1", message)
    self.assertIn("--workdir", message)
    self.assertNotIn("\n", message)
    with open(f"{self.path}/config.json") as f:
      self.assertEqual(json.load(f)["train"]["steps"], 10)

  def test_checking_alone_creates_nothing(self):
    workdir.check_workdir(self.path, _config())
    self.assertFalse(os.path.exists(self.path))

  def test_neutral_fields_and_sub_configs_may_change(self):
    workdir.claim_workdir(self.path, _config())
    workdir.claim_workdir(self.path, _config(log_every=7), neutral=("train.log_every",))
    workdir.claim_workdir(self.path, _config(log_every=9, steps=3), neutral=("train",))
    with self.assertRaisesRegex(ValueError, "train.log_every: 9 -> 7"):
      workdir.check_workdir(self.path, _config(log_every=7, steps=3), neutral=("train.log", "train.steps"))

  def test_a_field_of_a_later_version_stands_for_what_runs_without_it_do(self):
    workdir.claim_workdir(self.path, _config())
    workdir.claim_workdir(self.path, _config(new=1.0), absent={"train.new": 1.0})
    with self.assertRaisesRegex(ValueError, "train.new: 1.0 -> 2.0"):
      workdir.check_workdir(self.path, _config(new=2.0), absent={"train.new": 1.0})

  def test_a_field_that_is_gone_may_have_had_the_value_that_stands_for_it(self):
    workdir.claim_workdir(self.path, _config(old=False))
    workdir.check_workdir(self.path, _config(), absent={"train.old": False})
    with self.assertRaisesRegex(ValueError, "train.old: False -> True"):
      workdir.check_workdir(self.path, _config(), absent={"train.old": True})

  def test_a_file_is_no_workdir(self):
    with open(self.path, "w") as f:
      f.write("mine")
    with self.assertRaisesRegex(ValueError, "run is a file; choose another --workdir"):
      workdir.check_workdir(self.path, _config())

  def test_a_damaged_file_is_named(self):
    os.makedirs(self.path)
    with open(f"{self.path}/config.json", "w") as f:
      f.write('{"train"')
    with self.assertRaisesRegex(ValueError, "config.json is no readable JSON"):
      workdir.check_workdir(self.path, _config())


if __name__ == "__main__":
  absltest.main()
