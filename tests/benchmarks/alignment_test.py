"""The benchmark of alignment: its table, and a clock that ends a run."""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest

from elasticdit_jax import elastic
from elasticdit_jax.train import aligned, grpo, watch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import alignment  # noqa: E402


def scored(overall, counting, loss):
  score = {"unseen": {"strict": {"overall": overall, "counting": counting}}}
  return {"max-f8": {"score": score, "loss": loss}, "lite-f8": {"score": score, "loss": loss}}


def run(variant, seed, gain):
  return {
    "variant": variant,
    "seed": seed,
    "seconds": [0.0, 9.0],
    "records": [{"step": 0, "reward": 0.5}, {"step": 20, "reward": 0.6}, {"step": 40, "reward": 0.9}],
    "best": 1,
    "before": scored(0.5, 0.4, 0.3),
    "after": scored(0.5 + gain, 0.4 + 2 * gain, 0.306),
  }


class AlignmentTest(absltest.TestCase):
  def test_table_holds_means_over_seeds(self):
    header, _, first, second = alignment.table([run("nft", 0, 0.1), run("nft", 1, 0.2), run("fast", 0, 0.0)]).split(
      "\n"
    )[:4]
    self.assertIn("loss rise", header)
    self.assertEqual(
      [cell.strip() for cell in first.strip("|").split("|")],
      ["nft", "2", "40", "0.60 ± 0.00", "65.00 ± 5.00", "15.00 ± 5.00", "30.00 ± 10.00", "2.00 ± 0.00"],
    )
    self.assertStartsWith(second, "| fast | 1 |")

  def test_curves_are_relative_to_the_given_weights(self):
    looks = [(None, 0.5, 0.3), (0.6, 0.7, 0.306), (0.8, 0.75, 0.315)]
    records = [
      {"step": i, "training_reward": training, "reward": reward, "routes": {"a": {"loss": loss}, "b": {"loss": loss}}}
      for i, (training, reward, loss) in enumerate(looks)
    ]
    training, held_out, rise = alignment._curves(records)
    np.testing.assert_equal(training, [np.nan, 0.6, 0.8])
    self.assertEqual(held_out, [0.5, 0.7, 0.75])
    np.testing.assert_allclose(rise, [0, 2, 5], atol=1e-9)
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "curves.png"
    found = run("nft", 0, 0.1) | {"records": records, "seconds": [0.0, 60.0, 120.0], "options": {"wall": False}}
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
      with self.assertLogs(level="WARNING") as told:
        alignment.curves([found], str(path))
    self.assertIn("pip install '.[notebook]'", told.output[0])
    self.assertFalse(path.exists())
    if importlib.util.find_spec("matplotlib"):
      alignment.curves([found, found | {"variant": "fast"}], str(path))
      self.assertEqual(path.read_bytes()[:4], b"\x89PNG")

  def test_a_finished_run_is_taken_for_no_other(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    options = argparse.Namespace(
      out=str(folder), init="shipped", routes="", minutes=1.0, every=10, epochs=9, per_task=1, wall=False
    )
    given = {name: value for name, value in vars(options).items() if name != "out"}
    (folder / "nft-0").mkdir()
    (folder / "nft-0" / "alignment.json").write_text(json.dumps({"options": given, "seed": 0}))
    self.assertEqual(alignment.measure(options, "nft", 0)["seed"], 0)
    options.minutes = 5.0
    with self.assertRaisesRegex(ValueError, "was measured with .*'minutes': 1.0.* give another --out"):
      alignment.measure(options, "nft", 0)
    (folder / "nft-1").mkdir()
    with self.assertRaisesRegex(ValueError, "nft-1 was interrupted, and its clock is lost; remove it"):
      alignment.measure(options, "nft", 1)

  def test_routes_that_are_not_trained_are_left_out(self):
    routes = elastic.standard_routes(4)
    groups = ((routes["max-f8"], routes["lite-f8"]), (routes["max-f8"],))
    blank = {field.name: None for field in dataclasses.fields(aligned.Setup)}
    setup = alignment.trained_alone(aligned.Setup(**blank | {"routes": routes, "groups": groups}))
    self.assertEqual(list(setup.routes), ["max-f8", "lite-f8"])

  def test_a_run_ends_at_the_first_look_after_its_time(self):
    clock = iter([100.0, 104.0, 104.5, 111.0, 112.0])
    timed = alignment.TimedRun.__new__(alignment.TimedRun)
    timed._now, timed._seconds, timed._mark, timed.spent = lambda: next(clock), 10.0, 0.0, []
    with mock.patch.object(grpo.Run, "look", lambda self, n, state: self.decide(watch.Verdict(0, ""))):
      verdicts = [timed.look(n, None) for n in range(3)]
    self.assertEqual(timed.spent, [0.0, 4.0, 10.5])
    self.assertEqual([v.stop for v in verdicts], ["", "", "the time is over"])


if __name__ == "__main__":
  absltest.main()
