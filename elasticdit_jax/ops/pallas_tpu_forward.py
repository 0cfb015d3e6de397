"""Forward TPU kernel of Shift Sparse Block Attention.

  per query block:   S = Q [text | kept blocks]^T  ->  one-shot softmax (the list length is static)  ->  O = P V
  text queries:      if any, once per heads, over all keys in chunks, with a running maximum

The kept blocks are slices of keys that are already in VMEM, concatenated as values: one wide product per query block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from elasticdit_jax.ops import pallas_tpu_pieces as pieces
from elasticdit_jax.ops.pallas_tpu_pieces import HIDDEN, LOG2_E, Unit
from elasticdit_jax.ops.pallas_tpu_plan import Plan
from elasticdit_jax.ops.pallas_tpu_specs import Specs


def forward(plan: Plan, inputs: dict[str, jax.Array], save: bool) -> dict[str, jax.Array]:
  """Calls the kernel.

  Args:
    plan: the sizes.
    inputs: q, k, v, lists and, where the plan has them, text_k, text_v, text_q, key_bias, text_bias, as
      Specs.shapes describes them.
    save: also return what the backward pass needs.

  Returns:
    out and text_out like q and text_q, where there is one; with save also log_total and text_log_total, the logarithm
    to base 2 of the sum of weights of every query.
  """
  specs = Specs(plan, backward=False)
  names_in = list(inputs)
  names_out = ["out", "log_total"] + (["text_out", "text_log_total"] if plan.text_tiles else [])
  if not save:
    names_out = [name for name in names_out if "log" not in name]
  dtype = inputs["q"].dtype
  outs = pl.pallas_call(
    partial(_kernel, plan=plan, names=(*names_in, *names_out)),
    grid=plan.grid,
    in_specs=[specs.block(name) for name in names_in],
    out_specs=[specs.block(name) for name in names_out],
    out_shape=[specs.shape(name, dtype) for name in names_out],
    compiler_params=specs.compiler_params(),
    cost_estimate=plan.cost(backward=False),
    interpret=plan.interpret,
    name="sparse_attention_forward",
  )(*inputs.values())
  return dict(zip(names_out, outs, strict=True))


def _kernel(*refs, plan: Plan, names: tuple[str, ...]) -> None:
  at = dict(zip(names, refs, strict=True))
  if plan.text_tiles:

    @pl.when(pl.program_id(2) == 0)
    def _():
      for tile in range(plan.text_tiles):
        _text_queries(at, tile, plan)

  def first(unit):
    q = pieces.stack(at["q"][0, pieces.rows_of(unit, plan), :], plan.groups[unit[1]], plan)
    return pieces.dot_nt(q, pieces.gather(at, "k", unit, plan))

  def middle(unit, logits):
    blocks = pieces.listed_blocks(at, unit, plan)
    logits = _scaled(logits, pieces.bias_row(at, plan, plan.text, blocks), plan)
    top = _floored(jnp.max(logits, axis=1, keepdims=True), plan)
    weights = jnp.exp2(logits - top)
    return weights.astype(at["v"].dtype), top, jnp.sum(weights, axis=1, keepdims=True)

  def last(unit, weights, top, total):
    inverse, log_total = _finish(top, total, plan)
    out = pieces.dot(weights, pieces.gather(at, "v", unit, plan)) * inverse
    _store(at, unit, out, log_total, plan)

  units = [(row, group) for row in range(plan.tile) for group in range(len(plan.groups))]
  pieces.pipelined(units, first, middle, last)


def _scaled(logits: jax.Array, bias: jax.Array | None, plan: Plan) -> jax.Array:
  logits = logits * (plan.scale * LOG2_E)
  return logits if bias is None else logits + bias


def _floored(top: jax.Array, plan: Plan) -> jax.Array:
  """Above hidden logits: where all keys are hidden every weight is then 2^-huge = 0."""
  return jnp.maximum(top, HIDDEN / 2) if plan.masked else top


def _finish(top: jax.Array, total: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
  """1 / total, and log2 of the sum of weights; a query without keys gets zeros, here and in the backward pass."""
  if not plan.masked:
    return 1 / total, top + jnp.log2(total)
  some = total > 0
  safe = jnp.where(some, total, 1.0)
  return jnp.where(some, 1 / safe, 0.0), jnp.where(some, top + jnp.log2(safe), -HIDDEN)


def _store(at: dict[str, Any], unit: Unit, out: jax.Array, log_total: jax.Array, plan: Plan) -> None:
  row, group = unit
  rows = pieces.rows_of(unit, plan)
  out = pieces.unstack(out, plan.groups[group], plan).astype(at["out"].dtype)
  at["out"][0, rows, :] = out if group == 0 else at["out"][0, rows, :] + out
  if "log_total" in at:
    size = log_total.shape[0]
    at["log_total"][0, 0, 0, row : row + 1, group * size : (group + 1) * size] = log_total.T


def _text_queries(at: dict[str, Any], tile: int, plan: Plan) -> None:
  """Text queries read every key: a running softmax over chunks of the keys that are in VMEM anyway."""
  heads = tuple(range(plan.pack))
  rows = slice(tile * plan.text_tile, (tile + 1) * plan.text_tile)
  q = pieces.stack(at["text_q"][0, rows, :], heads, plan)

  def update(keys, values, bias, carry):
    top, total, out = carry
    logits = _scaled(pieces.dot_nt(q, keys), bias, plan)
    higher = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp2(logits - higher)
    shrink = jnp.exp2(top - higher)
    total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
    return higher, total, out * shrink + pieces.dot(weights.astype(values.dtype), values)

  def chunk(start, count, carry):
    keys = pl.ds(pl.multiple_of(start * plan.block, plan.block), count * plan.block)
    bias = pieces.bias_row(at, plan, 0, [start + j for j in range(count)])
    return update(at["k"][0, keys, :], at["v"][0, keys, :], bias, carry)

  column = (q.shape[0], 1)
  carry = jnp.full(column, HIDDEN / 2), jnp.zeros(column), jnp.zeros((q.shape[0], plan.width))
  carry = update(at["text_k"][0], at["text_v"][0], pieces.bias_row(at, plan, plan.text, []), carry)
  top, total, out = pieces.over_image(plan, chunk, carry)
  inverse, log_total = _finish(top, total, plan)
  at["text_out"][0, rows, :] = pieces.unstack(out * inverse, heads, plan).astype(at["text_out"].dtype)
  if "text_log_total" in at:
    at["text_log_total"][0, 0, tile : tile + 1, :] = log_total.T
