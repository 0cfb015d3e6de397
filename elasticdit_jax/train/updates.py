"""The updates of an epoch of alignment: which rows of which pictures, micro-batch by micro-batch.

pictures whose advantage is not 0 --x their times--> rows --objective, divergence, anchor--> gradient --> weights
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from elasticdit_jax.elastic import Route
from elasticdit_jax.train import policy as policy_lib
from elasticdit_jax.train.policy import Policy, PolicyState
from elasticdit_jax.train.rollout import Drawn, Sampler


@dataclasses.dataclass(frozen=True)
class Updater:
  """Makes the updates of epochs.

  Attributes:
    policy: what is trained, and the compiled parts.
    sampler: of the rollout; the updates ask for velocities as it did.
    count: updates of an epoch, on disjoint parts of its pictures.
    seed: of the run; decides the parts.
    trainable: every route of the run; see Policy.apply.
  """

  policy: Policy
  sampler: Sampler
  count: int
  seed: int
  trainable: tuple[Route, ...]

  def epoch(
    self, state: PolicyState, drawing: Any, drawn: Mapping[Route, Drawn], number: int
  ) -> tuple[PolicyState, dict[str, float]]:
    """All updates of epoch `number`; `drawing` are the weights that drew. Returns (state, means over the updates)."""
    parts = self.split(drawn, number)
    # Of the weights that drew, before the first update changes them; where they are those in training it needs none.
    late = range(1 if state.old is None else 0, self.count)
    before = {(u, r): [*self._before(drawing, d, r, parts[u][r])] for u in late for r, d in drawn.items()}
    totals: dict[str, list[float]] = {}
    for u, part in enumerate(parts):
      if any(map(len, part.values())):
        state, sums = self._update(state, drawn, part, {route: before.get((u, route), ()) for route in part})
        for name, value in jax.device_get(sums).items():
          totals.setdefault(name, []).append(float(value))
    return state, {name: float(np.mean(values)) for name, values in totals.items()}

  def split(self, drawn: Mapping[Route, Drawn], number: int) -> list[dict[Route, np.ndarray]]:
    """The rows of every update of epoch `number`, indices into Drawn's M: all times of a picture in one update.

    One time after the other, so that those of the anchor come last: most of their micro-batches have no other rows, and
    need neither velocities of the weights that drew nor guidance.
    """
    rng = np.random.default_rng([self.seed, number, 2])
    parts: list[dict[Route, np.ndarray]] = [{} for _ in range(self.count)]
    for route, d in drawn.items():
      pictures = len(d.advantage)
      rows = rng.permutation(np.flatnonzero(d.advantage))[:, None] + np.arange(0, len(d.x), pictures)
      for part, chosen in zip(parts, np.array_split(rows, self.count), strict=True):
        part[route] = chosen.T.reshape(-1)
    return parts

  def _before(self, drawing: Any, d: Drawn, route: Route, index: np.ndarray) -> Iterator[jax.Array]:
    for rows in micro_batches(np.int32(index[_rewarded(d, index)]), self.sampler.plan.batch):
      if d.velocity is not None:
        yield policy_lib.known(d.velocity, rows, cfg=self.policy.cfg)
        continue
      yield policy_lib.velocities(
        drawing,
        d.x,
        d.row.t,
        d.text,
        self.sampler.null,
        self.sampler.scale,
        rows,
        cfg=self.policy.cfg,
        route=route,
      )

  def _update(
    self,
    state: PolicyState,
    drawn: Mapping[Route, Drawn],
    parts: Mapping[Route, np.ndarray],
    before: Mapping[Route, Sequence[jax.Array]],
  ) -> tuple[PolicyState, dict[str, jax.Array]]:
    """One update; every route of the group that has rows has the same weight in it."""
    total, made = None, self.policy
    routes = sum(len(part) > 0 for part in parts.values())
    for route, d in drawn.items():
      known, share = iter(before[route]), self._weights(d, parts[route]) / routes
      batches = (micro_batches(array, self.sampler.plan.batch) for array in (np.int32(parts[route]), share))
      for rows, (weight, hold) in zip(*batches, strict=True):
        old = next(known, None)
        found = policy_lib.gradients(
          state.params,
          state.reference,
          (d.x, d.goal, d.row, d.text, d.advantage),
          self.sampler.null,
          self.sampler.scale,
          rows,
          weight,
          hold,
          self._unread(d, len(rows)) if old is None else old,
          old is None,
          cfg=made.cfg,
          route=route,
          objective=made.objective,
          scale=made.scale,
          layout=made.layout,
        )
        total = found if total is None else policy_lib.add(total, found)
    grads, sums = total
    return made.apply(state, grads, self.trainable), sums | {"grad_norm": policy_lib.norm(grads)}

  @staticmethod
  def _weights(d: Drawn, index: np.ndarray) -> np.ndarray:
    """float32 [2, rows]: of the objective, and of its anchor; each sums to 1 where it has rows."""
    rewarded = _rewarded(d, index)
    kinds = np.stack([rewarded, ~rewarded]).astype(np.float32)
    return kinds / np.maximum(kinds.sum(axis=1, keepdims=True), 1)

  def _unread(self, d: Drawn, count: int) -> jax.Array:
    """Stands where a program expects velocities that it will not read."""
    return self.policy.layout.spread(np.zeros((count,) + d.x.shape[1:], np.float32))


def _rewarded(d: Drawn, index: np.ndarray) -> np.ndarray:
  """bool, like index: rows that rewards speak about; the others are the anchor's."""
  return index < len(d.x) - d.held


def micro_batches(array: np.ndarray, size: int) -> list[np.ndarray]:
  """Pieces [..., size] of an array [..., rows], in order; the last is filled up with zeros."""
  array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % size)])
  return [array[..., start : start + size] for start in range(0, array.shape[-1], size)]
