"""Step rules that draw noise, with the density of what they drew: what policy gradients on a flow model need.

Every rule here is one line, x_next = a x + b v + s z with z standard normal; a rule is the table of its a, b, s,
computed in float64 before anything runs. So one compiled sampler serves all of them, and the log-probability of a step
is that of a normal distribution with mean a x + b v and standard deviation s.

  rule      noise                                 source
  ode       none: Euler                           rectified flow
  sde       g = level sqrt(t / (1 - t))           Flow-GRPO, arXiv 2505.05470
  constant  g = level                             DanceGRPO, arXiv 2505.07818
  cps       s = t_next sin(level pi / 2)          Coefficients-Preserving Sampling, arXiv 2509.05952

`sde` and `constant` keep the marginals of the flow as steps get small; `cps` does not and explores well in few steps.
The last step of every rule is an Euler step: noise added there would stay in the picture, and its density is so sharp
that rounding alone would move it.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.flow import sampler
from elasticdit_jax.types import Array


class Steps(NamedTuple):
  """A table with one row per step: arrays [N], float64 on the host, float32 on the device.

  Attributes:
    t, dt: time at the start of the step and t_next - t, which is negative.
    x, v, std: x_next = x * x_now + v * velocity + std * z.
    precision: factor of the squared distance in the log-probability: 1 / (2 std^2); 1 for cps, 0 without noise.
    offset: constant of the log-probability, -log(std sqrt(2 pi)); 0 for cps and without noise.
    kl_std: standard deviation that the divergence between two means is measured in: g (Flow-GRPO leaves sqrt(-dt) out,
      so that late steps count); std for cps; 1 without noise.
  """

  t: Array
  dt: Array
  x: Array
  v: Array
  std: Array
  precision: Array
  offset: Array
  kl_std: Array

  @property
  def noisy(self) -> np.ndarray:
    """bool [N]: steps that draw noise, the ones that can be trained."""
    return np.asarray(self.std) > 0

  def to_device(self) -> "Steps":
    """The same as float32 arrays of JAX."""
    return Steps(*(jnp.asarray(column, jnp.float32) for column in self))


def ode(times: Array) -> Steps:
  """Euler steps.

  Args:
    times: [N + 1] from noise (1) to data (0), strictly falling; see sampler.times.

  Raises:
    ValueError: for times of another kind.
  """
  times = np.asarray(times, np.float64)
  if times.ndim != 1 or len(times) < 2 or not np.all(np.diff(times) < 0) or not 0 <= times[-1] < times[0] <= 1:
    raise ValueError(f"times: expected two or more numbers falling within [0, 1], got {times.tolist()!r:.120}")
  t, dt = times[:-1], np.diff(times)
  zero, one = np.zeros_like(t), np.ones_like(t)
  return Steps(t=t, dt=dt, x=one, v=dt, std=zero, precision=zero, offset=zero, kl_std=one)


def sde(times: Array, level: float = 0.7) -> Steps:
  """Flow-GRPO's stochastic differential equation; level 0 is `ode`.

  At t = 1 the noise would be infinite; there 1 - t is that of the second time, as in the authors' program, which makes
  the standard deviation of the first step `level` whatever the schedule.
  """
  times = np.asarray(times, np.float64)
  denominator = 1 - np.where(times[:-1] == 1, times[1], times[:-1])
  return _with_noise(times, _level(level) * np.sqrt(times[:-1] / denominator))


def constant(times: Array, level: float = 0.3) -> Steps:
  """DanceGRPO's rule: the same amount of noise per unit of time everywhere; level 0 is `ode`."""
  times = np.asarray(times, np.float64)
  return _with_noise(times, np.full(len(times) - 1, _level(level)))


def cps(times: Array, level: float = 0.8) -> Steps:
  """Coefficients-Preserving Sampling: as much signal and as much noise as the next time asks for; level 0 is `ode`.

  Its log-probability is -mean((x_next - mean)^2), without the constants of the density, as its authors train it.
  """
  base = ode(times)
  if not 0 <= level <= 1:
    raise ValueError(f"level: cps takes a share of noise in [0, 1], got {level}")
  t, t_next = base.t, base.t + base.dt
  std = t_next * math.sin(level * math.pi / 2)
  kept = np.sqrt(np.maximum(t_next**2 - std**2, 0))
  noisy = std > 0
  table = base._replace(
    x=1 - t_next + kept,
    v=-t * (1 - t_next) + kept * (1 - t),
    std=std,
    precision=noisy.astype(np.float64),
    kl_std=np.where(noisy, std, 1.0),
  )
  return _ode_rows(table, base, np.arange(len(t)) == len(t) - 1)


