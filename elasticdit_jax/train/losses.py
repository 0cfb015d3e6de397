"""What alignment minimises: advantages of a group of pictures, and two objectives that use them.

  Flow-GRPO (arXiv 2505.05470)      the sampler's noisy steps as actions: clipped ratio of step densities, plus a
                                    divergence from the reference
  DiffusionNFT (arXiv 2509.16117)   the finished pictures only: flow matching towards a better and away from a worse
                                    velocity, no densities

Both see `Moments`, one row per (picture, trained time), and three velocities there: of the weights in training, of
those that drew the pictures, and of the frozen reference.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.flow import stochastic
from elasticdit_jax.flow.path import predict_x0
from elasticdit_jax.types import Array, Text

OBJECTIVES = ("grpo", "grpo-guard", "nft")
DIVERGENCES = ("x", "v")
SPREADS = ("group", "epoch")
MOST = 5.0
"""Largest absolute advantage; Flow-GRPO's and DiffusionNFT's."""
_LEAST_SPREAD = 1e-4


@dataclasses.dataclass(frozen=True)
class Objective:
  """What to minimise; hashable, a static argument of the update.

  Attributes:
    name: one of OBJECTIVES. "grpo-guard" is GRPO-Guard (arXiv 2510.22319): ratios centred and scaled alike at every
      step, steps weighted by 1 / -dt.
    clip: half width of the range of ratios that are trained; "nft" has none.
    kl: weight of the divergence from the reference; 0 leaves it out of the rows that rewards speak about.
    guidance: scale of classifier-free guidance of that reference, where velocities in training have none; 1: guided as
      they are. The divergence then pulls towards the guided velocity: what guidance does moves into the weights, as far
      as `kl` weighs it, at the price of the loss that those weights were trained on, and one more pass through them.
    divergence: "x", of the means of the steps (Flow-GRPO's; late steps count most), or "v", of the velocities.
    anchor: weight of the mean of |v - v_reference|^2, never guided, in rows of its own: pictures whose advantage is not
      0, finished, and noised at one time, uniform from 0 to two standard deviations below the middle of the times
      of training; 0 draws none. Hardly any other row lies there, so that the weights would drift in directions that no
      reward asks for and no divergence sees.
    strength: b of DiffusionNFT, how far its two velocities are apart.
    lag: most of itself that the average that draws keeps from one epoch to the next, for "nft"; see Policy.move_old. 0:
      the weights in training draw, and their own velocities stand for those before an epoch's first update, which saves
      a pass per row.
  """

  name: str = "grpo"
  clip: float = 1e-4
  kl: float = 0.0
  guidance: float = 1.0
  divergence: str = "x"
  anchor: float = 0.0
  strength: float = 1.0
  lag: float = 0.0

  @property
  def reads_reference(self) -> bool:
    """Whether the velocity of the frozen reference is asked for."""
    return self.kl > 0 or self.anchor > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """One row for each picture and trained time.

  Attributes:
    x: where the velocity is asked for, float32 [M, h, w, C].
    goal: where the sampler went from there; "nft" and the anchor: the finished latents. Shape of x.
    text: the prompts, M rows.
    advantage: float32 [M].
    weight: float32 [M]; the loss is the weighted sum over rows, and that of the anchor.
    hold: float32 [M], weights of the rows of Objective.anchor, whose `weight` is 0; None where there are none.
    row: the step of the sampler, columns [M]; "nft" reads t alone. Of the anchor: the step to the data.
  """

  x: Array
  goal: Array
  text: Text
  advantage: Array
  weight: Array
  row: stochastic.Steps
  hold: Array | None = None


def advantages(rewards: Array, spread: str = "group", most: float = MOST) -> np.ndarray:
  """How much better than its group each picture is, in standard deviations.

  Args:
    rewards: [prompts, pictures of each].
    spread: standard deviation of the "group" (equation 4 of Flow-GRPO) or of all rewards of the "epoch" (its program).
    most: larger ones are cut.

  Returns:
    float32 [prompts, pictures], exactly 0 in a group of equal rewards: such a group says nothing.
  """
  rewards = np.asarray(rewards, np.float64)
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  # Equal numbers may differ from their mean by rounding, and a tiny spread would blow that up.
  centred[np.ptp(rewards, axis=1) == 0] = 0.0
  scale = rewards.std(axis=1, keepdims=True) if spread == "group" else rewards.std()
  return np.clip(centred / (scale + _LEAST_SPREAD), -most, most).astype(np.float32)


def loss(
  objective: Objective, v: Array, v_old: Array, v_reference: Array | None, moments: Moments
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The objective over a batch.

  Args:
    objective: see `Objective`.
    v: velocity of the weights in training at moments.x, with gradient.
    v_old: of the weights that drew the pictures, without. Where they are the same weights, stop_gradient(v) makes every
      ratio exactly 1.
    v_reference: of the frozen reference; None unless objective.reads_reference.
    moments: the rows.

  Returns:
    (scalar, weighted sums by name). With weights that sum to 1 the sums are means.
  """
  v = v.astype(jnp.float32)
  per_row, metrics = (_contrast if objective.name == "nft" else _clipped)(objective, v, v_old, moments)
  if objective.kl:
    kl = _divergence(objective, v, v_reference, moments)
    per_row, metrics["kl"] = per_row + objective.kl * kl, kl
  sums = {name: jnp.sum(moments.weight * values) for name, values in metrics.items()}
  total = jnp.sum(moments.weight * per_row)
  if objective.anchor:
    sums["anchor"] = jnp.sum(moments.hold * stochastic.squared_distance(v, v_reference))
    total = total + objective.anchor * sums["anchor"]
  return total, sums


def _clipped(
  objective: Objective, v: jax.Array, v_old: Array, moments: Moments
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """max(-A r, -A clip(r)) per row; the density is that of flow.stochastic."""
  row, advantage = moments.row, moments.advantage
  average, before = (stochastic.mean(moments.x, velocity, row) for velocity in (v, v_old))
  change = stochastic.log_prob(moments.goal, average, row) - stochastic.log_prob(moments.goal, before, row)
  log_ratio, guard = change, objective.name == "grpo-guard"
  if guard:
    # Under the old weights the expectation of `change` is minus this; the factor evens the variance out over steps.
    log_ratio = (change + row.precision * stochastic.squared_distance(average, before)) * row.std
  ratio = jnp.exp(log_ratio)
  low, high = 1 - objective.clip, 1 + objective.clip
  per_row = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, low, high))
  if guard:
    per_row = per_row / -row.dt
  outside = (ratio < low) | (ratio > high)
  return per_row, {
    "ratio": ratio,
    "ratio_off": jnp.abs(ratio - 1),
    "clip_fraction": outside.astype(jnp.float32),
    "approx_kl": 0.5 * jnp.square(change),
  }


