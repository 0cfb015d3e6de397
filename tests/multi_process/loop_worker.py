"""One of two processes of a loop over a few numbers; what is found goes to stdout as JSON.

python -m tests.multi_process.loop_worker WORKDIR COORDINATOR PROCESS
"""

import functools
import itertools
import json
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax import distributed
from elasticdit_jax.train import checkpoint, loop, sharding

STOP = 200


@functools.partial(jax.jit, donate_argnums=0)
def train(state, batch):
  """Something that depends on the order of the batches."""
  return {"w": 0.9 * state["w"] + jnp.mean(batch), "step": state["step"] + 1}, {"loss": jnp.sum(state["w"])}


def batches(start, rows=4):
  """Rows of batch `start`, `start + 1` ..."""
  return (np.full(rows, float(step), np.float32) for step in itertools.count(start))


def initial():
  """The state before the first step."""
  return {"w": jnp.zeros(8), "step": jnp.int32(0)}


def _error(work) -> str:
  try:
    work()
  except (ValueError, TimeoutError, OSError) as e:
    return f"{type(e).__name__}: {e}"
  return ""


def _await(mark: pathlib.Path) -> None:
  while not mark.exists():
    time.sleep(0.02)


def _meet(index: int, missed: pathlib.Path) -> dict[str, str]:
  """What happens where hosts disagree, one fails, or one does not come; `missed` appears when that was noticed."""

  def fail():
    raise OSError(28, "No space left on device")

  found = {
    "same": _error(lambda: distributed.check_same("config", {"a": 1, "b": "x"})),
    "differ": _error(lambda: distributed.check_same("config", {"a": 1, "lr": 0.1 * (1 + index)})),
    "first": _error(lambda: distributed.on_first("report", fail)),
  }
  if index == 0:
    found["missing"] = _error(lambda: distributed.barrier("the start of training", seconds=1))
    missed.touch()
  else:
    _await(missed)
  return found


def _train(workdir: str, index: int) -> int:
  """Trains until SIGTERM reaches process 1 alone; returns the step that was saved."""
  layout = sharding.make(jax.devices(), fsdp=2)
  state = layout.build(lambda w: {"w": w, "step": jnp.int32(0)}, np.zeros(8, np.float32))

  def step(state, batch, number):
    if index == 1 and number == 20:
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    with layout.active():
      return train(state, layout.put_batch(batch))

  settings = loop.Settings(STOP, log_every=10, save_every=7, batch_size=8, resume_command="again")
  with checkpoint.Checkpointer(workdir) as saver:
    try:
      loop.run(state, batches, step, settings, checkpoint=saver)
    except SystemExit as e:
      return saver.latest if e.code == 0 else -1
  return -1


def main(workdir: str, coordinator: str, index: str) -> None:
  jax.config.update("jax_num_cpu_devices", 2)
  joined = distributed.initialize(coordinator, 2, int(index), seconds=60)
  missed, left = (pathlib.Path(f"{workdir}.{name}") for name in ("missed", "left"))
  found = {"joined": joined, "saved": _train(workdir, int(index))} | _meet(int(index), missed)
  sys.stdout.write(json.dumps(found))
  sys.stdout.flush()
  # The meeting that failed leaves no way to part in order, and process 0 must be the last to go.
  if index == "0":
    _await(left)
  left.touch()
  os._exit(0)


if __name__ == "__main__":
  main(*sys.argv[1:])