def to_data(t: Array) -> Steps:
  """The Euler step from each time t [M] straight to the data, which is the guess of path.predict_x0; trace-safe."""
  zero, one = jnp.zeros_like(t), jnp.ones_like(t)
  return Steps(t=t, dt=-t, x=one, v=-t, std=zero, precision=zero, offset=zero, kl_std=one)


RULES: Mapping[str, Callable[[Array, float], Steps]] = {"sde": sde, "constant": constant, "cps": cps}
"""Rules by the name that configs use; each takes (times, level)."""


def window(steps: Steps, first: int, size: int) -> Steps:
  """Noise in `size` steps from `first` on, Euler steps elsewhere (Flow-GRPO-Fast, MixGRPO).

  Raises:
    ValueError: where the window reaches a step without noise or lies outside the steps.
  """
  last = int(steps.noisy.sum())
  if size < 1 or first < 0 or first + size > last:
    raise ValueError(f"window: expected steps within 0..{last - 1}, which draw noise, got {first}..{first + size - 1}")
  number = np.arange(len(steps.t))
  euler = ode(np.append(steps.t, steps.t[-1] + steps.dt[-1]))
  return _ode_rows(steps, euler, (number < first) | (number >= first + size))


def step(steps: Steps, rows: Array | None = None) -> sampler.Step:
  """The table as a step rule for sampler.sample over the same times; needs a key.

  Args:
    steps: the table.
    rows: int32 [B]: numbers by which rows are told apart. The noise of a row is then a function of the key and its
      number alone, in whatever batch it is drawn; None draws the noise of a batch at once.

  Arithmetic is float32 whatever the velocity's dtype: rounding the latents to bfloat16 would move the importance ratio
  by as much as its clipping range.
  """
  table = steps.to_device()

  def noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if rows is None:
      return jax.random.normal(key, shape, jnp.float32)
    return jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), shape[1:], jnp.float32))(rows)

  def advance(velocity_fn, x, t, t_next, key, index):
    del t_next
    row = jax.tree.map(lambda column: column[index], table)
    average = mean(x.astype(jnp.float32), velocity_fn(x, t).astype(jnp.float32), row)
    return average + row.std * noise(key, x.shape), index + 1

  return sampler.Step(lambda x: jnp.int32(0), advance, 1)


def mean(x: Array, v: Array, row: Steps) -> jax.Array:
  """Mean of x_next: x and v [B, ...], row with scalars or [B]."""
  return _like(row.x, x) * x + _like(row.v, x) * v


def log_prob(x_next: Array, average: Array, row: Steps) -> jax.Array:
  """Log-probability of a step per dimension, float32 [B]: the mean over all axes but the first.

  A sum would be the density, but its ratio between two policies overflows for pictures; with the mean, as Flow-GRPO
  trains it, the ratio is a root of the true one, and clipping ranges are small.

  Args:
    x_next: where the step went [B, ...].
    average: from `mean`.
    row: the step, scalars or [B].
  """
  return row.offset - row.precision * squared_distance(x_next, average)


def divergence(average: Array, other: Array, row: Steps) -> jax.Array:
  """Divergence of two means, float32 [B]: mean of their squared distance over 2 kl_std^2."""
  return squared_distance(average, other) / (2 * row.kl_std**2)


def squared_distance(a: Array, b: Array) -> jax.Array:
  """Mean over all axes but the first of (a - b)^2, float32 [B]."""
  difference = jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)
  return jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))


def _level(level: float) -> float:
  if not 0 <= level < math.inf:
    raise ValueError(f"level: expected a finite amount of noise of at least 0, got {level}")
  return level


def _with_noise(times: np.ndarray, g: np.ndarray) -> Steps:
  """dx = (v - g^2/2 score) dt + g dw backwards in time, score = -(x + (1 - t) v) / t, one Euler-Maruyama step a row."""
  base = ode(times)
  drift = g**2 / (2 * base.t) * base.dt
  std = g * np.sqrt(-base.dt)
  noisy = std > 0
  safe = np.where(noisy, std, 1.0)
  table = base._replace(
    x=1 + drift,
    v=base.dt + drift * (1 - base.t),
    std=std,
    precision=np.where(noisy, 1 / (2 * safe**2), 0.0),
    offset=np.where(noisy, -np.log(safe * math.sqrt(2 * math.pi)), 0.0),
    kl_std=np.where(noisy, g, 1.0),
  )
  return _ode_rows(table, base, np.arange(len(g)) == len(g) - 1)


def _ode_rows(table: Steps, euler: Steps, chosen: np.ndarray) -> Steps:
  return Steps(*(np.where(chosen, plain, column) for column, plain in zip(table, euler, strict=True)))


def _like(column: Array, x: Array) -> jax.Array:
  column = jnp.asarray(column)
  return column.reshape(column.shape + (1,) * (x.ndim - column.ndim)) if column.ndim else column
