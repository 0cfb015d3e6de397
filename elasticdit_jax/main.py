"""python -m elasticdit_jax.main --config=configs/TASK.py[:arg,key=value] [--workdir=DIR] [--config.section.field=value]

A config file names a task and holds every number of it; what may follow the colon and how long it takes stands at the
top of the file. The same command again resumes an interrupted run. Default workdir: runs/ and the name of the config.
"""

import errno
import importlib
import logging as python_logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from elasticdit_jax import config_file, huge_pages

TASKS = {
  "uwco": "elasticdit_jax.train.uwco",
  "pretrain": "elasticdit_jax.train.pretrain",
  "grpo": "elasticdit_jax.train.grpo",
  "vae": "elasticdit_jax.train.vae",
  "sample": "elasticdit_jax.generate",
  "evaluate": "elasticdit_jax.evals.evaluate",
  "sparsify": "elasticdit_jax.train.sparsify",
}

# Tasks that write TensorBoard events, which --wandb mirrors.
TRACKED_TASKS = ("uwco", "pretrain", "grpo", "vae")

# Tasks that several processes can share; also the benchmarks of `evaluate`.
SHARED_TASKS = ("uwco", "pretrain", "grpo")

_REMEDIES = {
  errno.ENOSPC: "make room there, or choose another --workdir",
  errno.EDQUOT: "make room there, or choose another --workdir",
  errno.EACCES: "change its permissions, or choose another path",
  errno.EROFS: "choose another --workdir",
}

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Directory of the run; default: runs/ and the name of the config.")
flags.DEFINE_string("coordinator", None, "host:port of process 0; TPU pods, Slurm and MPI need none of these three.")
flags.DEFINE_integer("processes", None, "How many processes train together, each started with this command.")
flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
flags.DEFINE_string("wandb", None, "Project of Weights & Biases that gets what TensorBoard gets.")
flags.DEFINE_boolean("debug", False, "Show tracebacks of errors, and what the libraries log.")


def parse_flags(argv: Sequence[str]) -> str:
  """Parses the command line into FLAGS.config and FLAGS.workdir; returns the name of the run."""
  argv = list(argv)
  if any(re.fullmatch("--?help(short|full|xml)?", arg) for arg in argv):
    return FLAGS(argv)[0]  # prints the help and leaves
  try:
    spec = _take_config(argv)
    default = config_file.load(spec)
    config_file.check_fields(default, argv)
    config = default.copy_and_resolve_references().lock()
    config_flags.DEFINE_config_dict("config", config, sys_argv=argv)
    rest = FLAGS(argv)[1:]
    if rest:
      raise ValueError(f"unexpected argument {rest[0]!r}; options start with two dashes: --{rest[0].lstrip('-')}")
    config_file.check_overrides(default, FLAGS.config)
    if FLAGS.config.task not in TASKS:
      raise ValueError(f"config.task: unknown task {FLAGS.config.task!r}; expected one of {', '.join(TASKS)}")
    if FLAGS.wandb and FLAGS.config.task not in TRACKED_TASKS:
      raise ValueError(f"--wandb: {FLAGS.config.task!r} trains nothing; it is for {', '.join(TRACKED_TASKS)}")
    if FLAGS.config.task != default.task:
      raise ValueError(
        f"config.task: {spec} is for {default.task!r}, got {FLAGS.config.task!r}; choose another --config"
      )
  except (flags.Error, ValueError, TypeError) as e:
    _fail(e, "--debug" in argv)
  return re.sub(r"[^\w.]+", "-", os.path.basename(spec).replace(".py", "", 1)).strip("-")


def _take_config(argv: list[str]) -> str:
  """Removes --config=SPEC or --config SPEC from argv and returns SPEC."""
  found = [i for i, arg in enumerate(argv) if re.fullmatch("--?config(=.*)?", arg)]
  if len(found) > 1:
    raise ValueError(f"--config: expected one, got {len(found)}; start one run after the other")
  if found:
    _, equals, spec = argv.pop(found[0]).partition("=")
    if not equals and found[0] < len(argv):
      spec = argv.pop(found[0])
    if spec:
      return spec
  raise ValueError(f"--config is missing; there are {', '.join(config_file.available())}")


