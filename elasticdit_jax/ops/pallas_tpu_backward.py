"""Backward TPU kernel of Shift Sparse Block Attention: one pass over the same lists, five products.

  per query block:  P = 2^(S - log_total),  dS = P (dO V^T - delta)
                    dQ = dS K,  dK[kept] += dS^T Q,  dV[kept] += P^T dO

Tiles of one head run one after the other on one core, so that dk and dv are plain float32 sums in VMEM: no atomics, no
transposed lists. Where rows of two heads fill 128 lanes the logits are computed transposed, [keys, rows]: then only dQ
needs a transposition, and four of the five products share the small operand in the matrix unit.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elasticdit_jax.ops import pallas_tpu_pieces as pieces
from elasticdit_jax.ops.pallas_tpu_pieces import LOG2_E
from elasticdit_jax.ops.pallas_tpu_plan import Plan
from elasticdit_jax.ops.pallas_tpu_specs import Specs

_KEYS = ("k", "v")


def backward(plan: Plan, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Calls the kernel.

  Args:
    plan: the sizes.
    inputs: those of forward without biases, with hidden keys and values zero, and grad, log_total, delta and their
      text_ namesakes where the text has queries. delta is the sum over channels of grad * out.

  Returns:
    dq, dk, dv and, where there are such, text_dq, text_dk, text_dv like their namesakes. Gradients of hidden keys mean
    nothing.
  """
  specs = Specs(plan, backward=True)
  names_in = list(inputs)
  names_out = ["dq", "dk", "dv"] + (["text_dk", "text_dv"] if plan.text else [])
  names_out += ["text_dq"] if plan.text_tiles else []
  sums = [f"{name}_sum" for name in names_out if not name.endswith("dq")]
  outs = pl.pallas_call(
    partial(_kernel, plan=plan, names=(*names_in, *names_out, *sums)),
    grid=plan.grid,
    in_specs=[specs.block(name) for name in names_in],
    out_specs=[specs.block(name) for name in names_out],
    out_shape=[specs.shape(name, inputs["q"].dtype) for name in names_out],
    scratch_shapes=[
      pltpu.VMEM((plan.text if "text" in name else plan.image, plan.width), jnp.float32) for name in sums
    ],
    compiler_params=specs.compiler_params(),
    cost_estimate=plan.cost(backward=True),
    interpret=plan.interpret,
    name="sparse_attention_backward",
  )(*inputs.values())
  return dict(zip(names_out, outs, strict=True))


def _kernel(*refs, plan: Plan, names: tuple[str, ...]) -> None:
  at = dict(zip(names, refs, strict=True))

  @pl.when(pl.program_id(2) == 0)
  def _():
    _clear(at, plan)
    for tile in range(plan.text_tiles):
      _text_queries(at, tile, plan)

  flip = plan.shared and plan.pack > 1

  def first(unit):
    q, grad = _stacked(at, unit, plan)
    keys, values = (pieces.gather(at, name, unit, plan) for name in _KEYS)
    return _products(q, grad, keys, values, flip)

  def middle(unit, products):
    row, group = unit
    size = len(plan.groups[group]) * plan.block
    stats = [at[name][0, 0, 0, row : row + 1, group * size : (group + 1) * size] for name in ("log_total", "delta")]
    return _weights(products, stats, at["q"].dtype, flip, plan)

  def last(unit, weights, dlogits):
    q, grad = _stacked(at, unit, plan)
    dq, dk, dv = _gradients(weights, dlogits, q, grad, pieces.gather(at, "k", unit, plan), flip)
    _store(at, unit, dq, plan)
    _add_listed(at, unit, dk, dv, plan)

  units = [(row, group) for row in range(plan.tile) for group in range(len(plan.groups))]
  pieces.pipelined(units, first, middle, last)

  @pl.when(pl.program_id(2) == plan.tiles - 1)
  def _():
    _finish(at, plan)


def _stacked(at, unit, plan):
  rows = pieces.rows_of(unit, plan)
  return (pieces.stack(at[name][0, rows, :], plan.groups[unit[1]], plan) for name in ("q", "grad"))


def _products(q, grad, keys, values, flip):
  """Unscaled logits and dO V^T: [rows, keys], or [keys, rows] where flip."""
  if flip:
    return pieces.dot_nt(keys, q), pieces.dot_nt(values, grad)
  return pieces.dot_nt(q, keys), pieces.dot_nt(grad, values)


