"""Watches an alignment run on prompts it does not train on, keeps the best weights, and says when to stop.

A reward that is only a proxy can be pleased without better pictures. Three signs, measured every few epochs without
noise in the sampler: the reward of held-out prompts, the flow-matching loss of held-out pictures (how far the model has
left the data), and how much the pictures of one prompt differ.

WORKDIR/watch.json  the records
WORKDIR/best/       the model of the best record

Several processes measure together; process 0 writes, and the records that it holds decide on all of them.
"""

import dataclasses
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from elasticdit_jax import distributed
from elasticdit_jax.elastic import Route
from elasticdit_jax.evals import pictures
from elasticdit_jax.evals.diversity import diversity
from elasticdit_jax.interop import model_dir, weights
from elasticdit_jax.train.job import Job
from elasticdit_jax.train.prompts import Prompt
from elasticdit_jax.train.rewards import Reward, combine
from elasticdit_jax.train.rollout import Sampler
from elasticdit_jax.train.writer import Writer

_PER_PROMPT = 4
_SHOWN = 8
_KEY = 20_505  # of the noise: the same pictures of every run
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Limits:
  """When a run is over before its last epoch.

  Attributes:
    loss: largest rise of any route's held-out flow-matching loss, as a share of its first value.
    diversity: largest fall of any route's diversity, likewise.
    patience: records in a row with a held-out reward below the best while the training reward is above that time's.
  """

  loss: float
  diversity: float
  patience: int


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Attributes: best (number of the best record), stop (why the run should end, or "")."""

  best: int
  stop: str


def judge(records: Sequence[Record], limits: Limits) -> Verdict:
  """What the records say; a pure function, so that a resumed run decides alike.

  Args:
    records: in order, {"step", "training_reward" (None in the first), "reward" (mean over routes), "error" (standard
      error of that; older runs have none), "routes": {name: {"loss", "diversity", ...}}}.
    limits: see Limits.

  Raises:
    ValueError: the first record holds numbers that are not finite.
  """
  broken = [_broken(record, records[0], limits) for record in records]
  good = [i for i, why in enumerate(broken) if not why]
  if not good:
    raise ValueError(f"config.init: the given weights are no start: {broken[0]}")
  best = _best(records, good)
  if broken[-1]:
    return Verdict(best, broken[-1])
  recent = records[-limits.patience :]
  # Before the first look nothing was trained: what the given weights drew until the second one counts in its place.
  if max(best, 1) + limits.patience < len(records):
    before, least = records[best], records[max(best, 1)]["training_reward"]
    if all(r["reward"] < before["reward"] and r["training_reward"] > least for r in recent):
      return Verdict(
        best,
        f"the reward of held-out prompts has been below that of step {before['step']} {limits.patience} times"
        " while the training reward rose",
      )
  return Verdict(best, "")


def _best(records: Sequence[Record], good: Sequence[int]) -> int:
  """The last of `good` that the highest reward does not beat by more than chance; the given weights where they have it.

  The highest of many looks is a lucky one. As long as a run is within its limits and not seen to fall, longer training
  is the better guess; but weights that nothing has beaten stay as they are.
  """
  highest = max(good, key=lambda i: (records[i]["reward"], -i))
  if not highest:
    return 0
  top, given = records[highest]["reward"], records[0]["reward"]
  later = [(i, records[i]) for i in good if i >= highest]
  return max(i for i, r in later if r["reward"] > given and r["reward"] >= top - r.get("error", 0.0))


def _broken(record: Record, first: Record, limits: Limits) -> str:
  """Which limit a record is beyond, or ""."""
  for name, found in record["routes"].items():
    start = first["routes"][name]
    loss, least = start["loss"] * (1 + limits.loss), start["diversity"] * (1 - limits.diversity)
    if not found["loss"] <= loss:  # nor is NaN
      return f"the held-out flow-matching loss of {name} is {found['loss']:.4f}, above the limit {loss:.4f}"
    if not found["diversity"] >= least:
      return f"the diversity of {name} is {found['diversity']:.4f}, below the limit {least:.4f}"
  return ""


class Watch:
  """The records of one run.

  Args:
    job: of the run.
    sampler: draws as in training, here without noise in the steps.
    reward: scores.
    prompts: held-out ones.
    routes: those that are trained.
    limits: see Limits.
    writer: where numbers and pictures go as well.
    start: completed epochs; later records of an interrupted start are dropped.
  """

  def __init__(
    self,
    job: Job,
    sampler: Sampler,
    reward: Reward,
    prompts: Sequence[Prompt],
    routes: Sequence[Route],
    limits: Limits,
    writer: Writer,
    start: int,
  ):
    self._job, self._sampler, self._reward, self._routes = job, sampler, reward, tuple(routes)
    self._limits, self._writer = limits, writer
    self._rows = [prompt for prompt in prompts for _ in range(_PER_PROMPT)]
    self._validation = job.validation()
    self._key = job.layout.build(lambda: jax.random.key(_KEY))
    self._path = os.path.join(job.workdir, "watch.json")
    self.records: list[dict[str, Any]] = []
    if start and os.path.isfile(self._path):
      with open(self._path) as f:
        self.records = json.load(f)
    # The hook of step `start` happens again.
    self.records = [record for record in distributed.from_first("watch", self.records) if record["step"] < start]

  def look(
    self, step: int, params: Any, model: Callable[[], model_dir.Model], training_reward: float | None
  ) -> Verdict:
    """Measures, writes a record, and keeps the model where the verdict falls on it.

    Args:
      step: completed epochs.
      params: the averaged weights.
      model: makes the same with everything around, to keep; called on all processes or on none.
      training_reward: mean over the epochs since the last look; None at the start.
    """
    begin, routes, shown, variances = time.perf_counter(), {}, {}, []
    for route in self._routes:
      images, scores = self._sampler.pictures(params, self._rows, route, self._key)
      total = combine(scores, self._reward.weights)
      variances.append(total.var() / len(total))
      shown[route.name] = images[::_PER_PROMPT][:_SHOWN]
      routes[route.name] = {
        "reward": float(total.mean()),
        "scores": {name: float(values.mean()) for name, values in scores.items()},
        "loss": self._validation.loss(params, route),
        "diversity": diversity(images.reshape(-1, _PER_PROMPT, *images.shape[1:])),
      }
    reward = float(np.mean([found["reward"] for found in routes.values()]))
    error = float(np.sqrt(np.sum(variances)) / len(routes))
    record = {"step": step, "training_reward": training_reward, "reward": reward, "error": error, "routes": routes}
    self.records.append(distributed.from_first("watch", record))
    verdict = judge(self.records, self._limits)
    if verdict.best == len(self.records) - 1:
      kept = model()
      distributed.on_first("best model", lambda: model_dir.save(os.path.join(self._job.workdir, "best"), kept))
    distributed.on_first("watch", lambda: self._write(step, routes, shown))
    logging.info("watch %d: %s (%.0f s)", step, _line(routes), time.perf_counter() - begin)
    return verdict

  def best(self, verdict: Verdict) -> tuple[int, Any]:
    """(epoch, weights) of the best record, laid out.

    Raises:
      ValueError: where processes read different weights.
    """
    path = os.path.join(self._job.workdir, "best", "dit.safetensors")
    if distributed.several():
      with open(path, "rb") as f:
        distributed.check_same(path, {"checksum": zlib.crc32(f.read())})
    params = jax.tree.map(jax.numpy.asarray, weights.load_tree(path))
    return self.records[verdict.best]["step"], self._job.layout.build(lambda tree: tree, params)

  def notes(self, verdict: Verdict) -> list[str]:
    """Sentences for the report: what the reward cost, from the first record to the best."""
    first, best = self.records[0], self.records[verdict.best]
    notes = [f"Weights of epoch {best['step']}, chosen by {len(self.records)} looks at held-out prompts."]
    for name, found in best["routes"].items():
      start = first["routes"][name]
      notes.append(
        f"{name}: held-out reward {start['reward']:.3f} -> {found['reward']:.3f}; held-out flow-matching loss"
        f" {100 * (found['loss'] / start['loss'] - 1):+.1f} %; diversity {start['diversity']:.4f} ->"
        f" {found['diversity']:.4f}."
      )
    return notes

  def _write(self, step: int, routes: Mapping[str, Any], shown: Mapping[str, np.ndarray]) -> None:
    with open(f"{self._path}.partial", "w") as f:
      json.dump(self.records, f, indent=1)
    os.replace(f"{self._path}.partial", self._path)
    for name, found in routes.items():
      self._writer.scalars(step, {f"watch_{key}/{name}": found[key] for key in ("reward", "loss", "diversity")})
    captions = [row.text for row in self._rows[::_PER_PROMPT][:_SHOWN]]
    self._writer.image(step, "watch", pictures.grid(captions, shown))


def _line(routes: Mapping[str, Any]) -> str:
  return ", ".join(
    f"{name} reward {r['reward']:.3f} loss {r['loss']:.4f} diversity {r['diversity']:.3f}" for name, r in routes.items()
  )