def main(name: str) -> None:
  """Runs the task of FLAGS.config."""
  config = FLAGS.config
  workdir = os.path.join("runs", name) if FLAGS.workdir is None else FLAGS.workdir
  try:
    _set_up_logging()
    _check_place(workdir)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # compiled modules turn Ctrl-C into an ImportError
    _set_up_compiler(quick="debug" in name.split("-"))
    distributed = importlib.import_module("elasticdit_jax.distributed")
    with distributed.joined(FLAGS.coordinator, FLAGS.processes, FLAGS.process) as count:
      _check_shared(config, count)
      if count > 1 and config.task not in SHARED_TASKS:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX keeps it for loops, which ask; files are whole anyway
      task = importlib.import_module(TASKS[config.task])
      tracking = importlib.import_module("elasticdit_jax.train.tracking")
      signal.signal(signal.SIGINT, before)
      with tracking.mirrored(FLAGS.wandb, workdir, config):
        task.run(config, workdir)
  except (ValueError, OSError, FloatingPointError) as e:  # TimeoutError is an OSError
    _fail(e, FLAGS.debug or FLAGS.verbosity > 0)
  except KeyboardInterrupt:
    command = shlex.join(["python", "-m", "elasticdit_jax.main", *sys.argv[1:]])
    sys.stderr.write(f"interrupted; start it again with: {command}\n")
    sys.exit(130)


def _fail(e: Exception, show_traceback: bool) -> NoReturn:
  if show_traceback:
    traceback.print_exception(e)
  text = str(e)
  if isinstance(e, OSError) and e.errno:
    text = ": ".join(filter(None, (e.filename and os.fspath(e.filename), e.strerror)))
    text += f"; {_REMEDIES[e.errno]}" if e.errno in _REMEDIES else ""
  sys.stderr.write(f"error: {' '.join(text.split()) or type(e).__name__}\n")
  # 75: a host was missing or silent, the same command may succeed; launch/train.sh hands it on to what restarts.
  sys.exit(75 if isinstance(e, TimeoutError) else 2)


def _check_place(workdir: str) -> None:
  """Raises ValueError where the workdir cannot be made or written to; makes nothing."""
  if not workdir:
    raise ValueError("--workdir is empty; name a directory, or leave it out for one below runs/")
  there = os.path.abspath(workdir)
  while not os.path.lexists(there):
    there = os.path.dirname(there)
  if not os.path.isdir(there):
    raise ValueError(f"--workdir={workdir}: {there} is a file; choose another --workdir")
  if not os.access(there, os.W_OK | os.X_OK):
    raise ValueError(f"--workdir={workdir}: {there} cannot be written to; choose another --workdir")


def _set_up_logging() -> None:
  """Short lines, and of other libraries only what is a warning; --verbosity or --debug show everything."""
  if FLAGS["verbosity"].present or FLAGS.debug:
    return
  ours = os.path.dirname(os.path.abspath(__file__)) + os.sep
  handler = logging.get_absl_handler()
  handler.addFilter(lambda record: record.levelno >= python_logging.WARNING or record.pathname.startswith(ours))
  handler.setFormatter(python_logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))


def _check_shared(config: Any, count: int) -> None:
  if count > 1 and config.task not in SHARED_TASKS and "benchmark" not in config:
    raise ValueError(
      f"config.task: {config.task!r} runs in one process, here are {count}; start it on one host alone, or choose one"
      f" of {', '.join(SHARED_TASKS)}, or a benchmark of evaluate"
    )


def _set_up_compiler(quick: bool) -> None:
  """Keeps compiled programs between starts; JAX_COMPILATION_CACHE_DIR names another directory.

  Args:
    quick: for the few steps of a `:debug` run: compiles in two thirds of the time what then runs slower.
  """
  import jax  # here, because a mistake on the command line should be answered at once

  if quick:
    jax.config.update("jax_disable_most_optimizations", True)

  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/elasticdit_jax/xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
  huge_pages.restart_with_them()
  app.run(main, flags_parser=parse_flags)
