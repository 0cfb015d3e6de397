"""Raster order <-> block-major order, with the shifted windows of SSBA (ElasticDiT section 2.2.2).

  raster  h x w  --pad to whole blocks-->  roll the origin to `offset`  --cut-->  side x side blocks, one after another

Block-major means that side * side consecutive tokens are one block, so a sparse kernel reads slices, never rows. Rotary
positions belong to the raster: rotate first, then call `to_blocks`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from elasticdit_jax.ops import placement
from elasticdit_jax.types import Array


def window_offset(layer: int, side: int) -> int:
  """The grid origin of a layer: side // 2, 0, side // 2, 0 ... for layers 0, 1, 2, 3 ...

  The paper gives +4 for even and -4 for odd layers, on blocks of 8. On a rolled (cyclic) grid those two are the same
  partition. Taken as rolls of the token stream that add up, +4 and then -4, they alternate between 4 and 0, which is
  what the strategy is for; that reading is used here.
  """
  return side // 2 if layer % 2 == 0 else 0


@dataclasses.dataclass(frozen=True)
class BlockGrid:
  """How h x w raster tokens are cut into square blocks; hashable and static.

  Sides that are not a multiple of `side` are padded at the bottom and right before the roll. With an offset, blocks at
  the border wrap around and hold tokens of opposite edges; every token may attend to every other, so nothing is masked
  for it. Every block holds at least one real token.

  Attributes:
    height: rows of tokens.
    width: columns of tokens.
    side: tokens along one side of a block; 8 in the paper.
    offset: row and column at which the first block starts, in [0, side), see `window_offset`.
  """

  height: int
  width: int
  side: int = 8
  offset: int = 0

  def __post_init__(self):
    for name in ("height", "width", "side"):
      if getattr(self, name) < 1:
        raise ValueError(f"BlockGrid.{name}: expected at least 1, got {getattr(self, name)}")
    if not 0 <= self.offset < self.side:
      raise ValueError(f"BlockGrid.offset: expected 0..{self.side - 1} for side {self.side}, got {self.offset}")

  @property
  def rows(self) -> int:
    """Rows of blocks."""
    return -(-self.height // self.side)

  @property
  def columns(self) -> int:
    """Columns of blocks."""
    return -(-self.width // self.side)

  @property
  def num_blocks(self) -> int:
    """Blocks in all, T_b in the paper."""
    return self.rows * self.columns

  @property
  def block_size(self) -> int:
    """Tokens in one block, padding included."""
    return self.side**2

  @property
  def padding(self) -> tuple[int, int]:
    """Rows and columns of padding tokens."""
    return self.rows * self.side - self.height, self.columns * self.side - self.width

  def valid(self) -> np.ndarray:
    """bool [num_blocks * block_size], block-major: which tokens are real. All of them where nothing is padded."""
    real = np.zeros((self.rows * self.side, self.columns * self.side), bool)
    real[: self.height, : self.width] = True
    real = np.roll(real, (-self.offset, -self.offset), (0, 1))
    cut = real.reshape(self.rows, self.side, self.columns, self.side)
    return cut.transpose(0, 2, 1, 3).reshape(-1)

  def block_of(self) -> np.ndarray:
    """int [height * width]: the block of every raster token."""
    row = (np.arange(self.height) - self.offset) % (self.rows * self.side) // self.side
    column = (np.arange(self.width) - self.offset) % (self.columns * self.side) // self.side
    return (row[:, None] * self.columns + column).reshape(-1)


def _place(arguments: Mapping[str, Any]) -> PartitionSpec:
  """Tokens are not split in results, what stands before and after them is as in the first argument."""
  axes = placement.axes_in_type(next(iter(arguments.values())))
  return PartitionSpec(*axes[:1], None, *axes[2:])


@placement.under_explicit_axes(_place)
def to_blocks(x: Array, grid: BlockGrid, text_len: int = 0) -> jax.Array:
  """Raster image tokens to block-major ones; text tokens in front stay where they are.

  Args:
    x: [B, text_len + height * width, ...], image tokens row by row.
    grid: the cut.
    text_len: leading tokens that are text.

  Returns:
    [B, text_len + num_blocks * block_size, ...]; padding tokens are zero, `grid.valid()` says which.

  Raises:
    ValueError: where the tokens do not fill the grid.
  """
  _check_tokens(x, text_len, grid.height * grid.width, f"{grid.height} x {grid.width} tokens")
  text, image = x[:, :text_len], x[:, text_len:]
  rest = image.shape[2:]
  image = image.reshape(x.shape[0], grid.height, grid.width, *rest)
  if any(grid.padding):
    below, right = grid.padding
    image = jnp.pad(image, ((0, 0), (0, below), (0, right)) + ((0, 0),) * len(rest))
  if grid.offset:
    image = jnp.roll(image, (-grid.offset, -grid.offset), (1, 2))
  image = image.reshape(x.shape[0], grid.rows, grid.side, grid.columns, grid.side, *rest)
  image = jnp.swapaxes(image, 2, 3).reshape(x.shape[0], grid.num_blocks * grid.block_size, *rest)
  return jnp.concatenate([text, image], axis=1) if text_len else image


@placement.under_explicit_axes(_place)
def from_blocks(x: Array, grid: BlockGrid, text_len: int = 0) -> jax.Array:
  """The inverse of `to_blocks`: [B, text_len + num_blocks * block_size, ...] to [B, text_len + height * width, ...]."""
  _check_tokens(x, text_len, grid.num_blocks * grid.block_size, f"{grid.num_blocks} blocks of {grid.block_size}")
  text, image = x[:, :text_len], x[:, text_len:]
  rest = image.shape[2:]
  image = image.reshape(x.shape[0], grid.rows, grid.columns, grid.side, grid.side, *rest)
  image = jnp.swapaxes(image, 2, 3).reshape(x.shape[0], grid.rows * grid.side, grid.columns * grid.side, *rest)
  if grid.offset:
    image = jnp.roll(image, (grid.offset, grid.offset), (1, 2))
  image = image[:, : grid.height, : grid.width].reshape(x.shape[0], grid.height * grid.width, *rest)
  return jnp.concatenate([text, image], axis=1) if text_len else image


@placement.under_explicit_axes(_place)
def pool(x: Array, block_size: int, key_mask: Array | None = None) -> jax.Array:
  """Mean of the tokens of every block (equation 1), over valid tokens only.

  Args:
    x: image tokens [B, Tb * block_size, heads, head_dim], block-major and already rotated.
    block_size: tokens in a block.
    key_mask: bool [B or 1, Tb * block_size], True where a token is real; None where all are.

  Returns:
    float32 [B, Tb, heads, head_dim]; zero for a block without any real token.
  """
  cut = _cut(x, block_size).astype(jnp.float32)
  if key_mask is None:
    return jnp.mean(cut, axis=2)
  weight = _cut(key_mask, block_size).astype(jnp.float32)[..., None, None]
  # where, not a product: whatever stands in a padding token must not leak, not even a NaN.
  total = jnp.sum(jnp.where(weight > 0, cut, 0.0), axis=2)
  return total / jnp.maximum(jnp.sum(weight, axis=2), 1.0)


@placement.under_explicit_axes(_place)
def block_mask(key_mask: Array, block_size: int) -> jax.Array:
  """bool [B or 1, Tb]: which blocks hold a real token, from a token mask [B or 1, Tb * block_size]."""
  return jnp.any(_cut(jnp.asarray(key_mask), block_size), axis=2)


def _cut(x: Array, block_size: int) -> Array:
  if block_size < 1 or x.shape[1] % block_size:
    raise ValueError(f"block_size: expected a divisor of the {x.shape[1]} image tokens, got {block_size}")
  return x.reshape(x.shape[0], -1, block_size, *x.shape[2:])


def _check_tokens(x: Array, text_len: int, expected: int, what: str) -> None:
  if x.ndim < 2 or x.shape[1] != text_len + expected:
    raise ValueError(f"x: expected [B, {text_len} text + {expected} image tokens ({what}), ...], got shape {x.shape}")
