"""A run killed at random moments ends with the bytes of an unbroken one; a run that differs is told."""

import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SCRIPT = str(_ROOT / "benchmarks" / "kills.py")
# Differs from start to start, as a run would that does not resume.
_FORGETS = "import sys, os, time; p = sys.argv[1]; os.makedirs(p + '/checkpoints', exist_ok=True); "
_FORGETS += "sys.stderr.write('first step in'); sys.stderr.flush(); time.sleep(0.3); "
_FORGETS += "open(p + '/final.npy', 'w').write(str(os.getpid()))"


def _kills(number, *command):
  options = [f"--kills={number}", "--flag=", "--results=final.npy", "--"]
  environment = os.environ | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
  with tempfile.TemporaryDirectory() as root:
    return subprocess.run(
      [sys.executable, _SCRIPT, f"--root={root}", *options, *command],
      capture_output=True,
      text=True,
      check=False,
      env=environment,
      cwd=_ROOT,
    )


class KillsTest(absltest.TestCase):
  def test_three_kills_leave_no_trace(self):
    done = _kills(3, sys.executable, "-m", "tests.multi_process.kill_worker")
    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
    self.assertIn("3 kills (1 by step, 1 by save, 1 by phase), 3 resumes", done.stdout)
    self.assertIn("0 results differ", done.stdout)

  def test_a_run_that_differs_is_told(self):
    done = _kills(1, sys.executable, "-c", _FORGETS)
    self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
    self.assertIn("differs: final.npy", done.stdout)


if __name__ == "__main__":
  absltest.main()
