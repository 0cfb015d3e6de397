"""Shift Sparse Block Attention over block lists made at run time (ElasticDiT section 2.2): the one public function.

  keys of a query block:   [ all text tokens | kept[0] | kept[1] | ... ]       never a mask over all tokens
  keys of a text query:    [ all text tokens | all image tokens ]              or the blocks that text_kept lists

Several implementations answer to one contract; the dense-mask reference is the one that defines it.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from elasticdit_jax.ops import placement
from elasticdit_jax.ops.attention import check_qkv
from elasticdit_jax.ops.sparse_attention_pallas_tpu import obstacle, sparse_attention_pallas_tpu
from elasticdit_jax.ops.sparse_attention_reference import sparse_attention_reference
from elasticdit_jax.ops.sparse_attention_xla import sparse_attention_xla
from elasticdit_jax.types import Array

_IMPLEMENTATIONS = {
  "reference": sparse_attention_reference,
  "xla": sparse_attention_xla,
  "pallas_tpu": sparse_attention_pallas_tpu,
  "pallas_tpu_interpret": partial(sparse_attention_pallas_tpu, interpret=True),
}


def sparse_attention(
  q: Array,
  k: Array,
  v: Array,
  kept: Array,
  *,
  text_len: int,
  block_size: int = 64,
  text_mask: Array | None = None,
  key_mask: Array | None = None,
  text_queries: bool = True,
  text_kept: Array | None = None,
  scale: float | None = None,
  implementation: str | None = None,
  batch_axes: placement.Axes = None,
  head_axes: placement.Axes = None,
) -> jax.Array:
  """Joint attention in which every block of image queries reads all text keys and its listed image blocks only.

  Text queries read every key, or some blocks alone, or there are none. Accumulation is float32. Differentiable in q, k
  and v (reverse mode; lists and masks are constants); memory beyond inputs and outputs is bounded by a chunk, not by
  the number of tokens squared.

  Args:
    q: [B, text_len + Tb * block_size, heads, head_dim], the text first, image tokens block-major (blocks.to_blocks); of
      the image tokens alone with text_queries=False.
    k: [B, text_len + Tb * block_size, heads, head_dim].
    v: like k.
    kept: int [B, heads or 1, Tb, num_kept], see gating.select_blocks: distinct indices in 0..Tb-1 in each row. They are
      not checked here, where they are traced; gating.check_kept does it outside jit.
    text_len: leading text tokens; 0 for none.
    block_size: tokens in a block; 64 = 8 x 8 in the paper.
    text_mask: bool [B, text_len], True where a text token is present; None where all are.
    key_mask: bool [B or 1, Tb * block_size], True where an image token is real (BlockGrid.valid); None where all are.
    text_queries: False where nobody reads the text rows: q then holds the image tokens alone, and so does the result.
    text_kept: int [B, heads or 1, 1, n], the image blocks that every text query reads besides all text, like a row of
      `kept`; None where it reads every one.
    scale: head_dim ** -0.5 where None.
    implementation: "reference" (dense mask, float32, for tests), "xla" (any platform), "pallas_tpu" (kernels for TPU),
      "pallas_tpu_interpret" (the same kernels step by step on any platform, for tests), or None for the best one that
      works here: the kernels on a TPU where the shapes suit them and no other device takes part (or with the axes
      below), else "xla".
    batch_axes: where the program is split over devices, the mesh axes (jax.set_mesh) over which B is split. Explicit
      axes, which arrays carry in their type, need not be named.
    head_axes: the mesh axes over which heads are split. With either, every device attends to its own samples and heads
      under jax.shard_map, which the kernels need and the scan of "xla" profits from.

  Returns:
    Like q, in its dtype. Queries that are padding or absent text get what an ordinary query would get; a query without
    a single visible key gets zeros.

  Raises:
    ValueError: where arguments disagree, naming the argument, what was given and what was expected.
    NotImplementedError: where a named implementation cannot run, saying why.
  """
  _check(q, k, v, text_len, block_size, text_mask, key_mask, text_queries)
  blocks = (k.shape[1] - text_len) // block_size
  _check_lists("kept", kept, k, blocks, blocks, block_size)
  if text_kept is not None:
    _check_lists("text_kept", text_kept, k, 1, blocks, block_size)
  attend = partial(
    _attend,
    text_len=text_len,
    block_size=block_size,
    text_queries=text_queries,
    scale=1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
    implementation=implementation,
  )
  masks = {
    "text_mask": None if text_mask is None or not text_len else jnp.asarray(text_mask),
    "key_mask": None if key_mask is None else jnp.broadcast_to(key_mask, (k.shape[0], k.shape[1] - text_len)),
  }
  lists = {"kept": kept, "text_kept": text_kept if text_queries and text_len else None}
  return placement.over_batch_and_heads(attend, q, k, v, lists, masks, batch_axes=batch_axes, head_axes=head_axes)


def _attend(q, k, v, kept, *, text_len, block_size, implementation, **options) -> jax.Array:
  attend = _choose(implementation, k, kept, text_len, block_size)
  return attend(q, k, v, kept, text_len=text_len, block_size=block_size, **options)


def _choose(
  implementation: str | None, k: Array, kept: Array, text_len: int, block_size: int
) -> Callable[..., jax.Array]:
  """The implementation by name, or the best one for these shapes, which are those on one device."""
  if implementation is None:
    kernels = placement.platform() == "tpu" and placement.on_one_device()
    suits = kernels and obstacle(k, kept, text_len, block_size) is None
    implementation = "pallas_tpu" if suits else "xla"
  if implementation not in _IMPLEMENTATIONS:
    names = ", ".join(sorted(_IMPLEMENTATIONS))
    raise ValueError(f"implementation: expected None or one of {names}, got {implementation!r}")
  if implementation == "pallas_tpu" and placement.platform() != "tpu":
    raise NotImplementedError(
      f"implementation='pallas_tpu': runs on a TPU, this is a {placement.platform()}; use None or 'xla', or "
      "'pallas_tpu_interpret' to test"
    )
  return _IMPLEMENTATIONS[implementation]


def _check(q, k, v, text_len, block_size, text_mask, key_mask, text_queries) -> None:
  check_qkv(q, k, v, text_len, text_mask, text_queries)
  batch, tokens = k.shape[:2]
  image = tokens - text_len
  if block_size < 1 or image < 1 or image % block_size:
    raise ValueError(
      f"block_size: expected a divisor of the {image} image tokens (k has {tokens}, text_len is {text_len}), got "
      f"{block_size}; pad with blocks.to_blocks"
    )
  if key_mask is not None and (key_mask.shape not in ((batch, image), (1, image)) or key_mask.dtype != jnp.bool_):
    raise ValueError(f"key_mask: expected bool [{batch} or 1, {image}], got {key_mask.dtype} {key_mask.shape}")


def _check_lists(name: str, lists: Array, k: Array, rows: int, blocks: int, block_size: int) -> None:
  batch, _, heads, _ = k.shape
  good = lists.ndim == 4 and lists.shape[0] == batch and lists.shape[1] in (1, heads) and lists.shape[2] == rows
  if not good or not 1 <= lists.shape[3] <= blocks:
    expected = f"[{batch}, {heads} or 1, {rows}, 1..{blocks}]"
    raise ValueError(f"{name}: expected {expected} for {blocks} blocks of {block_size} tokens, got {lists.shape}")
  if not jnp.issubdtype(lists.dtype, jnp.integer):
    raise ValueError(f"{name}: expected integers, got {lists.dtype}")
