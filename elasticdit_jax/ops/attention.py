"""Dense joint attention over text and image tokens: what a layer of sparsity 0 runs."""

from functools import partial

import jax
import jax.numpy as jnp

from elasticdit_jax.ops import placement
from elasticdit_jax.types import Array

# On CPU: logits of a head above which they are made and used by so many queries at a time.
_MANY_LOGITS, _QUERIES = 4_000_000, 128


def dense_attention(
  q: Array,
  k: Array,
  v: Array,
  text_len: int,
  text_mask: Array | None = None,
  *,
  image_mask: Array | None = None,
  text_queries: bool = True,
  scale: float | None = None,
  batch_axes: placement.Axes = None,
  head_axes: placement.Axes = None,
) -> jax.Array:
  """softmax(scale q k^T) v over all tokens, with absent text tokens hidden from every query.

  Args:
    q: [B, T, heads, head_dim], the text tokens first; see also text_queries.
    k: [B, T, heads, head_dim].
    v: like k.
    text_len: how many of the T tokens are text; 0 for none.
    text_mask: bool [B, text_len], True where a text token is present; None where all are. A row without any is fine as
      long as there are image tokens.
    image_mask: bool [B, heads or 1, T or T - text_len, T - text_len], which image tokens a query sees besides all text;
      without rows for them, text queries see every one. None where all do.
    text_queries: False where nobody reads the text rows: q then holds the image tokens alone, and so does the result.
    scale: head_dim ** -0.5 where None.
    batch_axes: where the program is split over devices, the mesh axes over which B is split. They matter on CPU, where
      many tokens are a loop over heads, which XLA would not split by itself. Explicit axes need not be named.
    head_axes: the mesh axes over which heads are split.

  Returns:
    Like q, in its dtype; logits and softmax are float32. Rows of absent text tokens hold
    what an ordinary query would get; nothing may read them.

  Raises:
    ValueError: where shapes or dtypes disagree.
  """
  check_qkv(q, k, v, text_len, text_mask, text_queries)
  if image_mask is not None:
    _check_image_mask(image_mask, q, k, text_len, text_queries)
  on_cpu = placement.platform() == "cpu"
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  weigh = partial(_head_major_attention if on_cpu else jax.nn.dot_product_attention, scale=scale)

  def attend(q, k, v, image_mask, text_mask) -> jax.Array:
    return weigh(q, k, v, mask=_joined_mask(q.shape[1], k, text_len, text_mask, image_mask))

  text_mask = text_mask if text_len else None
  if not on_cpu or not _long(q, k):
    return placement.undivided(attend, q, k, v, image_mask, text_mask)
  lists, masks = {"image_mask": image_mask}, {"text_mask": text_mask}
  return placement.over_batch_and_heads(attend, q, k, v, lists, masks, batch_axes=batch_axes, head_axes=head_axes)


def _joined_mask(
  queries: int, k: Array, text_len: int, text_mask: Array | None, image_mask: Array | None
) -> jax.Array | None:
  """bool [B, heads or 1, queries or 1, T], or None where every query sees every token."""
  mask = None
  if text_mask is not None:
    image = jnp.ones((k.shape[0], k.shape[1] - text_len), bool)
    mask = jnp.concatenate([text_mask, image], axis=1)[:, None, None, :]
  if image_mask is not None:
    rows = queries - image_mask.shape[2]  # text queries that see every image token
    seen = jnp.pad(image_mask, ((0, 0), (0, 0), (rows, 0), (text_len, 0)), constant_values=True)
    mask = seen if mask is None else mask & seen
  return mask


def _long(q: Array, k: Array) -> bool:
  return q.shape[1] * k.shape[1] > _MANY_LOGITS


