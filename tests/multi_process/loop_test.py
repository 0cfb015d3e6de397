"""Two processes in one loop: SIGTERM to one stops both at one step; disagreement and absence are named."""

import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from absl.testing import absltest

from elasticdit_jax.train import checkpoint
from tests.multi_process import loop_worker
from tests.multi_process.train_test import free_port


class LoopTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.workdir = f"{cls.enterClassContext(tempfile.TemporaryDirectory())}/run"
    command = [sys.executable, "-m", "tests.multi_process.loop_worker", cls.workdir, f"127.0.0.1:{free_port()}"]
    started = [
      subprocess.Popen(
        [*command, str(i)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
      )
      for i in range(2)
    ]
    outputs = [process.communicate() for process in started]
    if any(process.returncode for process in started):
      raise AssertionError("\n".join(err for _, err in outputs))
    cls.found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]  # gloo talks too
    cls.logs = [err for _, err in outputs]

  def test_both_join(self):
    self.assertEqual([f["joined"] for f in self.found], [2, 2])

  def test_sigterm_to_one_saves_the_same_step_of_both(self):
    first, second = (f["saved"] for f in self.found)
    self.assertEqual(first, second)
    self.assertBetween(first, 21, loop_worker.STOP - 1)
    self.assertIn(f"stopped at step {first}, step {first} is saved", self.logs[0])
    # And one process of one device reads it.
    with checkpoint.Checkpointer(self.workdir) as saver:
      state, meta = saver.restore_latest(loop_worker.initial())
    self.assertEqual(meta["data_step"], first)
    want = loop_worker.initial()
    for batch, _ in zip(loop_worker.batches(0), range(first), strict=False):
      want, _ = loop_worker.train(want, batch)
    np.testing.assert_allclose(state["w"], want["w"], rtol=1e-6)
    self.assertEqual(int(state["step"]), first)

  def test_agreement_is_silent_and_a_difference_is_told_to_all(self):
    for found in self.found:
      self.assertEqual(found["same"], "")
      self.assertStartsWith(
        found["differ"], "ValueError: config: process 0 and process 1 differ in 1 fields (lr: 0.1 and 0.2); start the"
      )

  def test_where_the_first_process_fails_all_fail(self):
    self.assertEqual(self.found[0]["first"], "OSError: [Errno 28] No space left on device")
    self.assertIn("OSError: report: process 0 failed: OSError: [Errno 28] No space", self.found[1]["first"])

  def test_a_barrier_names_who_did_not_come(self):
    message = self.found[0]["missing"]
    self.assertRegex(
      message, r"TimeoutError: the start of training: waited 1 s for process 1 \(.+:\d+\) of 2 processes"
    )


if __name__ == "__main__":
  absltest.main()
