"""SSBA in plain XLA: gather the listed blocks chunk by chunk, with a backward pass of its own.

  table of one head:   [ text blocks | image blocks ]          (text padded to whole blocks, its padding masked)
  one chunk:           a few query blocks of [rows, D]  x  their gathered keys [listed * block_size, D]

`lax.scan` walks over chunks of query blocks of all heads and samples in turn, so that temporaries are one chunk (a
few, where several cores share a CPU device) and stay in cache. Text queries are one more kind of query block, whose
list names the whole table where they read everything. The backward pass recomputes the weights of a chunk from the
saved log-sum-exp and adds into float32 dk and dv that the scan carries: one pass, five products, on transposed logits:
one of the three products with weights needs them turned, not two. A batch or head axis split over devices belongs under
jax.shard_map: the scan runs over both.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp

from elasticdit_jax.ops import placement
from elasticdit_jax.types import Array

_HIDDEN = -1e30

# Logits in one chunk, and chunks in one step of the scan. An accelerator needs enough logits at once to fill it. On
# CPU, one core is fastest with what stays in its own cache: logits, keys and values of one block of 64 queries with 13
# listed blocks are 0.6 MB. Several cores share the work of one device best where a step holds several independent
# chunks of several blocks: waking a core costs as much as a small product.
_ACCELERATOR = (32_000_000, 1)
_CPU_ONE_CORE = (64_000, 1)
_CPU = (215_000, 4)


def sparse_attention_xla(
  q: Array,
  k: Array,
  v: Array,
  kept: Array | None,
  *,
  text_len: int,
  block_size: int,
  text_mask: Array | None,
  key_mask: Array | None,
  text_queries: bool,
  text_kept: Array | None,
  scale: float,
) -> jax.Array:
  """See sparse_attention.sparse_attention. With `kept` of None there are no image queries: q holds the text alone."""
  if scale <= 0:  # Below, the largest logit is found before scaling.
    q, scale = q * scale, 1.0
  batch, keys, heads, dim = k.shape
  text_blocks = -(-text_len // block_size)
  per_head = text_blocks + (keys - text_len) // block_size
  tables = [_to_table(x, text_len, block_size) for x in (k, v)]
  valid = _valid_table(batch, heads, keys - text_len, text_len, block_size, text_mask, key_mask)
  start = per_head * jnp.arange(batch * heads, dtype=jnp.int32)[:, None, None]

  text_q, image_q = jnp.split(jnp.swapaxes(q, 1, 2), [text_len if text_queries else 0], axis=2)
  queries, lists = [], []
  if kept is not None:
    queries.append(image_q.reshape(-1, block_size, dim))
    lists.append(_with_text(kept, heads, text_blocks) + start)
  if text_q.shape[2]:
    everything = jnp.arange(per_head, dtype=jnp.int32)
    queries.append(text_q.reshape(-1, text_len, dim))
    lists.append((everything if text_kept is None else _with_text(text_kept, heads, text_blocks)) + start)

  lists = tuple(index.reshape(-1, index.shape[-1]) for index in lists)
  outs = _attend(scale, tuple(queries), *tables, lists, valid)
  joined = jnp.concatenate([out.reshape(batch, heads, -1, dim) for out in reversed(outs)], axis=2)
  return jnp.swapaxes(joined, 1, 2)


def _to_table(x: Array, text_len: int, block_size: int) -> jax.Array:
  """[B, T, H, D] to [B * H * (text blocks + Tb), block_size, D], the text padded to whole blocks."""
  x = jnp.swapaxes(x, 1, 2)
  gap = -text_len % block_size
  if gap:
    blank = jnp.zeros((*x.shape[:2], gap, x.shape[3]), x.dtype)
    x = jnp.concatenate([x[:, :, :text_len], blank, x[:, :, text_len:]], axis=2)
  return x.reshape(-1, block_size, x.shape[-1])


def _valid_table(batch, heads, image_len, text_len, block_size, text_mask, key_mask) -> jax.Array | None:
  """bool [B * H * (text blocks + Tb), block_size] beside the key table; None where every key counts."""
  gap = -text_len % block_size
  if text_mask is None and key_mask is None and not gap:
    return None
  text = jnp.ones((batch, text_len), bool) if text_mask is None else text_mask
  image = jnp.ones((batch, image_len), bool) if key_mask is None else key_mask
  row = jnp.concatenate([text, jnp.zeros((batch, gap), bool), image], axis=1)
  return jnp.repeat(row[:, None], heads, axis=1).reshape(-1, block_size)


def _with_text(kept: Array, heads: int, text_blocks: int) -> jax.Array:
  """Text blocks in front of every list: int32 [B * heads, rows, text blocks + n], relative to the head's start."""
  batch, _, rows, count = kept.shape
  image = jnp.broadcast_to(kept.astype(jnp.int32) + text_blocks, (batch, heads, rows, count))
  text = jnp.broadcast_to(jnp.arange(text_blocks, dtype=jnp.int32), (batch, heads, rows, text_blocks))
  return jnp.concatenate([text, image], axis=-1).reshape(batch * heads, rows, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, queries, k, v, lists, valid):
  """Attention of queries [N, rows, D] over the rows of tables k, v [M, b, D] that lists [N, n] name, pair by pair."""
  return _attend_fwd(scale, queries, k, v, lists, valid)[0]


