"""The weights that alignment moves, and the compiled parts of one update.

  gradients(rows of a micro-batch) + gradients(...) + ...  -->  apply  -->  weights, optimiser, EMA

The rows of an update are added up micro-batch by micro-batch (train/updates.py), so that rows that say nothing cost no
pass through the model, and no batch is too large for the memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from elasticdit_jax.elastic import Route
from elasticdit_jax.flow import stochastic
from elasticdit_jax.models import dit
from elasticdit_jax.ops import placement
from elasticdit_jax.train import lora, losses, optim, sharding
from elasticdit_jax.train.state import copy
from elasticdit_jax.train.step import frozen_mask, velocity
from elasticdit_jax.types import Text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyState:
  """What a run of alignment carries from epoch to epoch; a pytree.

  Attributes:
    step: int32 [], completed epochs (rollout and its updates).
    updates: int32 [], completed updates.
    params: what is trained: the weights, or their adapters.
    opt_state, ema: of params.
    key: of the run; epochs fold their number into it.
    reference: the given weights, frozen; adapters are merged into them.
    old: like params, the average that draws (Objective.lag); None where params themselves draw.
  """

  step: jax.Array
  updates: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  key: jax.Array
  reference: Any
  old: Any = None

  def advanced(self) -> "PolicyState":
    """The same after one more epoch."""
    return dataclasses.replace(self, step=self.step + 1)


@dataclasses.dataclass(frozen=True)
class Policy:
  """Everything static about the update.

  Attributes:
    cfg: the backbone.
    objective: what is minimised.
    tx: the optimiser.
    ema_decay: of the average that is evaluated and kept.
    rank, alpha: of the adapters; rank 0 trains the weights themselves.
    layout: where arrays live; cfg is bound to it.
  """

  cfg: dit.DiTConfig
  objective: losses.Objective
  tx: optax.GradientTransformation | None
  ema_decay: float
  rank: int
  alpha: float
  layout: sharding.Layout = dataclasses.field(default_factory=sharding.one_device)

  @property
  def scale(self) -> float:
    """Of the adapters; 0 without."""
    return self.alpha / self.rank if self.rank else 0.0

  def trained(self, weights: Any, key: jax.Array) -> Any:
    """What is trained of these weights: new adapters, or they themselves."""
    return lora.init(weights, self.rank, key) if self.rank else weights

  def create(self, weights: Any, seed: int) -> PolicyState:
    """The state before the first epoch, laid out; every process holds all of `weights`."""
    return self.layout.build(functools.partial(self._create, seed=seed), weights)

  def _create(self, weights: Any, seed: int) -> PolicyState:
    key = jax.random.key(seed)
    params = self.trained(weights, jax.random.fold_in(key, 0))
    old = copy(params) if self.objective.lag else None
    zero = jnp.int32(0)
    return PolicyState(zero, jnp.int32(0), copy(params), self.tx.init(params), copy(params), key, copy(weights), old)

  def weights(self, trained: Any, reference: Any) -> Any:
    """The backbone's weights that a tree like state.params stands for."""
    return _merge(reference, trained, self.scale, self.layout) if self.rank else trained

  def apply(self, state: PolicyState, grads: Any, trainable: tuple[Route, ...]) -> PolicyState:
    """One update; what no route of `trainable` reads keeps its value bit for bit."""
    params, opt_state, ema = _apply(
      state.params, state.opt_state, state.ema, grads, state.updates, self.tx, self.ema_decay, trainable, self.layout
    )
    return dataclasses.replace(state, updates=state.updates + 1, params=params, opt_state=opt_state, ema=ema)

  def move_old(self, state: PolicyState) -> PolicyState:
    """The average that draws, one epoch on: slower to follow later, up to Objective.lag (DiffusionNFT's schedule)."""
    if state.old is None:
      return state
    old = _moved(state.old, state.params, state.step, self.objective.lag, self.layout)
    return dataclasses.replace(state, old=old)


@functools.partial(jax.jit, static_argnames=("scale", "layout"))
def _merge(reference: Any, trained: Any, scale: float, layout: sharding.Layout) -> Any:
  return layout.keep(lora.merge(reference, trained, scale))


@functools.partial(jax.jit, static_argnames=("tx", "decay", "trainable", "layout"))
def _apply(params, opt_state, ema, grads, number, tx, decay, trainable, layout):
  params, opt_state = optim.frozen_update(tx, grads, opt_state, params, frozen_mask(params, trainable))
  return layout.keep((params, opt_state, optim.ema_update(ema, params, number, decay)))


@functools.partial(jax.jit, static_argnames=("lag", "layout"))
def _moved(old, params, epoch, lag, layout):
  decay = jnp.minimum(0.001 * epoch.astype(jnp.float32), lag)
  return layout.keep(jax.tree.map(lambda o, p: decay * o + (1 - decay) * p, old, params))


