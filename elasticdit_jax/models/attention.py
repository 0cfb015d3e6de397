"""Joint text-image attention: one softmax over both streams, dense or Shift Sparse Block Attention (section 2.2)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.models import rope
from elasticdit_jax.models.layers import RMSNorm
from elasticdit_jax.ops import blocks, gating, placement
from elasticdit_jax.ops.attention import dense_attention
from elasticdit_jax.ops.sparse_attention import sparse_attention


class Sparsity(NamedTuple):
  """What one layer needs to know to run sparse: all static.

  Attributes:
    ratio: share of key blocks that every query block drops, in [0, 1); 0 is dense.
    grid: (rows, columns) of image tokens.
    block_side: tokens along one side of a block.
    layer: index in the full backbone; its parity decides the window shift: a block keeps its partition on every route.
    per_head, force_self: see ops.gating.select_blocks.
    sparse_text: text queries read as many image blocks as a block of image queries does; else all.
  """

  ratio: float
  grid: tuple[int, int]
  block_side: int
  layer: int
  per_head: bool = False
  force_self: bool = False
  sparse_text: bool = False

  @property
  def cut(self) -> blocks.BlockGrid:
    """The partition of the image tokens."""
    return blocks.BlockGrid(*self.grid, self.block_side, blocks.window_offset(self.layer, self.block_side))

  @property
  def dense(self) -> bool:
    """Whether no whole block is dropped, so that lists would hold every block."""
    return gating.num_kept(self.cut.num_blocks, self.ratio) == self.cut.num_blocks


class Projection(nn.Module):
  """nn.Dense with all of its parameters, of which the first `skipped` outputs are not computed: [B, T, C] -> heads.

  Attributes:
    features: outputs of the parameters; those that are left come as [B, T, -1, C / head_dim, head_dim].
    skipped, head_dim, dtype: see above.
    head_axes: see DiTConfig.
  """

  features: int
  skipped: int
  head_dim: int
  dtype: jnp.dtype
  head_axes: tuple[str, ...] | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, kernel, bias))
    kernel, bias = kernel[:, self.skipped :], bias[self.skipped :]
    shape = (-1, x.shape[-1] // self.head_dim, self.head_dim)
    if self.head_axes is None:
      return (x @ kernel + bias).reshape(*x.shape[:2], *shape)
    # Queries, keys and values lie side by side, so that equal parts of the columns are not heads: weights are cut by
    # heads before the product, because activations would be sent around after it.
    kernel = placement.split(kernel.reshape(x.shape[-1], *shape), None, None, self.head_axes)
    return jnp.tensordot(x, kernel, 1) + placement.split(bias.reshape(shape), None, self.head_axes)


class QKV(nn.Module):
  """Queries, keys and values of one stream, queries and keys RMS-normalised per head.

  Attributes:
    head_dim, dtype: of the result.
    queries: False where nobody reads them: they are None then. Parameters do not depend on it.
    batch_axes, head_axes: see DiTConfig.
  """

  head_dim: int
  dtype: jnp.dtype
  queries: bool = True
  batch_axes: tuple[str, ...] | None = None
  head_axes: tuple[str, ...] | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    width = x.shape[-1]
    wanted = self.queries or self.is_initializing()
    skipped = 0 if wanted else width
    joint = Projection(3 * width, skipped, self.head_dim, self.dtype, self.head_axes, name="qkv")(x)
    joint = placement.split(joint, self.batch_axes, None, None, self.head_axes)
    # Split, not indexed: the gradient is one concatenation then, not a sum of padded parts.
    *q, k, v = (part[:, :, 0] for part in jnp.split(joint, joint.shape[2], axis=2))
    return RMSNorm(name="q_norm")(q[0]) if wanted else None, RMSNorm(name="k_norm")(k), v


class JointAttention(nn.Module):
  """Attention over [text, image] tokens, without the output projections.

  Call with image [B, T, C], text [B, L, C], text_mask bool [B, L], the rotary table of the image tokens and the
  static Sparsity of this layer; returns (image [B, T, C], text [B, L, C]).

  For analysis only, `kept` (int [], traced) is the number of key blocks to keep in place of `sparsity.ratio`, by a
  mask: one program for all counts.

  Attributes:
    head_dim, dtype: of queries, keys and values.
    text_output: False where nobody reads the text: None is returned for it and its queries are not computed.
    batch_axes, head_axes: names of the axes that samples and heads are split over, see DiTConfig.
  """

  head_dim: int
  dtype: jnp.dtype
  text_output: bool = True
  batch_axes: tuple[str, ...] | None = None
  head_axes: tuple[str, ...] | None = None

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    table: tuple[np.ndarray, np.ndarray],
    sparsity: Sparsity,
    kept: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    places = (self.batch_axes, self.head_axes)
    image_qkv = QKV(self.head_dim, self.dtype, True, *places, name="image")(image)
    text_qkv = QKV(self.head_dim, self.dtype, self.text_output, *places, name="text")(text)
    # Original coordinates first; roll and pool come after (Algorithm 1).
    image_qkv = (*(rope.rotate(x, table) for x in image_qkv[:2]), image_qkv[2])
    if kept is None and not sparsity.dense:
      out = _sparse(text_qkv, image_qkv, text_mask, sparsity, *places)
    else:
      image_mask = None if kept is None else _image_mask(text_qkv[0], *image_qkv[:2], text_mask, sparsity, kept)
      out = dense_attention(
        *_joined(text_qkv, image_qkv),
        text.shape[1],
        text_mask,
        image_mask=image_mask,
        text_queries=text_qkv[0] is not None,
        batch_axes=self.batch_axes,
        head_axes=self.head_axes,
      )
    out = out.reshape(*out.shape[:2], -1)
    text_out, image_out = jnp.split(out, [out.shape[1] - image.shape[1]], axis=1)
    return image_out, text_out if self.text_output else None


def _sparse(text_qkv, image_qkv, text_mask: jax.Array, sparsity: Sparsity, batch_axes, head_axes) -> jax.Array:
  """Block-major order, selection, sparse attention, raster order: [B, L + T, heads, head_dim], or T without queries."""
  cut, text_len = sparsity.cut, text_mask.shape[1]
  image_qkv = [blocks.to_blocks(x, cut) for x in image_qkv]
  count = gating.num_kept(cut.num_blocks, sparsity.ratio)
  image_blocks, text_block = _pooled(text_qkv[0], *image_qkv[:2], text_mask, sparsity)
  kept = gating.select_blocks(*image_blocks, count, per_head=sparsity.per_head, force_self=sparsity.force_self)
  text_kept = text_block and gating.select_blocks(*text_block, count, per_head=sparsity.per_head)
  out = sparse_attention(
    *_joined(text_qkv, image_qkv),
    kept,
    text_len=text_len,
    block_size=cut.block_size,
    text_mask=text_mask,
    key_mask=_key_mask(cut),
    text_queries=text_qkv[0] is not None,
    text_kept=text_kept,
    batch_axes=batch_axes,
    head_axes=head_axes,
  )
  return blocks.from_blocks(out, cut, 0 if text_qkv[0] is None else text_len)


def _joined(text_qkv, image_qkv) -> tuple[jax.Array, ...]:
  """Queries, keys and values of the text, where there are any, in front of those of the image."""
  return tuple(b if a is None else jnp.concatenate([a, b], axis=1) for a, b in zip(text_qkv, image_qkv, strict=True))


def _image_mask(text_q, q: jax.Array, k: jax.Array, text_mask: jax.Array, sparsity: Sparsity, kept) -> jax.Array:
  """bool [B, heads or 1, T or L + T, T] in raster order: what `_sparse` would let queries see with `kept` blocks."""
  cut = sparsity.cut
  image_blocks, text_block = _pooled(text_q, *(blocks.to_blocks(x, cut) for x in (q, k)), text_mask, sparsity)
  gate = gating.block_gate(*image_blocks, kept, per_head=sparsity.per_head, force_self=sparsity.force_self)
  block = cut.block_of()
  gate = gate[:, :, block]
  if text_block:
    text = gating.block_gate(*text_block, kept, per_head=sparsity.per_head)
    gate = jnp.concatenate([jnp.repeat(text, text_q.shape[1], axis=2), gate], axis=2)
  return gate[..., block]


def _pooled(text_q: jax.Array | None, q: jax.Array, k: jax.Array, text_mask: jax.Array, sparsity: Sparsity):
  """Pooled queries and keys of the image blocks; and the present text as one block of queries, where it is sparse."""
  cut = sparsity.cut
  image_q, image_k = (blocks.pool(x, cut.block_size, _key_mask(cut)) for x in (q, k))
  if not sparsity.sparse_text or text_q is None:
    return (image_q, image_k), None
  return (image_q, image_k), (blocks.pool(text_q, text_q.shape[1], text_mask), image_k)


def _key_mask(cut: blocks.BlockGrid) -> jax.Array | None:
  return jnp.asarray(cut.valid())[None] if any(cut.padding) else None
