"""Task `grpo`: aligns a finished model with rewards, by Flow-GRPO (arXiv 2505.05470) or DiffusionNFT (2509.16117).

  epoch k:  prompts k --rollout along each route of the group--> rewards --> advantages within each prompt
            updates 1..U on disjoint parts of the pictures, both routes of a group in one update
            every few epochs: watch (held-out reward, flow-matching loss, diversity), best model kept, perhaps stop

One step of the loop is an epoch, so a checkpoint lies between two epochs and a resumed run repeats whole ones: it ends
with the same bits. The routes of config.rollout.routes take turns as in `uwco`, so one weight set stays elastic.

Rollout and updates run over all devices of all hosts under one layout (config.mesh); rewards are gathered before any
statistic, so that every host decides alike, and as one host alone would.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from elasticdit_jax import distributed, elastic
from elasticdit_jax.elastic import Route
from elasticdit_jax.interop import model_dir
from elasticdit_jax.train import aligned, interrupt, loop, optim
from elasticdit_jax.train.checkpoint import Checkpointer, check_space
from elasticdit_jax.train.policy import PolicyState
from elasticdit_jax.train.prompts import Prompt
from elasticdit_jax.train.rollout import Drawn, Sampler
from elasticdit_jax.train.snapshot import Snapshots
from elasticdit_jax.train.updates import Updater
from elasticdit_jax.train.watch import Verdict, Watch
from elasticdit_jax.train.workdir import check_workdir, claim_workdir, flat_fields
from elasticdit_jax.train.writer import Writer

# May differ between two starts of one run; see uwco.NEUTRAL.
NEUTRAL = (
  "train.log_every",
  "train.save_every",
  "mesh",
  "optimizer.warmup_steps",  # of runs that were begun when there was a choice
  "optimizer.decay_fraction",
  "rollout.batch",
  "report.per_task",
  "rewards.servers",
  *(f"rewards.{name}" for name in ("batch_size", "timeout", "retries", "patience", "threads")),
)
_OF_HOST = "rewards.servers"  # every host may ask one of its own
_SILENT_EPOCHS = 20  # in a row in which no group had two different rewards


def _absent(config: Any) -> dict[str, float]:
  """Fields that came later or went, as runs without them are made."""
  lag = 0.5 if config.objective.name == "nft" else 0.0
  gone = {"objective.guard": False, "rollout.same_noise": False}
  return {"objective.guidance": 1.0, "objective.lag": lag, "objective.anchor": 0.0, **gone}


class _StoppedError(Exception):
  """The watch ended the run; everything is written."""


def run(config: Any, workdir: str) -> None:
  """Runs or resumes an alignment; leaves model/ (the best weights), report.json, report.md and pictures in `workdir`.

  Raises:
    ValueError: for a config or a workdir that does not fit; nothing has been written or drawn then.
    SystemExit: with code 0, where one of several processes is asked to stop while the first scores are waited for.
  """
  check_workdir(workdir, config, NEUTRAL, _absent(config))
  fields = {name: value for name, value in flat_fields(config).items() if name != _OF_HOST}
  distributed.check_same("config", fields | {"--workdir": os.path.abspath(workdir)})
  try:
    setup = aligned.prepare(config, workdir)
  except interrupt.StopError:
    logging.warning("stopped before the first step, nothing is written")
    raise SystemExit(0) from None
  Run(setup).execute()


class Run:
  """One run: epochs, watch, report."""

  def __init__(self, setup: aligned.Setup):
    self.setup, self.job, self.config = setup, setup.job, setup.config
    self.groups = setup.groups
    self.trainable = tuple(dict.fromkeys(route for group in self.groups for route in group))
    self._rewards: list[float] = []  # of the epochs since the last look
    self._silent = 0

  def execute(self) -> None:
    """Restores or initialises, trains, and reports."""
    job, config, setup = self.job, self.config, self.setup
    schedule = optim.schedule(config.optimizer, config.train.epochs * config.objective.updates)
    self.policy = setup.policy(lambda trained: optim.make(config.optimizer, trained, schedule, job.layout.places))
    self.sampler = Sampler(job, setup.plan, self.policy.objective, config.objective.spread, setup.reward)
    current = self.policy.create(setup.weights, config.seed)
    distributed.on_first("workdir", lambda: check_space(job.workdir, current))
    claim_workdir(job.workdir, config, NEUTRAL, _absent(config))
    every = {*range(0, config.train.epochs, config.watch.every), config.train.epochs}
    with Checkpointer(job.workdir, keep=config.train.keep) as checkpoint:
      current, start = self._restore(checkpoint, current)
      logging.info("%s", job.layout.describe())
      with Writer(job.workdir, start) as writer:
        self.snapshots = Snapshots(job, writer)
        self.watch = Watch(job, self.sampler, setup.reward, setup.watched, self.trainable, setup.limits, writer, start)
        with contextlib.suppress(_StoppedError):
          loop.run(
            current,
            self._prompts,
            self._epoch,
            self._settings(),
            start=start,
            checkpoint=checkpoint,
            writer=writer,
            hooks={n: lambda s, n=n: self.look(n, s) for n in every},
          )

  def _restore(self, checkpoint: Checkpointer, template: PolicyState) -> tuple[PolicyState, int]:
    restored = checkpoint.restore_latest(template)
    if not restored:
      return template, 0
    current, meta = restored
    checksum = self.setup.prompts.checksum
    if meta.get("prompts", checksum) != checksum:
      raise ValueError(
        f"config.prompts: other prompts than those of the {int(current.step)} epochs in {self.job.workdir}; give the"
        " file as it was, or another --workdir"
      )
    self._rewards, self._silent = list(meta["rewards"]), meta.get("silent", 0)
    return current, int(current.step)

  def _settings(self) -> loop.Settings:
    """Settings.guard stays off: numbers that are not finite end the run, nothing is ever restored on the way."""
    config, plan = self.config, self.setup.plan
    return loop.Settings(
      stop=config.train.epochs,
      log_every=config.train.log_every,
      save_every=config.train.save_every,
      batch_size=round(config.rollout.prompts * plan.group * np.mean([len(group) for group in self.groups])),
      resume_command=f"the same command with --workdir={self.job.workdir}",
      phase=lambda n: f"{config.task} {'+'.join(route.name for route in self._group(n))}",
      meta=lambda n: {
        "phase": config.objective.name,
        "routes": elastic.routes_to_json(self.setup.routes),
        "rewards": list(self._rewards),  # saved in the background, while the next epoch adds its own
        "silent": self._silent,
        "prompts": self.setup.prompts.checksum,
      },
    )

  def _group(self, n: int) -> tuple[Route, ...]:
    return self.groups[n % len(self.groups)]

  def _prompts(self, start: int) -> Iterator[list[Prompt]]:
    for n in range(start, self.config.train.epochs):
      yield self.setup.prompts.draw(self.config.rollout.prompts, self.config.seed, n)

  def _epoch(self, state: PolicyState, prompts: Sequence[Prompt], n: int) -> tuple[PolicyState, dict[str, float]]:
    """Rollout, rewards and updates of epoch n."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, 1), n)
    drawing = self.policy.weights(state.params if state.old is None else state.old, state.reference)
    first = self.setup.plan.window_at(self.config.seed, n)
    try:
      drawn = {r: self.sampler.rollout(drawing, prompts, r, key, first) for r in self._group(n)}
    except TimeoutError:  # of several processes one hangs or is gone: there is no saving without it
      raise
    except (ValueError, OSError) as e:  # rewards that came to nothing, on all processes: see scoring.settle
      raise interrupt.FailedError from e
    with self.job.layout.active():
      state, sums = self._updates(state, drawing, drawn, n)
    state = self.policy.move_old(state)
    metrics = _summary(drawn, self.setup.plan.group) | sums
    self._rewards.append(metrics["reward"])
    self._silent = self._silent + 1 if metrics["zero_std_share"] == 1 else 0
    if self._silent >= _SILENT_EPOCHS:
      raise ValueError(
        f"config.rewards: in {_SILENT_EPOCHS} epochs no prompt had two pictures with different rewards, so there is"
        " nothing to learn from; weight a reward with finer steps (scene_partial), harder prompts, or a larger group"
      )
    return state.advanced(), metrics

  def _updates(
    self, state: PolicyState, drawing: Any, drawn: Mapping[Route, Drawn], n: int
  ) -> tuple[PolicyState, dict[str, float]]:
    return self.updater().epoch(state, drawing, drawn, n)

  def updater(self) -> Updater:
    """Makes the updates of an epoch; known once the policy and the sampler are."""
    return Updater(self.policy, self.sampler, self.config.objective.updates, self.config.seed, self.trainable)

  def _model(self, params: Any, step: int) -> model_dir.Model:
    return self.job.model(
      self.job.layout.local(params), self.setup.routes, {"task": self.config.task, "epochs": str(step)}
    )

  def look(self, n: int, state: PolicyState) -> PolicyState:
    """Watches; at the start and at the end evaluates every route and reports."""
    params = self.policy.weights(state.ema, state.reference)
    if n == 0:
      self.snapshots.take(0, "given weights", params, self.setup.routes, None)
    training = float(np.mean(self._rewards)) if self._rewards else None
    verdict = self.decide(self.watch.look(n, params, lambda: self._model(params, n), training))
    verdict = Verdict(**distributed.from_first("verdict", dataclasses.asdict(verdict)))
    self._rewards = []
    if verdict.stop or n == self.config.train.epochs:
      if verdict.stop:
        logging.warning("stopped at epoch %d: %s", n, verdict.stop)
      self._finish(n, verdict)
    if verdict.stop:
      raise _StoppedError
    return state

  def decide(self, verdict: Verdict) -> Verdict:
    """The verdict that counts after a look; another kind of run may add reasons to stop."""
    return verdict

  def _finish(self, n: int, verdict: Verdict) -> None:
    epoch, params = self.watch.best(verdict)
    model = self._model(params, epoch)
    distributed.on_first("model", lambda: model_dir.save(os.path.join(self.job.workdir, "model"), model))
    self.snapshots.take(n, f"aligned, {self.config.objective.name}", params, self.setup.routes, None)
    notes = self.watch.notes(verdict) + ([f"Stopped at epoch {n}: {verdict.stop}."] if verdict.stop else [])
    self.snapshots.report(n, model, title=f"{self.config.task}: {self.config.init}", notes=notes)
    logging.info("done: open %s", os.path.join(self.job.workdir, "report.md"))


def _summary(drawn: Mapping[Route, Drawn], group: int) -> dict[str, float]:
  """Means over the pictures of an epoch: by route, reward and task."""
  every = list(drawn.values())
  rewards = np.concatenate([d.rewards for d in every])
  groups = [d.rewards.reshape(-1, group) for d in every]
  spread = np.concatenate([g.std(axis=1) for g in groups])
  metrics = {
    "reward": float(rewards.mean()),
    "group_std": float(spread.mean()),
    "zero_std_share": float(np.mean(np.concatenate([np.ptp(g, axis=1) == 0 for g in groups]))),
  }
  if len(drawn) > 1:
    metrics |= {f"reward/{route.name}": float(d.rewards.mean()) for route, d in drawn.items()}
  for name in every[0].scores:
    metrics[f"score/{name}"] = float(np.mean(np.concatenate([d.scores[name] for d in every])))
  tags = np.array([row.tag for d in every for row in d.prompts])
  for tag in dict.fromkeys(tags):
    metrics[f"task/{tag}"] = float(rewards[tags == tag].mean())
  return metrics
