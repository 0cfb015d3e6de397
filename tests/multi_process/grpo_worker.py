"""One process of an alignment of a few thousand parameters.

    python -m tests.multi_process.grpo_worker WORKDIR MODEL DEVICES COORDINATOR PROCESSES PROCESS [key=value ...]

What every epoch drew and learned goes to WORKDIR.found.<process>.json, with what happens where the rewards of one host
fail or do not come.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
from unittest import mock

import jax
import numpy as np
from absl import logging

from configs import grpo as config_file
from elasticdit_jax import distributed
from elasticdit_jax.train import grpo, interrupt, rewards, scoring, sharding
from tests.multi_process.train_worker import changed


def brightness(images, prompts, metadata):
  """A score that moves as little as its pictures do, unlike the size of a file."""
  del prompts, metadata
  return {"jpeg_size": images.mean((1, 2, 3)) / 255}


def config_of(model: str, changes: dict[str, str]):
  """configs/grpo.py:debug, shrunk to one prompt, whose four pictures lie on all devices."""
  made = config_file.get_config("debug").unlock()
  made.init, made.data.size = model, 0
  made.rewards.weights = "jpeg_size=1"
  made.rollout.update({"prompts": 1, "group": 4, "steps": 2, "window": 1, "batch": 4})
  made.objective.update({"kl": 0.0, "guidance": 1.0})
  made.optimizer.learning_rate = 1e-3
  made.train.update({"epochs": 2, "save_every": 1})
  made.watch.update({"every": 2, "prompts": 1, "pictures": 4, "loss": 10.0})
  made.report.update({"per_task": 0, "steps": 1, "pictures": 1})
  return changed(made, changes)


def run(config, workdir: str, looks: bool = True) -> list[dict]:
  """The task without its report, and without `looks` at held-out prompts; what each epoch drew and learned."""
  epochs = []
  original_updates, original_epoch = grpo.Run._updates, grpo.Run._epoch

  def updates(self, state, drawing, drawn, n):
    (d,) = drawn.values()
    epochs.append({"own": len(d.images), "rewards": d.rewards.tolist(), "advantage": d.advantage.tolist()})
    return original_updates(self, state, drawing, drawn, n)

  def epoch(self, state, prompts, n):
    state, metrics = original_epoch(self, state, prompts, n)
    epochs[-1] |= {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
    return state, metrics

  with (
    mock.patch.dict(rewards.LOCAL, {("jpeg_size",): brightness}),
    mock.patch.object(grpo.Run, "_updates", updates),
    mock.patch.object(grpo.Run, "_epoch", epoch),
    mock.patch.object(grpo, "Snapshots"),
    contextlib.ExitStack() as stack,
  ):
    if not looks:
      stack.enter_context(mock.patch.object(grpo, "Watch"))
      stack.enter_context(mock.patch.object(grpo.Run, "look", lambda self, n, state: state))
    grpo.run(config, workdir)
  return epochs


def _turns() -> list[int]:
  """Rows that this process answers for where `tensor` spans all devices, and both processes hold all rows."""
  layout = sharding.make(jax.devices(), tensor=sharding.REST)
  numbers, rows = layout.owned(layout.spread(np.arange(5) + 10))
  assert (rows == numbers + 10).all()
  return numbers.tolist()


def _trouble(index: int) -> dict[str, str]:
  """What each process says where the rewards of process 1 fail, and where they do not come and process 0 is stopped."""

  def fails(images, prompts, metadata):
    if index == 1:
      raise ValueError("no such model")
    return brightness(images, prompts, metadata)

  def hangs(images, prompts, metadata):
    if index == 1:
      threading.Event().wait()
    return brightness(images, prompts, metadata)

  found, blank = {}, np.zeros((1, 8, 8, 3), np.uint8)
  for name, source in {"failed": fails, "stopped": hangs}.items():
    reward = rewards.Reward({("jpeg_size",): source}, {"jpeg_size": 1.0})
    if name == "stopped" and index == 0:
      os.kill(os.getpid(), signal.SIGTERM)
    try:
      with mock.patch.object(scoring, "ROUND_SECONDS", 0.2), mock.patch.object(scoring, "_LOG_SECONDS", 0.0):
        scoring.settle(reward, [reward.submit(blank, ["a"])])
    except (ValueError, interrupt.StopError) as e:
      found[name] = f"{type(e).__name__}: {e}"
  return found


def main(workdir: str, model: str, devices: str, *rest: str) -> None:
  jax.config.update("jax_num_cpu_devices", int(devices))
  jax.config.update("jax_disable_most_optimizations", True)
  logging.set_verbosity(logging.INFO)
  places, pairs = rest[:3], dict(r.split("=", 1) for r in rest[3:])
  with distributed.joined(places[0], int(places[1]), int(places[2]), seconds=120):
    found = {"epochs": run(config_of(model, pairs), workdir)}
    found |= {"turns": _turns()} | _trouble(jax.process_index())
    pathlib.Path(f"{workdir}.found.{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
