"""The command line: every mistake is one line on stderr, exit code 2, and nothing written."""

import importlib
import inspect
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from elasticdit_jax import main

_ROOT = str(pathlib.Path(__file__).resolve().parent.parent)
_PROGRAM = "from absl import app; from elasticdit_jax import main; main.TASKS['toy'] = 'toy_task'; "
_PROGRAM += "app.run(main.main, flags_parser=main.parse_flags)"
_CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=None):
  if arg not in (None, "debug"):
    raise ValueError(f"unknown argument {arg!r}")
  return ConfigDict({"task": "toy", "raises": "", "train": {"steps": 4, "lr": 0.1, "on": True}, "sizes": (1, 2)})
"""
_TASK = """
import os, time
import jax, jax.numpy as jnp
from elasticdit_jax.train import checkpoint, loop

def step(state, batch, number):
  time.sleep(batch)
  return state, {"loss": jnp.ones(())}

def run(config, workdir):
  if config.raises == "bad":
    raise ValueError("config.data.path: no such\\nfolder")
  if config.raises == "full":
    raise OSError(28, "No space left on device", "x.png")
  if config.raises == "bug":
    raise KeyError("a mistake of ours")
  os.makedirs(workdir)
  with open(f"{workdir}/cache", "w") as f:
    f.write(f"{jax.config.jax_compilation_cache_dir} {jax.config.jax_persistent_cache_min_compile_time_secs}")
    f.write(f" {jax.config.values['jax_disable_most_optimizations']}")
  settings = loop.Settings(config.train.steps, log_every=2, save_every=100, batch_size=1, resume_command="again")
  wait = 0.05 if config.raises == "slow" else 0.0
  with checkpoint.Checkpointer(workdir) as saver:
    loop.run({"w": jnp.ones(3)}, lambda start: iter([wait] * 10000), step, settings, checkpoint=saver)
