"""Joint text-image attention: one softmax over both streams, dense or Shift Sparse Block Attention (section 2.2)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.models import rope
from elasticdit_jax.models.layers import RMSNorm
from elasticdit_jax.ops import blocks, gating
from elasticdit_jax.ops.attention import dense_attention
from elasticdit_jax.ops.sparse_attention import sparse_attention


class Sparsity(NamedTuple):
  """What one layer needs to know to run sparse: all static.

  Attributes:
    ratio: share of key blocks that every query block drops, in [0, 1); 0 is dense.
    grid: (rows, columns) of image tokens.
    block_side: tokens along one side of a block.
    layer: index in the full backbone; its parity decides the window shift: a block keeps its partition on every route.
  """

  ratio: float
  grid: tuple[int, int]
  block_side: int
  layer: int


class QKV(nn.Module):
  """Queries, keys and values of one stream, queries and keys RMS-normalised per head."""

  head_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    qkv = nn.Dense(3 * x.shape[-1], dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, -1, self.head_dim), 2, 0)
    return RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k), v


class JointAttention(nn.Module):
  """Attention over [text, image] tokens, without the output projections.

  Call with image [B, T, C], text [B, L, C], text_mask bool [B, L], the rotary table of the image tokens and the
  static Sparsity of this layer; returns (image [B, T, C], text [B, L, C]).
  """

  head_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    table: tuple[np.ndarray, np.ndarray],
    sparsity: Sparsity,
  ) -> tuple[jax.Array, jax.Array]:
    image_q, image_k, image_v = QKV(self.head_dim, self.dtype, name="image")(image)
    text_q, text_k, text_v = QKV(self.head_dim, self.dtype, name="text")(text)
    # Original coordinates first; roll and pool come after (Algorithm 1).
    image_q, image_k = rope.rotate(image_q, table), rope.rotate(image_k, table)
    pairs = ((text_q, image_q), (text_k, image_k), (text_v, image_v))
    if sparsity.ratio == 0:
      q, k, v = (jnp.concatenate(pair, axis=1) for pair in pairs)
      out = dense_attention(q, k, v, text.shape[1], text_mask)
    else:
      out = _sparse(pairs, text_mask, sparsity)
    out = out.reshape(*out.shape[:2], -1)
    return out[:, text.shape[1] :], out[:, : text.shape[1]]


def _sparse(pairs, text_mask: jax.Array, sparsity: Sparsity) -> jax.Array:
  """Block-major order, selection, sparse attention, raster order; pairs are (text, image) of q, k and v."""
  side = sparsity.block_side
  cut = blocks.BlockGrid(*sparsity.grid, side, blocks.window_offset(sparsity.layer, side))
  text_len = text_mask.shape[1]
  q, k, v = (jnp.concatenate([text, blocks.to_blocks(image, cut)], axis=1) for text, image in pairs)
  key_mask = jnp.asarray(cut.valid())[None] if any(cut.padding) else None
  kept = gating.select_blocks(
    blocks.pool(q[:, text_len:], cut.block_size, key_mask),
    blocks.pool(k[:, text_len:], cut.block_size, key_mask),
    gating.num_kept(cut.num_blocks, sparsity.ratio),
  )
  if key_mask is not None:
    key_mask = jnp.broadcast_to(key_mask, (q.shape[0], key_mask.shape[1]))
  out = sparse_attention(
    q, k, v, kept, text_len=text_len, block_size=cut.block_size, text_mask=text_mask, key_mask=key_mask
  )
  return blocks.from_blocks(out, cut, text_len)
