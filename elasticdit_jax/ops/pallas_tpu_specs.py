"""Arrays of the TPU kernels of Shift Sparse Block Attention: their shapes, and which part of them a grid step sees.

  kind      arrays                      shape                                         one step (b, h, i) sees
  rows      q, out, grad, dq            [B, tiles * tile * block, heads * head_dim]   tile i of heads h
  keys      k, v, dk, dv                [B, Tb * block, heads * head_dim]             all of heads h
  text      text_q, text_k, text_dk ..  [B, text, heads * head_dim]                   all of heads h
  stats     log_total, delta            [B, heads / pack, tiles, tile, pack * block]  tile i of heads h
  text_stats text_log_total, ..         [B, heads / pack, text / text_tile, ...]      all of heads h

Tokens come before heads in every array, as the model has them: nothing is transposed, and two heads of 64 channels are
128 neighbouring lanes. Lists lie in SMEM with a leading axis per tile: nothing of them is padded to lanes in bulk.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elasticdit_jax.ops.pallas_tpu_plan import VMEM_BYTES, Plan

_KINDS = {
  **dict.fromkeys(("q", "out", "grad", "dq"), "rows"),
  **dict.fromkeys(("k", "v", "dk", "dv"), "keys"),
  **dict.fromkeys(("text_q", "text_k", "text_v", "text_out", "text_grad", "text_dq", "text_dk", "text_dv"), "text"),
  **dict.fromkeys(("log_total", "delta"), "stats"),
  **dict.fromkeys(("text_log_total", "text_delta"), "text_stats"),
}
# Beyond the estimate; what is not reserved is left to the compiler for the programs around.
_MARGIN = 16 * 2**20
_FLOAT32 = ("stats", "text_stats", "key_bias", "text_bias")


class Specs:
  """Block specs and shapes by array name for one plan; buffering of the resident keys depends on the direction."""

  def __init__(self, plan: Plan, backward: bool):
    self._plan = plan
    self._buffers = plan.buffers(backward)
    self._vmem = min(VMEM_BYTES, plan.vmem_bytes(backward, self._buffers) + _MARGIN)

  def block(self, name: str) -> pl.BlockSpec:
    """What one step of the grid sees of the array."""
    plan, kind = self._plan, _KINDS.get(name, name)
    if kind == "lists":
      heads = len(plan.groups)
      index = (lambda b, h, i: (b, 0, i, 0, 0)) if plan.shared else (lambda b, h, i: (b, h, i, 0, 0))
      return pl.BlockSpec((1, heads, 1, 1, plan.tile * plan.kept), index, memory_space=pltpu.SMEM)
    shape = self.shape(name, jnp.float32).shape
    if kind == "rows":
      return pl.BlockSpec((1, plan.tile * plan.block, plan.width), lambda b, h, i: (b, i, h))
    if kind == "keys":
      return pl.BlockSpec((1, plan.image, plan.width), lambda b, h, i: (b, 0, h), pipeline_mode=self._mode())
    if kind == "text":
      return pl.BlockSpec((1, plan.text, plan.width), lambda b, h, i: (b, 0, h))
    if kind == "stats":
      return pl.BlockSpec((1, 1, 1, *shape[3:]), lambda b, h, i: (b, h, i, 0, 0))
    if kind == "text_stats":
      return pl.BlockSpec((1, 1, *shape[2:]), lambda b, h, i: (b, h, 0, 0))
    return pl.BlockSpec((1, *shape[1:]), lambda b, h, i: (b, 0, 0))

  def shape(self, name: str, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """Shape of the whole array; dtype is that of q, used where the array is not float32 anyway."""
    plan, kind = self._plan, _KINDS.get(name, name)
    lanes, groups = plan.heads * plan.head_dim, plan.heads // plan.pack
    shapes = {
      "lists": (plan.batch, 1 if plan.shared else plan.heads, plan.tiles, 1, plan.tile * plan.kept),
      "rows": (plan.batch, plan.tiles * plan.tile * plan.block, lanes),
      "keys": (plan.batch, plan.image, lanes),
      "text": (plan.batch, plan.text, lanes),
      "stats": (plan.batch, groups, plan.tiles, plan.tile, plan.pack * plan.block),
      "text_stats": (plan.batch, groups, plan.text_tiles, plan.pack * plan.text_tile),
      "key_bias": (plan.batch, plan.blocks, plan.block),
      "text_bias": (plan.batch, 1, plan.text),
    }
    return jax.ShapeDtypeStruct(shapes[kind], jnp.float32 if kind in _FLOAT32 else dtype)

  def compiler_params(self) -> pltpu.CompilerParams:
    """Tiles of one head follow each other on one core; heads and samples may go to several."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=self._vmem)

  def _mode(self) -> pl.Buffered | None:
    return None if self._buffers == 2 else pl.Buffered(self._buffers)
