"""A benchmark that two processes draw together has the files of one process."""

import os
import pathlib
import subprocess
import sys
import tempfile

import jax
from absl.testing import absltest

from configs import evaluate as evaluate_config
from elasticdit_jax.evals import evaluate
from elasticdit_jax.interop import model_dir
from tests.evals import tiny_model
from tests.multi_process.train_test import free_port

_CHANGES = {"routes": "lite-f16", "steps": 1, "batch_size": 4}


class BenchmarkTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.model, self.address = self.folder / "model", f"127.0.0.1:{free_port()}"
    model_dir.save(self.model, tiny_model.make((16,)))

  def _start(self, process: int, workdir: str, **changes) -> subprocess.Popen:
    command = [sys.executable, "-m", "elasticdit_jax.main", "--config=configs/evaluate.py:geneval,debug"]
    given = _CHANGES | {"checkpoint": self.model} | changes
    command += [f"--config.{name}={value}" for name, value in given.items()]
    command += [f"--workdir={self.folder / workdir}", f"--coordinator={self.address}", "--processes=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, f"--process={process}"], env=os.environ | {"JAX_PLATFORMS": "cpu"}, **pipes)

  def test_files_are_those_of_one_process_and_the_first_one_explains(self):
    started = [self._start(process, "shared") for process in range(2)]
    logs = [process.communicate()[0] for process in started]
    self.assertEqual([process.returncode for process in started], [0, 0], "\n".join(logs))
    self.assertIn("evaluate with: ", logs[0])
    self.assertNotIn("evaluate with: ", logs[1])
    config = evaluate_config.get_config("geneval,debug").copy_and_resolve_references()
    config.update(_CHANGES | {"checkpoint": str(self.model)})
    jax.config.update("jax_disable_most_optimizations", True)  # as `:debug` has it
    self.addCleanup(jax.config.update, "jax_disable_most_optimizations", False)
    evaluate.run(config.lock(), str(self.folder / "alone"))
    alone, shared = (
      {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
      for root in (self.folder / "alone", self.folder / "shared")
    )
    self.assertEqual(alone.keys(), shared.keys())
    self.assertGreater(sum(name.endswith(".png") for name in alone), 4)
    self.assertEqual([name for name in alone if alone[name] != shared[name]], [])

  def test_hosts_that_would_draw_different_pictures_are_told(self):
    started = [self._start(process, "other", seed=process) for process in range(2)]
    logs = [process.communicate()[0] for process in started]
    self.assertEqual([process.returncode for process in started], [2, 2], "\n".join(logs))
    for log in logs:
      self.assertIn("error: benchmark: process 0 and process 1 differ in 1 fields (settings: ", log)
    self.assertFalse((self.folder / "other").exists())


if __name__ == "__main__":
  absltest.main()
