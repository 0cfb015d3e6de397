"""SSBA as a dense boolean mask in float32 (Algorithm 1 with ExpandMask): slow, and the oracle of the others."""

import jax
import jax.numpy as jnp

from elasticdit_jax.types import Array


def dense_mask(
  kept: Array,
  *,
  text_len: int,
  block_size: int,
  text_mask: Array | None = None,
  key_mask: Array | None = None,
  text_kept: Array | None = None,
) -> jax.Array:
  """Which query token sees which key token: bool [B, heads or 1, T, T] for kept [B, heads or 1, Tb, num_kept]."""
  image = jnp.repeat(_gate(kept, kept.shape[2], block_size), block_size, axis=-2)
  if text_kept is None:
    mask = jnp.pad(image, ((0, 0), (0, 0), (text_len, 0), (0, 0)), constant_values=True)
  else:
    text = jnp.repeat(_gate(text_kept, kept.shape[2], block_size), text_len, axis=-2)
    heads = max(image.shape[1], text.shape[1])
    parts = [jnp.broadcast_to(part, (part.shape[0], heads, *part.shape[2:])) for part in (text, image)]
    mask = jnp.concatenate(parts, axis=-2)
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (text_len, 0)), constant_values=True)
  visible = jnp.ones((kept.shape[0], mask.shape[-1]), bool)
  if text_mask is not None:
    visible = visible.at[:, :text_len].set(text_mask)
  if key_mask is not None:
    visible = visible.at[:, text_len:].set(key_mask)
  return mask & visible[:, None, None, :]


def _gate(kept: Array, blocks: int, block_size: int) -> jax.Array:
  """Which image tokens each list holds: bool [..., blocks * block_size]."""
  return jnp.repeat(jnp.any(kept[..., None] == jnp.arange(blocks), axis=-2), block_size, axis=-1)


def sparse_attention_reference(
  q: Array,
  k: Array,
  v: Array,
  kept: Array,
  *,
  text_len: int,
  block_size: int,
  text_mask: Array | None,
  key_mask: Array | None,
  text_queries: bool,
  text_kept: Array | None,
  scale: float,
) -> jax.Array:
  """See sparse_attention.sparse_attention; needs memory for [B, heads, T, T] float32."""
  mask = dense_mask(
    kept, text_len=text_len, block_size=block_size, text_mask=text_mask, key_mask=key_mask, text_kept=text_kept
  )
  mask = mask if text_queries else mask[:, :, text_len:]
  exact = jax.lax.Precision.HIGHEST
  q32, k32, v32 = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
  logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q32, k32, precision=exact)
  # A row without keys keeps finite logits here, so that its zeros have zero gradients instead of NaN.
  top = jnp.max(jnp.where(mask, logits, -1e30), axis=-1, keepdims=True)
  weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0.0)), 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights / jnp.where(total > 0, total, 1.0)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v32, precision=exact).astype(q.dtype)
