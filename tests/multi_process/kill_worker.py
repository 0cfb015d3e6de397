"""A loop over a few numbers that can be killed at any moment; leaves WORKDIR/final.npy.

python -m tests.multi_process.kill_worker WORKDIR
"""

import os
import sys
import time

import jax.numpy as jnp
import numpy as np
from absl import logging

from elasticdit_jax.train import checkpoint, loop
from tests.multi_process import loop_worker

_STOP = 60


def _step(state, batch, number):
  time.sleep(0.01)
  return loop_worker.train(state, jnp.asarray(batch) * 0.37 * (number + 1))


def _hook(workdir):
  def hook(state):
    os.makedirs(f"{workdir}/snapshots", exist_ok=True)
    with open(f"{workdir}/snapshots/{int(state['step'])}.json", "w") as f:
      f.write("{}")
    return state | {"w": state["w"] * 0.5}

  return hook


def main(workdir: str) -> None:
  logging.set_verbosity(logging.INFO)
  os.makedirs(workdir, exist_ok=True)
  settings = loop.Settings(_STOP, log_every=10, save_every=4, batch_size=4, resume_command="again")
  with checkpoint.Checkpointer(workdir) as saver:
    restored = saver.restore_latest(loop_worker.initial())
    state, meta = restored or (loop_worker.initial(), {"data_step": 0})
    state = loop.run(
      state,
      loop_worker.batches,
      _step,
      settings,
      start=meta["data_step"],
      checkpoint=saver,
      hooks={25: _hook(workdir), 45: _hook(workdir)},
    )
  np.save(f"{workdir}/final.npy", np.asarray(state["w"]))


if __name__ == "__main__":
  main(sys.argv[1])
