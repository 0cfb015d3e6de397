"""What the forward and the backward TPU kernel of Shift Sparse Block Attention do alike, on values inside a kernel.

stacked rows of packed heads:   [ q0 | q1 ]  ->  [ q0 |  0 ]      one product with keys [ k0 | k1 ] gives the logits of
                                                 [  0 | q1 ]      both heads, the weight loads of the matrix unit shared
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from elasticdit_jax.ops.pallas_tpu_plan import TEXT_CHUNK, Plan

# Weights are powers of two: exp(x) would multiply by this anyway.
LOG2_E = 1.4426950408889634
HIDDEN = -1e30

# A unit of work: (query block within the tile, group of heads that share its list).
Unit = tuple[int, int]

_NN = (((1,), (0,)), ((), ()))
_NT = (((1,), (1,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """a b in float32."""
  return jax.lax.dot_general(a, b, _NN, preferred_element_type=jnp.float32)


def dot_nt(a: jax.Array, b: jax.Array) -> jax.Array:
  """a b^T in float32."""
  return jax.lax.dot_general(a, b, _NT, preferred_element_type=jnp.float32)


def dot_tn(a: jax.Array, b: jax.Array) -> jax.Array:
  """a^T b in float32."""
  return jax.lax.dot_general(a, b, _TN, preferred_element_type=jnp.float32)


def stack(x: jax.Array, heads: Sequence[int], plan: Plan) -> jax.Array:
  """[rows, width] to [len(heads) * rows, width]: one copy per head, the lanes of other heads zero."""
  if plan.pack == 1:
    return x
  return jnp.concatenate([jnp.where(_lanes(x, head, plan), x, jnp.zeros_like(x)) for head in heads], axis=0)


def unstack(x: jax.Array, heads: Sequence[int], plan: Plan) -> jax.Array:
  """The lanes of each head from its own rows: back from [len(heads) * rows, width]; other heads' lanes are zero."""
  if plan.pack == 1:
    return x
  rows = x.shape[0] // len(heads)
  parts = [x[n * rows : (n + 1) * rows] for n in range(len(heads))]
  return sum(jnp.where(_lanes(p, head, plan), p, 0.0) for head, p in zip(heads, parts, strict=True))


def _lanes(x: jax.Array, head: int, plan: Plan) -> jax.Array:
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return (lane >= head * plan.head_dim) & (lane < (head + 1) * plan.head_dim)


def rows_of(unit: Unit, plan: Plan) -> slice:
  return slice(unit[0] * plan.block, (unit[0] + 1) * plan.block)


def listed_blocks(refs: dict[str, Any], unit: Unit, plan: Plan) -> list[jax.Array]:
  row, group = unit
  return [refs["lists"][0, group, 0, 0, row * plan.kept + j] for j in range(plan.kept)]


def at_block(index: jax.Array, plan: Plan) -> pl.Slice:
  return pl.ds(pl.multiple_of(index * plan.block, plan.block), plan.block)


def gather(refs: dict[str, Any], name: str, unit: Unit, plan: Plan) -> jax.Array:
  """[listed, width]: the text and the listed blocks of the keys or values that stay in VMEM."""
  image = [refs[name][0, at_block(index, plan), :] for index in listed_blocks(refs, unit, plan)]
  return jnp.concatenate(([refs[f"text_{name}"][0]] if plan.text else []) + image, axis=0)


def bias_row(refs: dict[str, Any], plan: Plan, text: int, blocks: Sequence[jax.Array]) -> jax.Array | None:
  """[1, text + len(blocks) * block]: 0 where a key counts, HIDDEN where not; None where all do."""
  if not plan.masked:
    return None
  pieces = []
  if text:
    pieces.append(refs["text_bias"][0] if plan.text_bias else jnp.zeros((1, text), jnp.float32))
  if plan.key_bias:
    pieces += [refs["key_bias"][0, pl.ds(index, 1), :] for index in blocks]
  elif blocks:
    pieces.append(jnp.zeros((1, len(blocks) * plan.block), jnp.float32))
  return jnp.concatenate(pieces, axis=1)


def over_image(plan: Plan, body: Callable[[jax.Array, int, Any], Any], carry: Any) -> Any:
  """carry = body(first block, number of blocks, carry) over all image blocks, TEXT_CHUNK at a time."""
  whole, rest = divmod(plan.blocks, TEXT_CHUNK)
  if whole:
    carry = jax.lax.fori_loop(0, whole, lambda i, c: body(i * TEXT_CHUNK, TEXT_CHUNK, c), carry)
  return body(whole * TEXT_CHUNK, rest, carry) if rest else carry


def pipelined(units: Sequence[Unit], first: Callable, middle: Callable, last: Callable) -> None:
  """Runs last(unit, *middle(unit, first(unit))) for every unit, in an order that overlaps them.

  The products of a unit stand between the softmax of its neighbours, so that the matrix unit works while the vector
  unit does; the compiler does not move them there by itself.
  """
  ahead = first(units[0])
  waiting = None
  for n, unit in enumerate(units):
    logits = ahead
    if n + 1 < len(units):
      ahead = first(units[n + 1])
    if waiting is not None:
      last(waiting[0], *waiting[1])
    waiting = unit, middle(unit, logits)
  last(waiting[0], *waiting[1])