"""


class MainTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (self.directory / "toy.py").write_text(_CONFIG)
    (self.directory / "toy_task.py").write_text(_TASK)
    self.environment = os.environ | {"PYTHONPATH": f"{_ROOT}{os.pathsep}{self.directory}", "HOME": str(self.directory)}
    self.environment.pop("JAX_COMPILATION_CACHE_DIR", None)

  def _start(self, *arguments):
    return subprocess.Popen(
      [sys.executable, "-c", _PROGRAM, *arguments],
      cwd=self.directory,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def _run(self, *arguments):
    process = self._start(*arguments)
    out, err = process.communicate()
    self.assertEqual(out, "")
    return process.returncode, err

  @parameterized.parameters(
    (["--config=toy.py:debgu"], "unknown argument 'debgu'"),
    (["--config=toy.py", "--config.train.stpes=5"], "--config.train.stpes: did you mean 'steps'?"),
    (
      ["--config=toy.py", "--config.nothing.at.all=5"],
      "--config.nothing.at.all: config has raises, sizes, task, train",
    ),
    (["--config=toy.py", "--config.train.steps=abc"], "--config.train.steps: expected int like 4, got 'abc'"),
    (["--config=toy.py", "--config.train.steps=1.5"], "--config.train.steps: expected int like 4, got '1.5'"),
    (["--config=toy.py", "--config.train.lr="], "--config.train.lr: expected float like 0.1, got ''"),
    (["--config=toy.py", "--config.train.on=maybe"], "--config.train.on: expected bool like True, got 'maybe'"),
    (["--config=toy.py", "--train.steps=5"], "--train.steps: unknown option; did you mean --config.train.steps?"),
    (["--config=toy.py", "--config.task=sample"], "config.task: toy.py is for 'toy', got 'sample'; choose another"),
    (["--config=toy.py", "--config", "toy.py"], "--config: expected one, got 2"),
    (["--config="], "--config is missing"),
    (["--config=toy.py", "--wandb=p"], "--wandb: 'toy' trains nothing; it is for uwco"),
    (["--config=toy.py", "--workdir="], "--workdir is empty; name a directory"),
    (["--config=toy.py", "--workdir=toy.py"], "toy.py is a file; choose another --workdir"),
    (["--config=toy.py", "--workdir=toy.py/run"], "toy.py is a file; choose another --workdir"),
    (["--config=toy.py", "--config.raises=full"], "x.png: No space left on device; make room there"),
    (["--config=toy.py", "--config.train={}"], "--config.train: expected the fields lr, on, steps"),
    (["--config=toy.py", "--config.train={'steps': 'a', 'lr': 1.0, 'on': True}"], "--config.train.steps: expected int"),
    (["--config=toy.py", "--config.sizes=('a', 'b')"], "--config.sizes: expected tuple like (1, 2)"),
    (["--config=toy.py", "config.train.steps=5"], "two dashes: --config.train.steps=5"),
    (["--config=toy.py", "--processes=2"], "give all of --coordinator=HOST:PORT, --processes=N and --process=0..N-1"),
    (["--config=toy.py", "--workdri=x"], "Did you mean: workdir"),
    (["--config=toy.py", "--config.task=nothing"], "unknown task 'nothing'; expected one of uwco, pretrain, grpo, vae"),
    (["--config=configs/nothing.py"], "no config file 'configs/nothing.py', neither here nor in the package"),
    ([], "--config is missing"),
    (["--config=toy.py", "--config.raises=bad"], "config.data.path: no such folder"),
  )
  def test_a_mistake_is_one_line_and_writes_nothing(self, arguments, message):
    code, err = self._run(*arguments)
    self.assertEqual(code, 2, err)
    self.assertEqual(err.count("\n"), 1, err)
    self.assertStartsWith(err, "error: ")
    self.assertIn(message, err)
    self.assertFalse((self.directory / "runs").exists())

  def test_debug_shows_the_traceback_and_bugs_always_do(self):
    for arguments in (["--config.raises=bad", "--debug"], ["--config.raises=bug"]):
      code, err = self._run("--config=toy.py", *arguments)
      self.assertNotEqual(code, 0)
      self.assertIn("Traceback", err)
      self.assertIn("toy_task.py", err)

  def test_runs_with_overrides_shows_progress_and_names_the_workdir(self):
    code, err = self._run(
      "--config", "toy.py:debug", "--config.train.steps=6", "--config.train.lr=2", "--noconfig.train.on"
    )
    self.assertEqual(code, 0, err)
    lines = [line for line in err.splitlines() if "img/s" in line]
    self.assertLen(lines, 3)
    self.assertRegex(lines[-1], r"^I \d\d:\d\d:\d\d train 6/6 loss 1 \|")
    self.assertNotIn("orbax", err)
    cache = (self.directory / "runs" / "toy-debug" / "cache").read_text()
    self.assertEqual(cache, f"{self.directory}/.cache/elasticdit_jax/xla 0.5 True")

  def test_the_environment_names_another_compilation_cache(self):
    self.environment["JAX_COMPILATION_CACHE_DIR"] = f"{self.directory}/elsewhere"
    code, err = self._run("--config=toy.py", "--workdir=here")
    self.assertEqual(code, 0, err)
    cache = (self.directory / "here" / "cache").read_text()
    self.assertEqual(cache, f"{self.directory}/elsewhere 0.5 False")

  @parameterized.parameters((signal.SIGINT, 130), (signal.SIGTERM, 0))
  def test_interruption_saves_and_says_how_to_go_on(self, number, code):
    process = self._start("--config=toy.py", "--config.raises=slow", "--config.train.steps=5000", "--workdir=w")
    while process.poll() is None and "img/s" not in process.stderr.readline():
      time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    self.assertEqual(process.returncode, code, err)
    self.assertRegex(err, r"stopped at step \d+, step \d+ is saved; go on with: again")
    self.assertNotIn("Traceback", err)
    if number == signal.SIGINT:
      self.assertIn("python -m elasticdit_jax.main --config=toy.py", err)
    (saved,) = [p for p in (self.directory / "w" / "checkpoints").iterdir() if p.name.isdigit()]
    self.assertGreater(int(saved.name), 1)

  def test_a_task_of_one_process_is_refused_to_several(self):
    with self.assertRaisesRegex(ValueError, "config.task: 'vae' runs in one process, here are 4; .* uwco, pretrain"):
      main._check_shared(ConfigDict({"task": "vae"}), 4)
    with self.assertRaisesRegex(ValueError, "config.task: 'evaluate' runs in one process, .* or a benchmark"):
      main._check_shared(ConfigDict({"task": "evaluate"}), 2)
    for task, count in (("uwco", 4), ("vae", 1)):
      main._check_shared(ConfigDict({"task": task}), count)

  @parameterized.parameters(sorted(main.TASKS))
  def test_every_task_has_its_run(self, task):
    run = importlib.import_module(main.TASKS[task]).run
    self.assertEqual(list(inspect.signature(run).parameters), ["config", "workdir"])


if __name__ == "__main__":
  absltest.main()
