"""The benchmark of an epoch's cost: a line on a small backbone, made of real epochs, pictures and training steps."""

import argparse
import pathlib
import sys
from unittest import mock

import jax
from absl.testing import absltest

from configs import grpo as grpo_config
from elasticdit_jax.interop import model_dir
from tests.evals import tiny_model
from tests.train import small

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import alignment_throughput  # noqa: E402


class AlignmentThroughputTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here
    self.addCleanup(jax.config.update, "jax_disable_most_optimizations", False)
    self.init = small.new_workdir(self).parent / "given"
    model_dir.save(self.init, tiny_model.make((16,)))

  def test_a_line_tells_of_the_pictures_and_rows_of_an_epoch(self):
    config = grpo_config.get_config("debug,fast").unlock()
    # Random weights draw no shapes; the size of a file differs between any two pictures.
    config.rewards.weights = "jpeg_size=1"
    config.rollout.update({"prompts": 2, "group": 2, "steps": 3, "window": 2, "batch": 4})
    config.data.size = 0
    config.watch.update({"prompts": 1, "pictures": 2})
    options = argparse.Namespace(init=str(self.init), repeats=1, variants=["fast"], routes=["lite-f16"])
    with mock.patch.object(alignment_throughput.grpo_config, "get_config", lambda variant: config):
      *_, line = alignment_throughput.table(options)
    variant, route, pictures, rows, *times, share = (cell.strip() for cell in line.strip("| ").split("|"))
    # Two trained steps of every picture.
    self.assertEqual((variant, route, pictures, rows), ("fast", "lite-f16", "4", "8"))
    self.assertLen(times, 3)
    self.assertRegex(share, r"^\d+%$")


if __name__ == "__main__":
  absltest.main()
