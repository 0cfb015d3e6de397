"""Kills a training run at random moments, resumes it, and compares what it leaves with an unbroken run, byte by byte.

  python benchmarks/kills.py --kills=50 -- python -m elasticdit_jax.main --config=configs/uwco.py:debug

The command is started as it stands with --workdir=DIR added. Each start of it is killed (SIGKILL) at one of three
moments, in turn: some time after its first step, drawn from the length of the unbroken run; while a checkpoint is being
written; or right after a snapshot, between two phases. A start that ends before its moment is a finished run: its
results are compared, and the next run begins in a new directory. The exit code is 1 where a byte differs, or where a
start that was not killed fails. Moments follow from --seed and the speed of the machine.
"""

import argparse
import glob
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

KINDS = ("step", "save", "phase")
_POLL_SECONDS = 0.002


class Job:
  """Starts of one command in one directory.

  Args:
    command: without --workdir.
    flag: what stands before the directory.
  """

  def __init__(self, command: Sequence[str], flag: str):
    self._command, self._flag = list(command), flag

  def start(self, workdir: str) -> subprocess.Popen:
    """The process; its output goes to WORKDIR.log."""
    os.makedirs(os.path.dirname(workdir), exist_ok=True)
    with open(f"{workdir}.log", "a") as log:
      command = [*self._command, f"{self._flag}{workdir}"]
      return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

  def finish(self, workdir: str) -> float:
    """Runs to the end; returns seconds.

    Raises:
      RuntimeError: where it fails, with the end of its output.
    """
    begin = time.monotonic()
    code = self.start(workdir).wait()
    check(workdir, code)
    return time.monotonic() - begin


def check(workdir: str, code: int) -> None:
  """Raises RuntimeError, with the end of the output, for an exit code that is not 0."""
  if code:
    with open(f"{workdir}.log") as f:
      raise RuntimeError(f"exit code {code} in {workdir}:\n{f.read()[-3000:]}")


def happened(workdir: str, kind: str) -> Callable[[], bool]:
  """Whether something of this kind has happened since this call: ask often."""
  if kind == "step":
    steps = _first_steps(workdir)
    return lambda: _first_steps(workdir) > steps
  pattern = os.path.join(glob.escape(workdir), {"save": "checkpoints/*tmp*", "phase": "snapshots/*.json"}[kind])
  before = set(glob.glob(pattern))

  def new() -> bool:
    now = set(glob.glob(pattern))
    before.intersection_update(now)  # what a restart clears away may come again
    return bool(now - before)

  return new


def _first_steps(workdir: str) -> int:
  if not os.path.exists(f"{workdir}.log"):
    return 0
  with open(f"{workdir}.log") as f:
    return f.read().count("first step in")


def kill_once(job: Job, workdir: str, kind: str, delay: float) -> bool:
  """Starts the job and kills it `delay` seconds after the event; False where it ended before, True where it was killed.

  Raises:
    RuntimeError: where it failed by itself.
  """
  event = happened(workdir, kind)
  process = job.start(workdir)
  moment = None
  while process.poll() is None:
    if moment is None and event():
      moment = time.monotonic() + delay
    if moment is not None and time.monotonic() >= moment:
      process.kill()
      process.wait()
      return True
    time.sleep(_POLL_SECONDS)
  check(workdir, process.returncode)
  return False


def same(a: str, b: str, results: Sequence[str]) -> list[str]:
  """The results that are not the same bytes in both directories."""
  different = []
  for name in results:
    contents = []
    for folder in (a, b):
      with open(os.path.join(folder, name), "rb") as f:
        contents.append(f.read())
    if contents[0] != contents[1]:
      different.append(name)
  return different


def run(job: Job, root: str, kills: int, seed: int, results: Sequence[str]) -> int:
  """Returns how many results differed.

  Raises:
    RuntimeError: where a start failed.
  """
  rng, unbroken = random.Random(seed), os.path.join(root, "unbroken")
  length = job.finish(unbroken)
  _say(f"unbroken run: {length:.1f} s")
  killed, number, bad = 0, 0, 0
  counts = dict.fromkeys(KINDS, 0)
  while killed < kills:
    workdir, here, ended = os.path.join(root, f"run-{number:03d}"), 0, False
    while killed < kills and not ended:
      kind = KINDS[killed % len(KINDS)]
      delay = rng.uniform(0, length / 2) if kind == "step" else rng.uniform(0, 0.05)
      ended = not kill_once(job, workdir, kind, delay)
      if not ended:
        killed, here, counts[kind] = killed + 1, here + 1, counts[kind] + 1
    if not ended:
      job.finish(workdir)
    different = same(unbroken, workdir, results)
    bad += len(different)
    _say(f"run {number}: {here} kills, {'differs: ' + ', '.join(different) if different else 'the same bytes'}")
    if not different:
      shutil.rmtree(workdir)
    number += 1
  kinds = ", ".join(f"{count} by {kind}" for kind, count in counts.items())
  _say(f"{killed} kills ({kinds}), {killed} resumes, {number} runs, {bad} results differ")
  return bad


def _say(line: str) -> None:
  sys.stdout.write(f"{line}\n")
  sys.stdout.flush()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=3)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--root", default="", help="where runs go; a temporary directory where empty")
  parser.add_argument("--results", default="model/dit.safetensors,routes.json", help="files to compare")
  parser.add_argument("--flag", default="--workdir=", help="what stands before the directory on the command line")
  parser.add_argument("command", nargs="+")
  args = parser.parse_args()
  job = Job(args.command, args.flag)
  with tempfile.TemporaryDirectory() as folder:
    bad = run(job, args.root or folder, args.kills, args.seed, args.results.split(","))
  sys.exit(1 if bad else 0)


if __name__ == "__main__":
  main()
