"""A run begun on one device and ended by two processes of four devices each has the losses of one device."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

import numpy as np
from absl.testing import absltest

from elasticdit_jax.interop import model_dir, weights
from tests.evals import tiny_model

# Relative; sums over devices in another order, through a few updates of Muon and AdamW.
_TOLERANCE = 2e-3
_GRID = ("mesh.fsdp=2", "mesh.tensor=2", "train.accumulate=2")


def free_port() -> int:
  """A port that nobody listens on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


class TrainTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.vae = self.folder / "vae"
    model_dir.save_codecs(self.vae, tiny_model.make((8,)).codecs)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    self.environment = os.environ | cache | {"JAX_PLATFORMS": "cpu"}

  def _start(self, workdir, devices, *rest):
    command = [sys.executable, "-m", "tests.multi_process.train_worker", workdir, self.vae, devices, *rest]
    return subprocess.Popen(
      list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
    )

  def _finish(self, *processes):
    """What they wrote, once all have ended well."""
    outputs = [process.communicate()[0] for process in processes]
    self.assertEqual([process.returncode for process in processes], [0] * len(processes), "\n".join(outputs))
    return outputs

  def _losses(self, workdir, process=0):
    return np.array(json.loads(pathlib.Path(f"{workdir}.losses.{process}.json").read_text()))

  def test_a_run_of_one_device_goes_on_over_two_hosts(self):
    alone, run = self.folder / "alone", self.folder / "run"
    self._finish(self._start(alone, 1, "LOOK=0"))
    want = self._losses(alone)
    np.testing.assert_array_equal(want[:, 0], [1, 2, 3, 4])
    shutil.copytree(alone, run)
    shutil.rmtree(run / "checkpoints" / "4")  # as if it had been stopped after two updates
    shutil.rmtree(run / "model")

    address = f"127.0.0.1:{free_port()}"
    texts = self._finish(*(self._start(run, 4, address, 2, i, *_GRID) for i in range(2)))
    got = self._losses(run)
    np.testing.assert_array_equal(got, self._losses(run, 1))
    np.testing.assert_array_equal(got[:, 0], [3, 4])
    np.testing.assert_allclose(got, want[2:], rtol=_TOLERANCE)
    self._check_files(run, *texts)

  def _check_files(self, run, first, second):
    """Process 0 tells and writes, the other is silent; everything a user came for is there."""
    self.assertIn("8 devices (cpu): data 2 x fsdp 2 x tensor 2; 2 processes", first)
    self.assertIn("img/s", first)
    self.assertNotIn("img/s", second)
    for name in ("report.md", "routes.json", "images/routes.png"):
      self.assertTrue((run / name).is_file(), name)
    self.assertNotEmpty(weights.load_tree(run / "model" / "dit.safetensors"))


if __name__ == "__main__":
  absltest.main()
