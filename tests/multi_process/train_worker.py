"""One process of a training job of a few thousand parameters.

    python -m tests.multi_process.train_worker WORKDIR VAE DEVICES [COORDINATOR PROCESSES PROCESS] [key=value ...]

Keys: any field of the config, such as mesh.fsdp=2; and LOOK=0 for a run without snapshots and report. Losses of every
update go to WORKDIR.losses.<process>.json.
"""

import contextlib
import json
import pathlib
import sys
from unittest import mock

import jax
from absl import logging

from configs import uwco as config_file
from elasticdit_jax import distributed
from elasticdit_jax.train import loop, uwco
from tests.train import small


def config_of(vae: str, changes: dict[str, str]):
  """configs/uwco.py:debug, shrunk; `changes` by dotted name."""
  made = config_file.get_config("debug").unlock()
  made.init, made.vae = "", vae
  made.data.update({"batch_size": 8, "text_dim": 16})
  made.lite.skip = 1
  made.report.update({"per_task": 0, "steps": 1, "pictures": 2})
  made.train.update({"log_every": 1, "save_every": 2})
  for name in made.phases:
    made.phases[name].steps = 4 if name == "warmup" else 0
  made.phases.warmup.routes = "lite-f8"  # beside its teacher; a second route would only add to the compiled program
  return changed(made, changes)


def changed(config, changes: dict[str, str]):
  """The config, locked, with these fields, by dotted name."""
  for name, text in changes.items():
    *sections, field = name.split(".")
    node = config
    for section in sections:
      node = node[section]
    node[field] = type(node[field])(text)
  return config.lock()


def _noting(losses: list):
  """Progress that notes losses."""
  original = loop.progress.Progress.after

  def after(self, step, state, metrics):
    losses.append([step, float(metrics["loss"]), float(metrics["grad_norm"])])
    original(self, step, state, metrics)

  return mock.patch.object(loop.progress.Progress, "after", after)


def main(workdir: str, vae: str, devices: str, *rest: str) -> None:
  jax.config.update("jax_num_cpu_devices", int(devices))
  jax.config.update("jax_disable_most_optimizations", True)
  places, pairs = [r for r in rest if "=" not in r], dict(r.split("=", 1) for r in rest if "=" in r)
  logging.set_verbosity(logging.INFO)
  looks = int(pairs.pop("LOOK", 1))
  config = config_of(vae, pairs)
  losses = []
  place = (places[0], int(places[1]), int(places[2])) if places else (None, None, None)
  with distributed.joined(*place, seconds=120):
    try:
      with (
        small.small_backbone(),
        _noting(losses),
        contextlib.nullcontext() if looks else mock.patch.object(uwco, "Snapshots"),
      ):
        uwco.run(config, workdir)
    finally:
      pathlib.Path(f"{workdir}.losses.{jax.process_index()}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
  main(*sys.argv[1:])