def _attend_fwd(scale, queries, k, v, lists, valid):
  tables = _fast(k), _fast(v)

  def step(carry, chunk):
    q, index = chunk
    keys, values, seen = _gather(*tables, valid, index)
    logits = _dot("crd,ckd->crk", _fast(q), keys)
    if seen is not None:
      logits = jnp.where(seen[:, None], logits, _HIDDEN)
    # The floor lies above hidden logits: where all keys are hidden every weight is exp(-huge) = 0. Scaling after the
    # maximum spares a pass over the logits.
    top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), _HIDDEN / 2)
    weights = jnp.exp((logits - top) * scale)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _dot("crk,ckd->crd", weights.astype(values.dtype), values)
    out = out / jnp.where(total > 0, total, 1.0)
    log_total = jnp.where(total > 0, scale * top + jnp.log(total), 0.0)
    return carry, (out.astype(q.dtype), log_total[..., 0])

  results = [_scan_chunks(step, (), (q, index), k.shape[1])[1] for q, index in zip(queries, lists, strict=True)]
  outs = tuple(out for out, _ in results)
  return outs, (queries, k, v, lists, valid, outs, tuple(log_total for _, log_total in results))


def _attend_bwd(scale, saved, grads):
  queries, k, v, lists, valid, outs, log_totals = saved
  tables = _fast(k), _fast(v)

  def step(carry, chunk):
    dk, dv = carry
    q, index, out, log_total, grad = chunk
    dtype, q, grad = q.dtype, _fast(q), _fast(grad)
    keys, values, seen = _gather(*tables, valid, index)
    logits = _dot("ckd,crd->ckr", keys, q) * scale
    if seen is not None:
      logits = jnp.where(seen[:, :, None], logits, _HIDDEN)
    weights = jnp.exp(logits - log_total[:, None])
    shared = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, None]
    dlogits = (weights * (_dot("ckd,crd->ckr", values, grad) - shared) * scale).astype(keys.dtype)
    dq = _dot("crk,ckd->crd", _turned(dlogits), keys).astype(dtype)
    dk = _add_at(dk, index, _dot("ckr,crd->ckd", dlogits, q))
    dv = _add_at(dv, index, _dot("ckr,crd->ckd", weights.astype(grad.dtype), grad))
    return (dk, dv), dq

  carry = tuple(jnp.zeros((x.shape[0], x.shape[1] * x.shape[2]), jnp.float32) for x in (k, v))
  dqs = []
  for chunks in zip(queries, lists, outs, log_totals, grads, strict=True):
    carry, dq = _scan_chunks(step, carry, chunks, k.shape[1])
    dqs.append(dq)
  dk, dv = carry
  return tuple(dqs), dk.astype(k.dtype).reshape(k.shape), dv.astype(v.dtype).reshape(v.shape), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _gather(k, v, valid, index):
  """The listed rows of the tables side by side: keys and values [c, n * b, D], visibility [c, n * b] or None."""

  def take(table):
    rows = table.reshape(table.shape[0], -1).at[index.reshape(-1)].get(mode="promise_in_bounds")
    # The barrier keeps XLA from fusing the reshape below into the gather, which would then copy element by element.
    return jax.lax.optimization_barrier(rows).reshape(index.shape[0], -1, *table.shape[2:])

  return take(k), take(v), None if valid is None else take(valid)


def _turned(x):
  """The last two axes swapped; on CPU as a copy, since a product over the second last axis is slow there."""
  x = jnp.swapaxes(x, 1, 2)
  return jax.lax.optimization_barrier(x) if placement.platform() == "cpu" else x


def _fast(x):
  return x.astype(placement.product_dtype(x.dtype))


def _dot(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _add_at(table, index, update):
  index = index.reshape(-1)
  return table.at[index].add(update.reshape(index.shape[0], -1), mode="promise_in_bounds")


def _chunking() -> tuple[int, int]:
  """Logits in one chunk, and chunks in one step of the scan."""
  if placement.platform() != "cpu":
    return _ACCELERATOR
  return _CPU_ONE_CORE if placement.cores_per_device() == 1 else _CPU


def _scan_chunks(step, carry, inputs, block_size):
  """lax.scan of step over chunks of the leading axis N of inputs = (queries, lists, ...).

  Missing entries of the last chunks are zero queries with zero gradients, which read row 0, add nothing to it, and are
  cut from the outputs.
  """
  q, index = inputs[:2]
  count = q.shape[0]
  most_logits, unroll = _chunking()
  size = max(1, most_logits // (q.shape[1] * index.shape[1] * block_size))
  if size >= count:
    return step(carry, inputs)
  unroll = min(-(-count // size), unroll)
  # Down to half of either, the ones that leave the fewest entries to fill up.
  choices = itertools.product(range(size, size // 2, -1), range(unroll, unroll // 2, -1))
  size, unroll = min(choices, key=lambda choice: -count % math.prod(choice))
  steps = -(-count // (size * unroll)) * unroll

  def split(x):
    gap = steps * size - count
    if gap:
      x = jnp.concatenate([x, jnp.zeros((gap, *x.shape[1:]), x.dtype)])
    return x.reshape(steps, size, *x.shape[1:])

  carry, outputs = jax.lax.scan(step, carry, jax.tree.map(split, inputs), unroll=unroll)
  return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], outputs)