@functools.partial(jax.jit, static_argnames=("cfg", "route"))
def velocities(
  weights: Any,
  x: jax.Array,
  t: jax.Array,
  text: Text,
  null: Text,
  guidance: jax.Array | None,
  index: jax.Array,
  *,
  cfg: dit.DiTConfig,
  route: Route,
) -> jax.Array:
  """Velocity of rows `index` [m] of M, as the sampler sees it; x [M, ...], t [M], text of B rows."""
  part = _rows(cfg, text, index % len(text.mask))
  return _guided(cfg, weights, _rows(cfg, x, index), _rows(cfg, t, index), part, null, guidance, route)


@functools.partial(jax.jit, static_argnames="cfg")
def known(velocity: jax.Array, index: jax.Array, *, cfg: dit.DiTConfig) -> jax.Array:
  """Rows `index` [m] of velocities that the sampler has asked for, laid out like those of `velocities`."""
  return _rows(cfg, velocity, index)


@functools.partial(jax.jit, static_argnames=("cfg", "route", "objective", "scale", "layout"))
def gradients(
  trained: Any,
  reference: Any,
  rows: tuple[jax.Array, jax.Array, stochastic.Steps, Text, jax.Array],
  null: Text,
  guidance: jax.Array | None,
  index: jax.Array,
  weight: jax.Array,
  hold: jax.Array,
  v_old: jax.Array,
  fresh: jax.Array,
  *,
  cfg: dit.DiTConfig,
  route: Route,
  objective: losses.Objective,
  scale: float,
  layout: sharding.Layout | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
  """Gradient of the objective over a micro-batch, and its sums.

  Args:
    trained, reference: as in PolicyState; `scale` of the adapters, 0 where trained are the weights.
    rows: (x, goal, row, text, advantage) of a rollout, see rollout.Drawn.
    null, guidance: of the sampler.
    index: int32 [m], which of the M rows.
    weight: float32 [m], 0 for padding and for rows of Objective.anchor.
    hold: float32 [m], weights of these.
    v_old: [m, h, w, C], velocity of the weights that drew; not read where `fresh`.
    fresh: bool [], the weights in training are those that drew: their ratio is exactly 1, whatever was fused how.
    cfg, route, objective: static.
    layout: where the gradients go; None leaves it to the compiler.

  Returns:
    (tree like trained, {"loss" and sums of the objective}).
  """
  x, goal, table, text, advantage = rows
  picture = index % len(text.mask)
  part, chosen = _rows(cfg, (text, advantage), picture), _rows(cfg, (x, goal, table), index)
  moments = losses.Moments(*chosen[:2], *part, weight, chosen[2], hold)
  row, part = moments.row, moments.text

  # Rows of the anchor have no guidance; where a micro-batch has no others, its empty branch costs nothing.
  some = jnp.any(weight > 0) if objective.anchor else True

  def scale_of(guidance):
    if guidance is None or not objective.anchor:
      return guidance
    return jnp.where(hold > 0, 1.0, guidance)[:, None, None, None]

  def objective_of(trained):
    weights = lora.merge(reference, trained, scale) if scale else trained
    v = _guided(cfg, weights, moments.x, row.t, part, null, scale_of(guidance), route, some)
    before = jnp.where(fresh, jax.lax.stop_gradient(v), v_old)
    given = None
    if objective.reads_reference:
      pull = scale_of(guidance if objective.guidance == 1 else objective.guidance)
      given = jax.lax.stop_gradient(_guided(cfg, reference, moments.x, row.t, part, null, pull, route, some))
    return losses.loss(objective, v, before, given, moments)

  (value, sums), grads = jax.value_and_grad(objective_of, has_aux=True)(trained)
  return grads if layout is None else layout.keep(grads), sums | {"loss": value}


def _rows(cfg: dit.DiTConfig, tree: Any, index: jax.Array) -> Any:
  """Rows of arrays, split over devices like the batches of the backbone."""
  return jax.tree.map(lambda a: placement.split(jnp.asarray(a)[index], cfg.batch_axes), tree)


def _guided(cfg, weights, x, t, text, null, guidance, route, some=True) -> jax.Array:
  """The guided velocity; the unconditional branch passes no gradient, so it costs no backward pass.

  Where `some`, a bool [], is False every scale is 1, and the branch is not computed.
  """
  v = velocity(cfg, weights, x, t, text, route)
  if guidance is None:
    return v
  empty = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(x),) + a.shape[1:]), null)
  frozen = jax.lax.stop_gradient(weights)
  branch = functools.partial(velocity, cfg, frozen, x, t, empty, route)
  v_null = jax.lax.stop_gradient(branch() if some is True else jax.lax.cond(some, branch, lambda: jnp.zeros_like(v)))
  return v_null + guidance * (v - v_null)


@jax.jit
def add(a: Any, b: Any) -> Any:
  """The sum of two trees."""
  return jax.tree.map(jnp.add, a, b)


norm = jax.jit(optax.tree.norm)
"""Norm of a tree, []."""
