"""SSBA as Pallas TPU kernels, forward and backward: keys and values of a head in VMEM, lists in SMEM.

This file brings the arrays into the layout of the kernels (pallas_tpu_specs) and back, and owns the derivative. In a
program that is split over devices the kernels run under jax.shard_map, see placement.over_batch_and_heads.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from elasticdit_jax.ops import pallas_tpu_pieces, pallas_tpu_plan, placement
from elasticdit_jax.ops.pallas_tpu_backward import backward
from elasticdit_jax.ops.pallas_tpu_forward import forward
from elasticdit_jax.ops.pallas_tpu_plan import Plan
from elasticdit_jax.ops.sparse_attention_xla import sparse_attention_xla
from elasticdit_jax.types import Array

# Query blocks in one step of the grid, at most: more hide the fixed cost of a step and overlap better, but are longer
# code. Long lists are long code already and hide more by themselves.
_TILE = 8
_LONG_LIST, _TILE_LONG = 2048, 4
_LANES = 128


def obstacle(k: Array, kept: Array, text_len: int, block_size: int) -> str | None:
  """Why a TPU cannot run the kernels on keys and lists of these shapes; None where it can."""
  plan = plan_of(k, kept, text_len, block_size)
  return pallas_tpu_plan.obstacle(plan, jnp.dtype(k.dtype).name)


def sparse_attention_pallas_tpu(
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
  interpret: bool = False,
) -> jax.Array:
  """See sparse_attention.sparse_attention. The kernels let text queries read everything; with lists of their own they
  go through sparse_attention_xla: they are few.

  Args:
    interpret: run the kernels step by step on any platform, for tests; takes any block size and head dimension.

  Raises:
    NotImplementedError: where `obstacle` names one, unless interpret.
  """
  options = {"text_len": text_len, "block_size": block_size, "text_mask": text_mask, "key_mask": key_mask}
  if text_kept is not None:
    text = sparse_attention_xla(
      q[:, :text_len], k, v, None, **options, text_queries=True, text_kept=text_kept, scale=scale
    )
    options |= {"text_queries": False, "text_kept": None, "scale": scale, "interpret": interpret}
    return jnp.concatenate([text, sparse_attention_pallas_tpu(q[:, text_len:], k, v, kept, **options)], axis=1)
  reason = None if interpret else obstacle(k, kept, text_len, block_size)
  if reason:
    raise NotImplementedError(f"implementation='pallas_tpu': {reason}; use None or 'xla'")
  plan = plan_of(
    k,
    kept,
    text_len,
    block_size,
    scale=scale,
    key_bias=key_mask is not None,
    text_bias=text_mask is not None or text_len % block_size > 0,
    text_queries=text_queries,
    interpret=interpret,
  )
  biases = {}
  if plan.key_bias:
    biases["key_bias"] = _bias(key_mask).reshape(plan.batch, plan.blocks, plan.block)
  if plan.text and plan.text_bias:
    mask = jnp.ones((plan.batch, text_len), bool) if text_mask is None else text_mask
    biases["text_bias"] = _bias(jnp.pad(mask, ((0, 0), (0, plan.text - text_len))))[:, None]
  # The backward kernel knows hidden keys by their being zero; the derivative of this line clears their gradients.
  k, v = (_cleared(x, text_len, text_mask, key_mask) for x in (k, v))
  text_q, image_q = jnp.split(q, [text_len if text_queries else 0], axis=1)
  arrays = {"q": _to_lanes(image_q, plan, plan.tiles * plan.tile * plan.block)}
  arrays |= {name: _to_lanes(x[:, text_len:], plan, plan.image) for name, x in (("k", k), ("v", v))}
  if text_len:
    arrays |= {f"text_{name}": _to_lanes(x[:, :text_len], plan, plan.text) for name, x in (("k", k), ("v", v))}
  if plan.text_tiles:
    arrays["text_q"] = _to_lanes(text_q, plan, plan.text)
  out = _attend(plan, arrays, {"lists": _lists(kept, plan)}, biases)
  image = _from_lanes(out["out"], image_q.shape[1], q)
  if not plan.text_tiles:
    return image
  return jnp.concatenate([_from_lanes(out["text_out"], text_len, q), image], axis=1)


def plan_of(k: Array, kept: Array, text_len: int, block_size: int, scale: float = 1.0, **options) -> Plan:
  """Sizes of the kernels for keys and lists of these shapes; options are further fields of Plan."""
  batch, tokens, heads, head_dim = k.shape
  blocks = (tokens - text_len) // block_size
  text = -(-text_len // block_size) * block_size
  most = _TILE if text + kept.shape[3] * block_size <= _LONG_LIST else _TILE_LONG
  alone = Plan(
    batch=batch,
    heads=heads,
    head_dim=head_dim,
    pack=1,
    shared=kept.shape[1] == 1,
    block=block_size,
    blocks=blocks,
    kept=kept.shape[3],
    text=text,
    tile=-(-blocks // -(-blocks // most)),
    scale=scale,
    itemsize=jnp.dtype(k.dtype).itemsize,
    **{"key_bias": False, "text_bias": False, **options},
  )
  pair = dataclasses.replace(alone, pack=2, heads=-(-heads // 2) * 2)
  return pair if _pays(pair, heads) else alone


def _pays(pair: Plan, heads: int) -> bool:
  """Whether heads go through the kernels two by two: always where they share 128 lanes, which have to be filled.

  On a larger matrix unit two heads of 128 channels that read one list share the weight loads, if VMEM holds the next
  two beside them.
  """
  if pair.width <= _LANES:
    return True
  unit = pallas_tpu_plan.MATRIX_UNIT.get(placement.device_kind(), _LANES)
  fits = pair.buffers(backward=True) == 2
  return pair.width <= unit and pair.shared and heads % 2 == 0 and fits


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, arrays, lists, biases):
  """The kernels on arrays in their layout: {out, text_out}."""
  return forward(plan, {**lists, **arrays, **biases}, save=False)


def _attend_fwd(plan, arrays, lists, biases):
  results = forward(plan, {**lists, **arrays, **biases}, save=True)
  stats = {name: results.pop(name) for name in list(results) if "log" in name}
  return results, (arrays, lists, results, stats)


def _attend_bwd(plan, saved, grads):
  arrays, lists, outs, stats = saved
  inputs = {**lists, **arrays, "grad": grads["out"], **stats}
  inputs["delta"] = _delta(grads["out"], outs["out"], plan.block, plan).reshape(stats["log_total"].shape)
  if plan.text_tiles:
    inputs["text_grad"] = grads["text_out"]
    inputs["text_delta"] = _delta(grads["text_out"], outs["text_out"], plan.text_tile, plan)
  results = backward(plan, inputs)
  return (
    {name: results[name.replace("text_", "text_d") if "text" in name else f"d{name}"] for name in arrays},
    None,
    None,
  )


_attend.defvjp(_attend_fwd, _attend_bwd)


def _delta(grad: jax.Array, out: jax.Array, rows: int, plan: Plan) -> jax.Array:
  """Sum over channels of grad * out, a row for each pack of heads: [B, heads / pack, T / rows, pack * rows]."""
  batch, tokens, _ = grad.shape
  product = grad.astype(jnp.float32) * out.astype(jnp.float32)
  shape = (batch, tokens // rows, rows, plan.heads // plan.pack, plan.pack, plan.head_dim)
  sums = jnp.sum(product.reshape(shape), axis=-1)
  return jnp.transpose(sums, (0, 3, 1, 4, 2)).reshape(batch, plan.heads // plan.pack, tokens // rows, -1)


def _bias(mask: Array) -> jax.Array:
  return jnp.where(mask, 0.0, pallas_tpu_pieces.HIDDEN).astype(jnp.float32)


def _cleared(x, text_len, text_mask, key_mask):
  if text_mask is None and key_mask is None:
    return x
  text = jnp.ones((x.shape[0], text_len), bool) if text_mask is None else text_mask
  image = jnp.ones((x.shape[0], x.shape[1] - text_len), bool) if key_mask is None else key_mask
  return jnp.where(jnp.concatenate([text, image], axis=1)[..., None, None], x, jnp.zeros((), x.dtype))


def _to_lanes(x: Array, plan: Plan, tokens: int) -> jax.Array:
  """[B, T, H, D] to [B, tokens, heads * D]: heads side by side, both axes padded with zeros."""
  x = _pad(_pad(x, 2, plan.heads), 1, tokens)
  return x.reshape(*x.shape[:2], -1)


def _from_lanes(x: jax.Array, tokens: int, like: Array) -> jax.Array:
  heads, dim = like.shape[2:]
  return x[:, :tokens].reshape(x.shape[0], tokens, -1, dim)[:, :, :heads]


def _lists(kept: Array, plan: Plan) -> jax.Array:
  """[B, 1 or heads, tiles, 1, tile * kept]; queries that are padding list block 0 and add nothing to it."""
  kept = kept.astype(jnp.int32)
  if not plan.shared:
    kept = _pad(kept, 1, plan.heads)
  kept = _pad(kept, 2, plan.tiles * plan.tile)
  return kept.reshape(*kept.shape[:2], plan.tiles, 1, plan.tile * plan.kept)


def _pad(x: Array, axis: int, size: int) -> jax.Array:
  if x.shape[axis] == size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths)