def _contrast(
  objective: Objective, v: jax.Array, v_old: Array, moments: Moments
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """DiffusionNFT: r l(v+) / b + (1 - r) l(v-) / b, v+- = v_old +- b (v - v_old), each l scaled by its own size."""
  b, t = objective.strength, moments.row.t
  better = jnp.clip(0.5 + moments.advantage / (2 * MOST), 0.0, 1.0)

  def fit(velocity: jax.Array) -> jax.Array:
    guess = predict_x0(moments.x, velocity, t)
    size = jnp.mean(jnp.abs(guess - moments.goal), axis=tuple(range(1, guess.ndim)))
    return stochastic.squared_distance(guess, moments.goal) / jax.lax.stop_gradient(size + 1e-5)

  plus, minus = fit(v_old + b * (v - v_old)), fit(v_old - b * (v - v_old))
  return MOST * (better * plus + (1 - better) * minus) / b, {"distance": stochastic.squared_distance(v, v_old)}


def _divergence(objective: Objective, v: jax.Array, v_reference: Array, moments: Moments) -> jax.Array:
  if objective.divergence == "v":
    return stochastic.squared_distance(v, v_reference)
  row = moments.row
  average, reference = (stochastic.mean(moments.x, velocity, row) for velocity in (v, v_reference))
  return stochastic.divergence(average, reference, row)
