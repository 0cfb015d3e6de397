"""What an epoch of alignment costs beside the bare sampler and the bare training step that it is made of.

  python benchmarks/alignment_throughput.py                               # weights inside the package, three variants
  python benchmarks/alignment_throughput.py --variants fast nft --routes max-f8 lite-f16 --init=runs/uwco

An epoch (rollout, decoder, rewards, advantages, updates; no looks) is timed beside generate.Pipeline drawing as many
pictures with as many steps, and the training step of `uwco` (no VAE) over as many rows as the epoch's updates had. The
share is (sampler + training step) / epoch: 100 % would mean that alignment itself costs nothing. What it adds by design
counts against it: the velocities of the given weights (`objective.kl`, `objective.anchor`) and of the weights that
drew (`objective.lag`).

One process, all three in turns; the line is the turn with the median share. CPU time of all threads on a CPU, wall time
elsewhere. Rows vary from epoch to epoch, so a turn compares an epoch with its own rows.
"""

import argparse
import datetime
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
import train_step

from elasticdit_jax.configs import grpo as grpo_config
from elasticdit_jax.elastic import Route
from elasticdit_jax.generate import Pipeline
from elasticdit_jax.train import aligned, grpo, optim, state, step
from elasticdit_jax.train.rollout import Sampler
from elasticdit_jax.types import Batch


class Epochs(grpo.Run):
  """The epochs of a run alone: no looks, checkpoints or files; counts the rows of its updates."""

  def __init__(self, setup: aligned.Setup):
    super().__init__(setup)
    self.policy = setup.policy(lambda trained: optim.make(setup.config.optimizer, trained, 1e-4))
    self.sampler = Sampler(setup.job, setup.plan, self.policy.objective, setup.config.objective.spread, setup.reward)
    self._state, self._number, self.rows = self.policy.create(setup.weights, 0), 0, 0

  def _updates(self, state, drawing, drawn, n):
    self.rows = sum(len(rows) for part in self.updater().split(drawn, n) for rows in part.values())
    return super()._updates(state, drawing, drawn, n)

  def __call__(self) -> None:
    """One more epoch."""
    prompts = self.setup.prompts.draw(self.config.rollout.prompts, self.config.seed, self._number)
    self._state, _ = self._epoch(self._state, prompts, self._number)
    jax.block_until_ready(self._state)
    self._number += 1


def sampling(setup: aligned.Setup, route: Route) -> Callable[[], None]:
  """A call that draws the pictures of an epoch, with nothing around."""
  plan, config = setup.plan, setup.config
  pipeline = Pipeline.load(None if config.init == "shipped" else config.init, batch_size=plan.batch)
  prompts = setup.prompts.draw(config.rollout.prompts, 0, 0)
  texts = [prompt.text for prompt in prompts for _ in range(plan.group)]
  return lambda: pipeline(texts, route=route.name, steps=plan.steps, guidance=plan.guidance)


def training(setup: aligned.Setup, route: Route) -> Callable[[], None]:
  """A call that makes one training step over rollout.batch rows."""
  job, config = setup.job, setup.config
  tx = optim.make(config.optimizer, setup.weights, 1e-4)
  held = {"state": state.create(setup.weights, tx, 0)}
  size, rows = job.config.data.size, setup.plan.batch
  image = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)
  batch = Batch(image, job.encoder.encode([""] * rows), np.zeros(rows, np.int32))
  update = step.make_step(job.cfg, job.flow, tx, ema_decay=0.999)
  codecs = {route.vae: train_step.Averaged(route.vae)}

  def call() -> None:
    held["state"], metrics = update(held["state"], codecs, batch, group=(route,), trainable=(route,))
    jax.block_until_ready((held["state"], metrics))

  return call


def measure(options: argparse.Namespace, variant: str, name: str) -> list[str]:
  """Cells of one line."""
  config = grpo_config.get_config(variant).unlock()
  config.init, config.rollout.routes = options.init, name
  with tempfile.TemporaryDirectory() as folder:
    setup = aligned.prepare(config.lock(), folder)
  epochs = Epochs(setup)
  (route,) = epochs.trainable
  draw, train = sampling(setup, route), training(setup, route)
  clock = 0 if jax.default_backend() == "cpu" else 1
  turns = []
  for _ in range(options.repeats + 1):
    # Of two training steps the second: the first one pays for the memory that the sampler has left.
    whole, drawn, _, trained = (train_step.clock(call)[clock] for call in (epochs, draw, train, train))
    trained *= epochs.rows / setup.plan.batch
    turns.append(((drawn + trained) / whole, whole, drawn, trained, epochs.rows))
  share, *seconds, rows = sorted(turns[1:])[options.repeats // 2]  # the first one compiles
  pictures = config.rollout.prompts * config.rollout.group
  return [variant, name, f"{pictures}", f"{rows}", *(f"{1000 * s:.0f}" for s in seconds), f"{share:.0%}"]


def table(options: argparse.Namespace) -> Iterator[str]:
  """Markdown, a line at a time."""
  yield f"{datetime.date.today()}, jax {jax.__version__}, {jax.devices()[0].device_kind}"
  yield ""
  yield "| variant | route | pictures | rows | epoch, ms | sampler alone | training step alone | share |"
  yield "|---|---|---:|---:|---:|---:|---:|---:|"
  for variant in options.variants:
    for name in options.routes:
      yield f"| {' | '.join(measure(options, variant, name))} |"


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--init", default="shipped", help="model to align")
  parser.add_argument("--routes", nargs="+", default=["max-f8", "lite-f16"])
  parser.add_argument("--variants", nargs="+", default=["fast", "cps", "nft"], help="arguments of configs/grpo.py")
  parser.add_argument("--repeats", type=int, default=5)
  for line in table(parser.parse_args()):
    print(line, flush=True)


if __name__ == "__main__":
  main()