def _head_major_attention(q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> jax.Array:
  """jax.nn.dot_product_attention in a form that XLA on CPU runs, with its gradient, in half the time.

  Heads go before tokens once, so that products need no transposed copies of [T, T] arrays.
  """
  attend = _in_parts if _long(q, k) else _weigh
  dtype = q.dtype
  q, k, v = (x.swapaxes(1, 2).astype(placement.product_dtype(dtype)) for x in (q, k, v))
  q *= jnp.asarray(scale, q.dtype)
  return attend(q, k, v, mask).astype(dtype).swapaxes(1, 2)


def _weigh(q: Array, k: Array, v: Array, mask: Array | None) -> jax.Array:
  """softmax(q k^T) v of [..., T, D]; mask broadcasts to the logits. Rows are divided by their sums at the end."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum("...qd,...kd->...qk", q, k, preferred_element_type=wide)
  if mask is not None:
    # Added, not selected: masks are small where they say the same of every query. A logit is lost in the number.
    logits += jnp.where(mask, 0, jnp.finfo(wide).min / 2)
  # A row's largest logit only keeps exp within range: the result does not depend on it.
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  out = jnp.einsum("...qk,...kd->...qd", weights.astype(v.dtype), v, preferred_element_type=wide)
  return out / weights.sum(-1, keepdims=True)


def _in_parts(q: Array, k: Array, v: Array, mask: Array | None) -> jax.Array:
  """`_weigh` of [B, heads, T, D], one head and _QUERIES at a time, in the backward pass once more.

  Logits of all heads at once, 1 GB per head at 16384 tokens, neither stay in a cache nor fit into memory.
  """
  heads, count, dim = q.shape[1:]
  whole = count - count % _QUERIES
  one = jax.checkpoint(lambda q, seen, k, v: _weigh(q, k, v, seen), prevent_cse=False)

  def cut(x):
    return x[:, :whole].reshape(-1, 1, _QUERIES, x.shape[-1])

  # The axis of size 1 keeps these products of activations: evals/flops.py tells them from weights by it.
  def head(inputs):
    number, q, k, v = inputs
    seen = None if mask is None else mask[number // heads, number % heads % mask.shape[1]][None]
    own = mask is not None and mask.shape[2] > 1  # every query sees something else
    parts = cut(q), cut(seen) if own else None
    out = jax.lax.map(lambda part: one(part[0], part[1] if own else seen, k, v), parts).reshape(1, whole, dim)
    if whole == count:
      return out
    return jnp.concatenate([out, one(q[:, whole:], seen[:, whole:] if own else seen, k, v)], axis=1)

  flat = [x.reshape(-1, 1, *x.shape[2:]) for x in (q, k, v)]
  return jax.lax.map(head, (jnp.arange(len(flat[0])), *flat)).reshape(q.shape)


def _check_image_mask(image_mask: Array, q: Array, k: Array, text_len: int, text_queries: bool) -> None:
  image = k.shape[1] - text_len
  rows = (image, k.shape[1]) if text_queries else (image,)
  good = image_mask.ndim == 4 and image_mask.shape[0] == q.shape[0] and image_mask.shape[1] in (1, q.shape[2])
  if not good or image_mask.shape[2] not in rows or image_mask.shape[3] != image:
    expected = f"[{q.shape[0]}, {q.shape[2]} or 1, {' or '.join(map(str, rows))}, {image}]"
    raise ValueError(f"image_mask: expected bool {expected}, got {image_mask.dtype} {image_mask.shape}")


def check_qkv(q: Array, k: Array, v: Array, text_len: int, text_mask: Array | None, text_queries: bool = True) -> None:
  """Raises ValueError, naming the argument, where joint attention inputs do not fit together."""
  if q.ndim != 4:
    raise ValueError(f"q: expected [B, T, heads, head_dim], got shape {q.shape}")
  tokens = q.shape[1] + (0 if text_queries else text_len)
  shape = (q.shape[0], tokens, *q.shape[2:])
  for name, x in (("k", k), ("v", v)):
    if x.shape != shape:
      more = "" if text_queries else f" with {text_len} tokens of text"
      raise ValueError(f"{name}: expected shape {shape} like q{more}, got {x.shape}")
    if x.dtype != q.dtype:
      raise ValueError(f"{name}: expected dtype {q.dtype} like q, got {x.dtype}; cast it first")
  if not 0 <= text_len <= tokens:
    raise ValueError(f"text_len: expected 0..{tokens}, the number of tokens in q, got {text_len}")
  if text_mask is not None:
    expected = (q.shape[0], text_len)
    if text_mask.shape != expected or text_mask.dtype != jnp.bool_:
      raise ValueError(f"text_mask: expected bool {expected}, got {text_mask.dtype} {text_mask.shape}")