def _weights(products, stats, dtype, flip, plan):
  """P and dS without the factor scale; stats are log_total and delta as rows."""
  logits, dweights = products
  log_total, delta = stats if flip else (row.T for row in stats)
  exponent = logits * (plan.scale * LOG2_E) - log_total
  if plan.masked:
    # Never positive for a key that counts; a hidden one, whose key is zero, must only stay finite.
    exponent = jnp.minimum(exponent, 0.0)
  weights = jnp.exp2(exponent)
  return weights.astype(dtype), (weights * (dweights - delta)).astype(dtype)


def _gradients(weights, dlogits, q, grad, keys, flip):
  if flip:
    return pieces.dot_tn(dlogits, keys), pieces.dot(dlogits, q), pieces.dot(weights, grad)
  return pieces.dot(dlogits, keys), pieces.dot_tn(dlogits, q), pieces.dot_tn(weights, grad)


def _store(at, unit, dq, plan):
  rows = pieces.rows_of(unit, plan)
  dq = (pieces.unstack(dq, plan.groups[unit[1]], plan) * plan.scale).astype(at["dq"].dtype)
  at["dq"][0, rows, :] = dq if unit[1] == 0 else at["dq"][0, rows, :] + dq


def _add_listed(at, unit, dk, dv, plan):
  for name, update in (("dk", dk), ("dv", dv)):
    if plan.text:
      at[f"text_{name}_sum"][...] += update[: plan.text]
    for j, index in enumerate(pieces.listed_blocks(at, unit, plan)):
      start = plan.text + j * plan.block
      at[f"{name}_sum"][pieces.at_block(index, plan), :] += update[start : start + plan.block]


def _text_queries(at: dict[str, Any], tile: int, plan: Plan) -> None:
  heads = tuple(range(plan.pack))
  rows = slice(tile * plan.text_tile, (tile + 1) * plan.text_tile)
  q, grad = (pieces.stack(at[f"text_{name}"][0, rows, :], heads, plan) for name in ("q", "grad"))
  stats = [at[f"text_{name}"][0, 0, tile : tile + 1, :] for name in ("log_total", "delta")]

  def update(keys, values, dk_sum, dv_sum, where, dq):
    products = _products(q, grad, keys, values, True)
    weights, dlogits = _weights(products, stats, q.dtype, True, plan)
    more, dk, dv = _gradients(weights, dlogits, q, grad, keys, True)
    dk_sum[where, :] += dk
    dv_sum[where, :] += dv
    return dq + more

  def chunk(start, count, dq):
    where = pl.ds(pl.multiple_of(start * plan.block, plan.block), count * plan.block)
    return update(at["k"][0, where, :], at["v"][0, where, :], at["dk_sum"], at["dv_sum"], where, dq)

  dq = jnp.zeros((q.shape[0], plan.width))
  dq = update(at["text_k"][0], at["text_v"][0], at["text_dk_sum"], at["text_dv_sum"], pl.ds(0, plan.text), dq)
  dq = pieces.over_image(plan, chunk, dq)
  at["text_dq"][0, rows, :] = (pieces.unstack(dq, heads, plan) * plan.scale).astype(at["text_dq"].dtype)


def _clear(at, plan):
  def chunk(rows, prefix):
    for name in ("dk_sum", "dv_sum"):
      total = at[prefix + name]
      total[rows, :] = jnp.zeros_like(total[rows, :])

  _each_chunk(plan, chunk)


def _finish(at, plan):
  def chunk(rows, prefix):
    for name, factor in (("dk", plan.scale), ("dv", 1.0)):
      out = at[prefix + name]
      out[0, rows, :] = (at[f"{prefix}{name}_sum"][rows, :] * factor).astype(out.dtype)

  _each_chunk(plan, chunk)


def _each_chunk(plan, visit):
  """visit(rows, prefix of the array names) over all keys; in a loop, because unrolled it would be long code."""

  def chunk(start, count, carry):
    visit(pl.ds(pl.multiple_of(start * plan.block, plan.block), count * plan.block), "")
    return carry

  pieces.over_image(plan, chunk, 0)
  if plan.text:
    visit(pl.ds(0, plan.text), "text_")
