"""Sizes of the TPU kernels of Shift Sparse Block Attention, and whether they fit: all static, nothing traced.

One step of the grid handles `tile` query blocks of `pack` heads: two heads of 64 channels, or of 128 where the matrix
unit is 256 wide. The keys and values of those heads stay in VMEM for all their steps, in the backward pass with float32
sums of dk and dv beside them. That is what limits the length (`obstacle`).
"""

import dataclasses

from jax.experimental import pallas as pl

# Side of the matrix unit by jax.Device.device_kind; elsewhere 128.
MATRIX_UNIT = {"TPU v6 lite": 256, "TPU7x": 256}
BLOCK = 64
HEAD_DIMS = (64, 128)

# Of 64 MiB, the least of v5e, v5p and v6e (v5p); the rest is for what the compiler keeps there on its own.
VMEM_BYTES = 58 * 2**20

# Key blocks that a text query reads at once.
TEXT_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static sizes of one call; lengths in tokens unless they say blocks.

  Attributes:
    batch: samples.
    heads: heads, padded to a multiple of pack.
    head_dim: channels of a head.
    pack: heads side by side in the lanes.
    shared: all heads read one list; otherwise each has its own.
    block: tokens in a block.
    blocks: image blocks as keys, Tb.
    kept: length of a list in blocks.
    text: text tokens, padded to whole blocks; 0 for none.
    tile: query blocks in one step of the grid.
    key_bias: some image tokens are hidden by a mask.
    text_bias: some text tokens are hidden, by a mask or as padding.
    scale: factor of the logits.
    itemsize: bytes of an element of q.
    text_queries: the text has queries as well; else it is keys alone.
    interpret: run on any platform, slowly.
  """

  batch: int
  heads: int
  head_dim: int
  pack: int
  shared: bool
  block: int
  blocks: int
  kept: int
  text: int
  tile: int
  key_bias: bool
  text_bias: bool
  scale: float
  itemsize: int
  text_queries: bool = True
  interpret: bool = False

  @property
  def width(self) -> int:
    return self.pack * self.head_dim

  @property
  def tiles(self) -> int:
    return -(-self.blocks // self.tile)

  @property
  def image(self) -> int:
    return self.blocks * self.block

  @property
  def listed(self) -> int:
    """Keys that one query block reads."""
    return self.text + self.kept * self.block

  @property
  def groups(self) -> tuple[tuple[int, ...], ...]:
    """Heads of one step that share a list."""
    heads = tuple(range(self.pack))
    return (heads,) if self.shared else tuple((head,) for head in heads)

  @property
  def text_tile(self) -> int:
    """Text queries handled at once."""
    return 2 * self.block if self.text % (2 * self.block) == 0 else self.block

  @property
  def text_tiles(self) -> int:
    """Times that text queries are handled; 0 where the text has none."""
    return self.text // self.text_tile if self.text_queries else 0

  @property
  def masked(self) -> bool:
    return self.key_bias or self.text_bias

  @property
  def grid(self) -> tuple[int, int, int]:
    return (self.batch, self.heads // self.pack, self.tiles)

  def vmem_bytes(self, backward: bool, buffers: int) -> int:
    """What one step holds in VMEM, its temporaries estimated generously."""
    keys = self.text + self.image
    resident = 2 * keys * self.width * self.itemsize * buffers
    rows = 2 * 2 * (self.tile * self.block + self.text) * self.width * self.itemsize
    logits = len(self.groups[0]) * self.block * self.listed * 4
    if not backward:
      return resident + rows + 4 * logits
    return 2 * resident + 2 * keys * self.width * 4 + 2 * rows + 8 * logits

  def buffers(self, backward: bool) -> int:
    """2 lets the next heads load while these run; 1 where that does not fit."""
    return 2 if self.vmem_bytes(backward, 2) <= VMEM_BYTES else 1

  def cost(self, backward: bool) -> pl.CostEstimate:
    """Products, exponentials and HBM traffic of one call; backward counts five products for the two of forward."""
    queries = self.text_tiles * self.text_tile
    pairs = self.batch * self.heads * (self.image * self.listed + queries * (self.text + self.image))
    tokens = self.batch * self.heads * (self.text + self.image) * self.head_dim * self.itemsize
    return pl.CostEstimate(
      flops=(10 if backward else 4) * pairs * self.head_dim,
      transcendentals=pairs,
      bytes_accessed=(8 if backward else 4) * tokens,
    )


def obstacle(plan: Plan, dtype: str) -> str | None:
  """Why a TPU cannot run this plan, as a phrase for an error message; None where it can."""
  if plan.block != BLOCK:
    return f"the kernel needs block_size={BLOCK}, got {plan.block}"
  if plan.head_dim not in HEAD_DIMS:
    return f"the kernel needs head_dim 64 or 128, got {plan.head_dim}"
  if dtype not in ("bfloat16", "float32"):
    return f"the kernel takes bfloat16 or float32, got {dtype}"
  need = plan.vmem_bytes(True, 1)
  if need > VMEM_BYTES:
    limit = f"{need / 2**20:.0f} MiB of VMEM, more than {VMEM_BYTES // 2**20} MiB"
    return f"{plan.text + plan.image} keys of {plan.pack} heads with {plan.kept} kept blocks need {limit}"
  return None
