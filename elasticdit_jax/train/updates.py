"""The updates of an epoch of alignment: which rows of which pictures, micro-batch by micro-batch.

  pictures whose reward differs from their group's --all trained times--> objective --+
                                                                                      +--> gradient --> weights
  every picture --one time--> divergence of velocities from the reference ------------+

A divergence with rows of its own reaches prompts that are always drawn well, or never: rewards are silent there, and
dropping them would leave what the model does with such prompts to chance. It is cheaper, too, than one at every row.
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
  """Rows of one route in one update, indices into Drawn's M.

  Attributes:
    taught: those of pictures whose advantage is not zero.
    anchored: those of the divergence, where it has rows of its own; empty elsewhere.
  """

  taught: np.ndarray
  anchored: np.ndarray

  def __len__(self) -> int:
    return len(self.taught) + len(self.anchored)


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
    before = {(u, r): [*self._before(drawing, d, r, parts[u][r].taught)] for u in late for r, d in drawn.items()}
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
      times = pictures * np.arange(len(d.x) // pictures)
      taught = np.array_split(rng.permutation(np.flatnonzero(d.advantage)), self.count)
      # The first time of a picture is as random as its others.
      anchored = np.array_split(rng.permutation(pictures if self.policy.objective.apart else 0), self.count)
      for part, one, two in zip(parts, taught, anchored, strict=True):
        part[route] = Rows((one[:, None] + times).reshape(-1), two)
    return parts

  def _before(self, drawing: Any, d: Drawn, route: Route, index: np.ndarray) -> Iterator[jax.Array]:
    null, scale = self.sampler.null, self.sampler.scale
    for rows, _ in micro_batches(index, self.sampler.plan.batch, 0.0):
      yield policy_lib.velocities(drawing, d.x, d.row.t, d.text, null, scale, rows, cfg=self.policy.cfg, route=route)

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
      for index, weight, v_old, fresh in self._batches(d, route, rows, before[route]):
        found = policy_lib.gradients(
          state.params,
          state.reference,
          (d.x, d.goal, d.row, d.text, d.advantage),
          self.sampler.null,
          self.sampler.scale,
          index,
          weight,
          v_old,
          fresh,
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
    self, d: Drawn, route: Route, rows: Mapping[Route, Rows], known: list[jax.Array] | None
  ) -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array | None, bool]]:
    """(index, weight, v_old, fresh) of the calls of policy.gradients for one route."""
    batch = self.sampler.plan.batch
    taught, anchored = ({r: getattr(part, kind) for r, part in rows.items()} for kind in ("taught", "anchored"))
    for number, (index, weight) in enumerate(micro_batches(taught[route], batch, _weight(taught, route))):
      yield index, weight, self._unread(d, batch) if known is None else known[number], known is None
    for index, weight in micro_batches(anchored[route], batch, _weight(anchored, route)):
      yield index, weight, None, False

  def _unread(self, d: Drawn, batch: int) -> jax.Array:
    """Stands where a program expects velocities that it will not read."""
    return self.policy.layout.spread(np.zeros((batch,) + d.x.shape[1:], np.float32))


def _weight(rows: Mapping[Route, np.ndarray], route: Route) -> float:
  """Of one row of a route, where the rows of every route that has any count as one."""
  return 1 / max(len(rows[route]) * sum(len(part) > 0 for part in rows.values()), 1)


def micro_batches(index: np.ndarray, size: int, weight: float) -> list[tuple[np.ndarray, np.ndarray]]:
  """(index int32 [size], weight float32 [size]) that cover `index`; the last is filled up with rows of weight 0."""
  parts = []
  for start in range(0, len(index), size):
    part = index[start : start + size]
    padded = np.zeros(size, np.int32)
    padded[: len(part)] = part
    parts.append((padded, np.where(np.arange(size) < len(part), weight, 0).astype(np.float32)))
  return parts
