"""From noise to data: one scan over precomputed times, with the step rule given as a value.

    for t, t_next, key in zip(times[:-1], times[1:], keys):
      x, memory = step.advance(velocity_fn, x, t, t_next, key, memory)

A step rule is a `Step`; `euler`, `heun` and `ab2` are here, those that draw noise in `flow.stochastic`. Times are data,
so another schedule of the same length does not recompile; another number of steps does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.flow import path
from elasticdit_jax.types import Array

Velocity = Callable[[Array, Array], Array]


class Step(NamedTuple):
  """A rule that moves x from one time to the next.

  Attributes:
    init: x -> memory, any tree of arrays that the rule carries from step to step; () where it needs none.
    advance: (velocity_fn, x, t, t_next, key, memory) -> (x, memory), with t and t_next float32 scalars and key the
      PRNG key of this step, or None where `sample` was given none.
    evaluations: calls of velocity_fn in one step.
  """

  init: Callable[[Array], Any]
  advance: Callable[[Velocity, Array, Array, Array, jax.Array | None, Any], tuple[Array, Any]]
  evaluations: int


def times(steps: int, shift: float = 1.0) -> np.ndarray:
  """Sampling times from 1 (noise) to 0 (data), float32 [steps + 1], strictly falling.

  Args:
    steps: number of steps, >= 1.
    shift: see path.shift_t; 1 gives equal steps, larger values spend more of them near noise.

  Raises:
    ValueError: for steps < 1 or shift <= 0.
  """
  if steps < 1:
    raise ValueError(f"steps: expected at least 1, got {steps}")
  if not shift > 0:
    raise ValueError(f"shift: expected a positive number, got {shift}")
  return path.shift_t(np.linspace(1.0, 0.0, steps + 1), shift).astype(np.float32)


def sample(
  velocity_fn: Velocity, noise: Array, times: Array, *, step: Step | None = None, key: jax.Array | None = None
) -> jax.Array:
  """Integrates dx/dt = v(x, t) along `times`, starting at `noise`.

  Args:
    velocity_fn: (x [B, ...], t float32 [B]) -> v, shape of x.
    noise: x at times[0], [B, ...]; its dtype is kept (float32 recommended: bfloat16 steps lose small moves).
    times: [N + 1], see `times`.
    step: the rule, `euler` where None.
    key: split into one key per step, for rules that draw noise; deterministic rules need none.

  Returns:
    x at times[-1], shape and dtype of noise.

  Raises:
    ValueError: where times is not a vector of at least two entries.
  """
  return _integrate(velocity_fn, noise, times, step, key, keep=False)[0]


def trajectory(
  velocity_fn: Velocity, noise: Array, times: Array, *, step: Step | None = None, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """The way of `sample`, with the same arguments and errors.

  Returns:
    (every x, float [N + 1, B, ...]: the noise first, the result of `sample` last; the first velocity that each step
    asked for, [N, B, ...]).
  """
  _, (after, velocities) = _integrate(velocity_fn, noise, times, step, key, keep=True)
  return jnp.concatenate([jnp.asarray(noise)[None], after]), velocities


def _integrate(
  velocity_fn: Velocity, noise: Array, times: Array, step: Step | None, key: jax.Array | None, keep: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
  """(last x, (x after every step, its first velocity) or None)."""
  step = euler if step is None else step
  times = jnp.asarray(times, jnp.float32)
  if times.ndim != 1 or times.shape[0] < 2:
    raise ValueError(f"times: expected shape [steps + 1] with steps >= 1, got {times.shape}")
  noise = jnp.asarray(noise)
  keys = None if key is None else jax.random.split(key, times.shape[0] - 1)

  def body(carry, now):
    x, memory = carry
    t, t_next, step_key = now
    asked = []

    def velocity(x: Array, t: Array) -> Array:
      asked.append(velocity_fn(x, jnp.full(x.shape[:1], t)).astype(x.dtype))
      return asked[-1]

    x_next, memory = step.advance(velocity, x, t, t_next, step_key, memory)
    x_next = x_next.astype(x.dtype)
    return (x_next, memory), (x_next, asked[0]) if keep else None

  (x, _), path_taken = jax.lax.scan(body, (noise, step.init(noise)), (times[:-1], times[1:], keys))
  return x, path_taken


def _no_memory(x: Array) -> tuple[()]:
  del x
  return ()


def _euler(velocity_fn: Velocity, x: Array, t: Array, t_next: Array, key: Any, memory: Any) -> tuple[Array, Any]:
  del key
  return x + (t_next - t) * velocity_fn(x, t), memory


def _heun(velocity_fn: Velocity, x: Array, t: Array, t_next: Array, key: Any, memory: Any) -> tuple[Array, Any]:
  del key
  h = t_next - t
  v = velocity_fn(x, t)
  v_next = velocity_fn((x + h * v).astype(x.dtype), t_next)
  return x + h * (v + v_next) / 2, memory


def _ab2_init(x: Array) -> tuple[Array, Array]:
  return jnp.zeros_like(x), jnp.zeros((), jnp.float32)


def _ab2(velocity_fn: Velocity, x: Array, t: Array, t_next: Array, key: Any, memory: Any) -> tuple[Array, Any]:
  del key
  v_before, h_before = memory
  h = t_next - t
  v = velocity_fn(x, t)
  # A zero h_before marks the first step, which has no history and is an Euler step.
  first = h_before == 0
  r = jnp.where(first, 0.0, h / jnp.where(first, 1.0, h_before))
  return x + h * (v + r / 2 * (v - v_before)), (v, h)


euler = Step(_no_memory, _euler, 1)
"""First order, one evaluation a step: x += h v(x, t)."""

heun = Step(_no_memory, _heun, 2)
"""Second order, two evaluations a step (explicit trapezoid); the last one is at the final time itself."""

ab2 = Step(_ab2_init, _ab2, 1)
"""Second order, one evaluation a step: two-step Adams-Bashforth for unequal steps, started with one Euler step."""
