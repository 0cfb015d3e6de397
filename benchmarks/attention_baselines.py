"""Dense attentions to measure sparse attention against: the best that JAX and, where installed, torch offer.

Every function here maps q, k, v [1, tokens, heads, head_dim] to an output of the same shape and is differentiable.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from elasticdit_jax.ops.attention import dense_attention

# Query rows of one chunk on CPU: what suits most lengths, and fewer, which suits gradients of long sequences. An
# accelerator needs more logits at once.
_ROWS, _FEWER_ROWS = 384, 128
_CHUNK_LOGITS_ACCELERATOR = 64_000_000


def chunk_rows(tokens: int, most: int | None = None) -> int:
  """Query rows of one chunk of `chunked`: a divisor of the number of tokens, up to `most` or 64."""
  if most is None:
    most = _ROWS if jax.default_backend() == "cpu" else _CHUNK_LOGITS_ACCELERATOR // tokens
  most = max(64, min(tokens, most))
  return max(rows for rows in range(1, most + 1) if tokens % rows == 0)


def chunked(
  q: jax.Array, k: jax.Array, v: jax.Array, *, upcast: bool = False, most_rows: int | None = None
) -> jax.Array:
  """Dense attention that never holds more logits than one chunk of rows, in both directions.

  lax.scan over chunks of queries of one head at a time; the backward pass recomputes the weights from the saved
  log-sum-exp and adds dk and dv up in float32. The same style as the sparse form, so that their ratio shows sparsity.

  Args:
    upcast: products of bfloat16 inputs in float32, which some CPUs do faster.
    most_rows: of a chunk; see chunk_rows.
  """
  heads_first = [jnp.swapaxes(x[0], 0, 1).astype(jnp.float32 if upcast else x.dtype) for x in (q, k, v)]
  out = _chunked(q.shape[-1] ** -0.5, chunk_rows(q.shape[1], most_rows), *heads_first)
  return jnp.swapaxes(out, 0, 1)[None].astype(q.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(scale, rows, q, k, v):
  return _chunked_fwd(scale, rows, q, k, v)[0]


def _chunked_fwd(scale, rows, q, k, v):
  def head(inputs):
    q, k, v = inputs

    def step(carry, q):
      logits = _dot("rd,kd->rk", q, k)
      top = jnp.max(logits, axis=-1, keepdims=True)
      weights = jnp.exp((logits - top) * scale)
      total = jnp.sum(weights, axis=-1, keepdims=True)
      out = _dot("rk,kd->rd", weights.astype(v.dtype), v) / total
      return carry, (out.astype(q.dtype), (scale * top + jnp.log(total))[:, 0])

    return jax.lax.scan(step, None, q)[1]

  outs, log_totals = jax.lax.map(head, (_cut(q, rows), k, v))
  return outs.reshape(q.shape), (q, k, v, outs, log_totals)


def _chunked_bwd(scale, rows, saved, grad):
  q, k, v, outs, log_totals = saved

  def head(inputs):
    q, k, v, *chunks = inputs

    def step(carry, chunk):
      dk, dv = carry
      q, out, log_total, grad = chunk
      weights = jnp.exp(_dot("kd,rd->kr", k, q) * scale - log_total)
      shared = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
      dlogits = (weights * (_dot("kd,rd->kr", v, grad) - shared) * scale).astype(q.dtype)
      dk += _dot("kr,rd->kd", dlogits, q)
      dv += _dot("kr,rd->kd", weights.astype(grad.dtype), grad)
      return (dk, dv), _dot("rk,kd->rd", _turned(dlogits), k).astype(q.dtype)

    carry = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(step, carry, (q, *chunks))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)

  dq, dk, dv = jax.lax.map(head, (_cut(q, rows), k, v, outs, log_totals, _cut(grad, rows)))
  return dq.reshape(q.shape), dk, dv


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _turned(x: jax.Array) -> jax.Array:
  """The transpose; on CPU as a copy, since a product over the first axis is slow there."""
  return jax.lax.optimization_barrier(x.T) if jax.default_backend() == "cpu" else x.T


def _dot(subscripts: str, a, b) -> jax.Array:
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _cut(x: jax.Array, rows: int) -> jax.Array:
  """[heads, tokens, D] to [heads, chunks, rows, D]."""
  return x.reshape(x.shape[0], -1, rows, x.shape[2])


def dense_jax() -> dict[str, Callable[..., jax.Array]]:
  """Name -> dense attention, everything JAX offers on the current platform."""
  found = {"dot_product_attention": partial(jax.nn.dot_product_attention, implementation="xla"), "chunked": chunked}
  if jax.default_backend() == "cpu":
    found[f"chunked by {_FEWER_ROWS} rows"] = partial(chunked, most_rows=_FEWER_ROWS)
    found["chunked in float32"] = partial(chunked, upcast=True)
    found[f"chunked by {_FEWER_ROWS} rows in float32"] = partial(chunked, upcast=True, most_rows=_FEWER_ROWS)
    # What layers of sparsity 0 run; elsewhere that is jax.nn.dot_product_attention.
    found["dense_attention"] = partial(dense_attention, text_len=0)
  if jax.default_backend() == "gpu":
    found["cuDNN"] = partial(jax.nn.dot_product_attention, implementation="cudnn")
  return found
