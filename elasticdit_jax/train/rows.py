"""Rows of an update, out of what a rollout has left: (picture, time) by (picture, time).

All pictures at one time, all at the next, ... and those of the anchor last; see losses.Moments.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from elasticdit_jax.flow import path, stochastic
from elasticdit_jax.train import sharding


@functools.partial(jax.jit, static_argnames=("count", "layout"))
def of_steps(
  ways: Sequence[tuple[jax.Array, jax.Array]], count: int, layout: sharding.Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Batches ([K + 1, b, ...], [K, b, ...]) as M = K x count rows: where steps began, where they went, velocities."""
  way, velocities = (jnp.concatenate(parts, axis=1)[:, :count] for parts in zip(*ways, strict=True))
  return layout.keep_rows(tuple(part.reshape((-1,) + way.shape[2:]) for part in (way[:-1], way[1:], velocities)))


@functools.partial(jax.jit, static_argnames=("count", "times", "law", "layout"))
def renoised(ends, key, count, times, law, layout) -> tuple[jax.Array, jax.Array, stochastic.Steps]:
  """Batches [b, ...] of finished latents as (x_t, themselves, steps to them) of M = times x count rows.

  path.sample_t gives neighbouring rows neighbouring times, and neighbouring pictures are of one prompt and one task:
  which picture gets which times is drawn anew, lest an epoch sees a task at a narrow band of noise levels. The times
  of a picture remain 1 / times of the law apart.
  """
  time_key, noise_key, order_key = jax.random.split(key, 3)
  mean, std, shift = law
  t = path.sample_t(time_key, (times, count), mean=mean, std=std, shift=shift)
  t = jax.random.permutation(order_key, t, axis=1).reshape(-1)
  goal = jnp.tile(jnp.concatenate(ends)[:count], (times, 1, 1, 1))
  return layout.keep_rows(_rows_at(t, goal, noise_key))


@functools.partial(jax.jit, static_argnames=("count", "law", "layout"))
def with_anchor(rows, ends, key, count, law, layout) -> tuple[jax.Array, jax.Array, stochastic.Steps]:
  """`rows` (x, goal, steps), and after them finished latents at a time each that the law hardly ever draws."""
  time_key, noise_key = jax.random.split(key)
  mean, std, shift = law
  goal = jnp.concatenate(ends)[:count]
  last = path.shift_t(jax.nn.sigmoid(mean - 2 * std), shift)
  t = jax.random.uniform(time_key, (count,), minval=1e-3 * last, maxval=last)  # at 0 there is no step to take
  more = _rows_at(t, goal, noise_key)
  return layout.keep_rows(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, more))


def _rows_at(t: jax.Array, goal: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, stochastic.Steps]:
  """Latents with the noise of times t, themselves, and the steps from one to the other."""
  return path.interpolate(goal, jax.random.normal(key, goal.shape), t), goal, stochastic.to_data(t)
