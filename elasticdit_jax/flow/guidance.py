"""Classifier-free guidance as one batched call (Ho and Salimans 2022, arXiv 2207.12598, in velocity form)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elasticdit_jax.types import Array

# Text is any tree of arrays with a leading batch axis (types.Text here); only the model looks inside.
ConditionalVelocity = Callable[[Array, Array, Any], Array]
Velocity = Callable[[Array, Array], Array]


def guide(velocity_fn: ConditionalVelocity, text: Any, null_text: Any, scale: float | Array) -> Velocity:
  """Binds the text and the guidance scale: v = v_null + scale * (v_text - v_null).

  Both halves go through velocity_fn together, as a batch of 2B. The rows alternate (text, null, text, null ...), so
  that a batch axis that is split over devices stays where it is.

  Args:
    velocity_fn: (x [B, ...], t [B], text of B rows) -> v, shape of x.
    text: tree of arrays [B, ...], the encoded prompts.
    null_text: the same tree for the empty prompt, with B rows or one.
    scale: 1 is plain conditional sampling, 0 ignores the prompt. A Python number equal to 1 costs one conditional call
      of B rows instead of 2B; an array (traced, so that a change does not recompile) of shape [] or [B] never
      takes that short cut.

  Returns:
    velocity(x [B, ...], t [B]) -> v, shape of x.
  """
  if isinstance(scale, int | float) and scale == 1:
    return lambda x, t: velocity_fn(x, t, text)

  def velocity(x: Array, t: Array) -> Array:
    both = jax.tree.map(_interleave, text, null_text)
    v = velocity_fn(_interleave(x, x), _interleave(t, t), both)
    v = v.reshape((x.shape[0], 2) + v.shape[1:])
    v_text, v_null = v[:, 0], v[:, 1]
    s = jnp.asarray(scale, v.dtype)
    s = s.reshape(s.shape + (1,) * (x.ndim - s.ndim)) if s.ndim else s
    return v_null + s * (v_text - v_null)

  return velocity


def _interleave(a: Array, b: Array) -> Array:
  """[B, ...] and [B or 1, ...] to [2B, ...] with alternating rows."""
  return jnp.stack([a, jnp.broadcast_to(b, a.shape)], axis=1).reshape((2 * a.shape[0],) + a.shape[1:])
