"""The updates of an epoch of alignment: which rows of which pictures, micro-batch by micro-batch.

  pictures whose advantage is not 0 --all trained times--> objective --+
                                                                       +--> gradient, weight by weight
  the same --all times ("x") or one each ("v")--> divergence ----------+

Rows with a divergence come first, so that most micro-batches of the others cost no pass through the reference.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from elasticdit_jax.elastic import Route
from elasticdit_jax.train import policy as policy_lib
from elasticdit_jax.train.policy import Policy, PolicyState
from elasticdit_jax.train.rollout import Drawn, Sampler


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of one route in one update.

  Attributes:
    index: of Drawn's M.
    pulled: how many of them, the first ones, have a divergence from the reference.
  """

  index: np.ndarray
  pulled: int

  def __len__(self) -> int:
    return len(self.index)


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
    # Of the weights that drew, before the first update changes them; the first itself needs none.
    late = range(0 if self.policy.objective.name == "nft" else 1, self.count)
    before = {(u, r): [*self._before(drawing, d, r, parts[u][r])] for u in late for r, d in drawn.items()}
    totals: dict[str, list[float]] = {}
    for u, rows in enumerate(parts):
      if any(map(len, rows.values())):
        state, sums = self._update(state, drawn, rows, {route: before.get((u, route)) for route in rows})
        for name, value in jax.device_get(sums).items():
          totals.setdefault(name, []).append(float(value))
    return state, {name: float(np.mean(values)) for name, values in totals.items()}

  def split(self, drawn: Mapping[Route, Drawn], number: int) -> list[dict[Route, Rows]]:
    """The rows of every update of epoch `number`."""
    rng = np.random.default_rng([self.seed, number, 2])
    parts: list[dict[Route, Rows]] = [{} for _ in range(self.count)]
    for route, d in drawn.items():
      pictures = len(d.advantage)
      times = len(d.x) // pictures
      differ = rng.permutation(np.flatnonzero(d.advantage))
      pulled = self._pulled(rng, len(differ), times)
      rows = differ[:, None] + pictures * np.arange(times)
      for part, these, marks in zip(
        parts, np.array_split(rows, self.count), np.array_split(pulled, self.count), strict=True
      ):
        part[route] = Rows(np.concatenate([these[marks], these[~marks]]), int(marks.sum()))
    return parts

  def _pulled(self, rng: np.random.Generator, pictures: int, times: int) -> np.ndarray:
    """bool [pictures, times], which rows have a divergence."""
    objective = self.policy.objective
    if not objective.kl or objective.divergence == "x":
      return np.full((pictures, times), objective.kl > 0)
    return rng.integers(times, size=(pictures, 1)) == np.arange(times)

  def _before(self, drawing: Any, d: Drawn, route: Route, rows: Rows) -> Iterator[jax.Array]:
    for index, _ in micro_batches(rows.index, self.sampler.plan.batch):
      yield policy_lib.velocities(
        drawing,
        d.x,
        d.row.t,
        d.text,
        self.sampler.null,
        self.sampler.scale,
        index,
        cfg=self.policy.cfg,
        route=route,
      )

  def _update(
    self,
    state: PolicyState,
    drawn: Mapping[Route, Drawn],
    rows: Mapping[Route, Rows],
    before: Mapping[Route, list[jax.Array] | None],
  ) -> tuple[PolicyState, dict[str, jax.Array]]:
    """One update; every route of the group has the same weight in it."""
    total, made = None, self.policy
    for route, d in drawn.items():
      known = before[route]
      for number, (index, weight, pull) in enumerate(self._batches(rows[route], rows)):
        found = policy_lib.gradients(
          state.params,
          state.reference,
          (d.x, d.goal, d.row, d.text, d.advantage),
          self.sampler.null,
          self.sampler.scale,
          index,
          weight,
          pull,
          self._unread(d, len(index)) if known is None else known[number],
          known is None,
          cfg=made.cfg,
          route=route,
          objective=made.objective,
          scale=made.scale,
          layout=made.layout,
        )
        total = found if total is None else policy_lib.add(total, found)
    grads, sums = total
    return made.apply(state, grads, self.trainable), sums | {"grad_norm": policy_lib.norm(grads)}

  def _batches(
    self, rows: Rows, every: Mapping[Route, Rows]
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """(index, weight, pull) of the calls for `rows`, one of `every` route: those that have any count alike."""
    size = self.sampler.plan.batch
    weight = 1 / max(len(rows) * sum(len(each) > 0 for each in every.values()), 1)
    scale = len(rows) / max(rows.pulled, 1)
    for number, (index, real) in enumerate(micro_batches(rows.index, size)):
      pulled = rows.pulled - number * size
      weights = np.float32(weight) * real
      yield index, weights, np.float32(scale) * weights * (np.arange(size) < pulled) if pulled > 0 else None

  def _unread(self, d: Drawn, count: int) -> jax.Array:
    """Stands where a program expects velocities that it will not read."""
    return self.policy.layout.spread(np.zeros((count,) + d.x.shape[1:], np.float32))


def micro_batches(index: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """(int32 [size], float32 [size], 1 for what is real) that cover `index`; the last is filled up with row 0."""
  parts = []
  for start in range(0, len(index), size):
    part = index[start : start + size]
    padded = np.zeros(size, np.int32)
    padded[: len(part)] = part
    parts.append((padded, np.float32(np.arange(size) < len(part))))
  return parts
