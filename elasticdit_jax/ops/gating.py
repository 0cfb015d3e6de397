"""Which key blocks a query block reads: top-k over the affinity of pooled blocks (ElasticDiT section 2.2.1).

The selection is a list of block indices of static length, never a mask: a kernel that walks the list does not touch
what was dropped. It is made per row of the affinity matrix; over the whole matrix, the paper's k = floor(T_b rho)
entries would be no more than rho / T_b of it.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from elasticdit_jax.ops import placement
from elasticdit_jax.types import Array


def num_kept(num_blocks: int, sparsity: float) -> int:
  """Key blocks every query block keeps: T_b - floor(T_b * rho), at least one.

  Raises:
    ValueError: for no blocks or a sparsity outside [0, 1).
  """
  if num_blocks < 1:
    raise ValueError(f"num_blocks: expected at least 1, got {num_blocks}")
  if not 0.0 <= sparsity < 1.0:
    raise ValueError(f"sparsity: expected a share of dropped blocks in [0, 1), got {sparsity}")
  # Binary fractions fall short of decimals (0.29 * 100 = 28.999...); a millionth of a block is no block.
  return max(1, num_blocks - math.floor(num_blocks * sparsity + 1e-6))


def _place(arguments: Mapping[str, Any]) -> PartitionSpec:
  axes = placement.axes_in_type(arguments["q_blocks"])
  return PartitionSpec(*axes[:1], *(axes[2:3] if arguments.get("per_head") else ()))


@placement.under_explicit_axes(_place)
def select_blocks(
  q_blocks: Array,
  k_blocks: Array,
  num_kept: int,
  *,
  per_head: bool = False,
  force_self: bool = False,
  block_mask: Array | None = None,
) -> jax.Array:
  """The num_kept key blocks of highest signed affinity for every query block (Algorithm 1, lines 4-6).

  Ties go to the lower index. No gradient flows: the selection is piecewise constant.

  Args:
    q_blocks: pooled queries [B, Tq, heads, head_dim], see blocks.pool: those of the Tb image blocks, or of anything
      else that is to read some image blocks only.
    k_blocks: pooled keys [B, Tb, heads, head_dim].
    num_kept: static list length, 1..Tb.
    per_head: one list for every head; otherwise all heads share one, made from the affinity over all channels.
    force_self: a block always keeps itself (within num_kept); for Tq = Tb.
    block_mask: bool [B or 1, Tb], False for key blocks of padding only (blocks.block_mask). They are never listed as
      long as a sample has num_kept others; where it has fewer, they fill the list and their tokens stay hidden by
      the key_mask of the attention.

  Returns:
    kept: int32 [B, heads or 1, Tq, num_kept], every row ascending and without repeats.

  Raises:
    ValueError: where shapes disagree or num_kept is out of range.
  """
  affinity = _affinity(q_blocks, k_blocks, per_head, force_self, block_mask)
  blocks = k_blocks.shape[1]
  if not 1 <= num_kept <= blocks:
    raise ValueError(f"num_kept: expected 1..{blocks} of {blocks} blocks, got {num_kept}")
  _, kept = jax.lax.top_k(affinity, num_kept)
  return jnp.sort(kept.astype(jnp.int32), axis=-1)


@placement.under_explicit_axes(_place)
def block_gate(
  q_blocks: Array,
  k_blocks: Array,
  num_kept: Array | int,
  *,
  per_head: bool = False,
  force_self: bool = False,
  block_mask: Array | None = None,
) -> jax.Array:
  """What `select_blocks` lists as a mask, for a num_kept that may be traced: one program for all counts.

  For analysis only: a mask saves no work.

  Args:
    num_kept: int [], 1..Tb; the others as in select_blocks.

  Returns:
    bool [B, heads or 1, Tq, Tb]: which key blocks each query block keeps.
  """
  affinity = _affinity(q_blocks, k_blocks, per_head, force_self, block_mask)
  _, order = jax.lax.top_k(affinity, affinity.shape[-1])
  return jnp.argsort(order, axis=-1) < num_kept


def _affinity(q_blocks, k_blocks, per_head: bool, force_self: bool, block_mask) -> jax.Array:
  """float32 [B, heads or 1, Tq, Tb]: what the lists are ranked by."""
  shapes = q_blocks.shape, k_blocks.shape
  if q_blocks.ndim != 4 or k_blocks.ndim != 4 or len({(shape[0], *shape[2:]) for shape in shapes}) > 1:
    raise ValueError(
      f"q_blocks, k_blocks: expected arrays [B, blocks, heads, head_dim] that differ in blocks alone, got {shapes[0]} "
      f"and {shapes[1]}"
    )
  blocks = k_blocks.shape[1]
  if force_self and q_blocks.shape[1] != blocks:
    raise ValueError(f"force_self: expected as many query blocks as the {blocks} key blocks, got {q_blocks.shape[1]}")
  if block_mask is not None and block_mask.shape not in ((q_blocks.shape[0], blocks), (1, blocks)):
    raise ValueError(f"block_mask: expected [{q_blocks.shape[0]} or 1, {blocks}], got {block_mask.shape}")
  q, k = (jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (q_blocks, k_blocks))
  # Full precision: a bfloat16 pass of the matrix unit would swap blocks of nearly equal affinity between platforms.
  affinity = jnp.einsum("bqhd,bkhd->bhqk" if per_head else "bqhd,bkhd->bqk", q, k, precision=jax.lax.Precision.HIGHEST)
  if not per_head:
    affinity = affinity[:, None]
  if force_self:
    affinity = jnp.where(jnp.eye(blocks, dtype=bool), jnp.inf, affinity)
  if block_mask is not None:
    affinity = jnp.where(block_mask[:, None, None, :], affinity, -jnp.inf)
  return affinity


def check_kept(kept: Array, num_blocks: int) -> None:
  """Debugging aid for lists from elsewhere: reads `kept` on the host, so call it outside jit.

  Raises:
    ValueError: naming the first row with an index outside 0..num_blocks - 1 or with a repeated block.
  """
  lists = np.sort(np.asarray(kept), axis=-1)
  outside = (lists < 0) | (lists >= num_blocks)
  if outside.any():
    row = tuple(int(i) for i in np.argwhere(outside)[0][:-1])
    raise ValueError(f"kept: expected block indices in 0..{num_blocks - 1}, got {lists[row].tolist()} in row {row}")
  repeated = lists[..., 1:] == lists[..., :-1]
  if repeated.any():
    row = tuple(int(i) for i in np.argwhere(repeated)[0][:-1])
    raise ValueError(f"kept: expected every block at most once in a list, got {lists[row].tolist()} in row {row}")
