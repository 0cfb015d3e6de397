"""Block order: round trips on any grid, windows that really shift, pooling over real tokens."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.ops import blocks

GRIDS = ((16, 16, 8), (4, 4, 2), (10, 17, 8), (3, 5, 2), (1, 1, 8))


def partition(labels, block_size):
  """The cut as a set of sets of raster positions: independent of the order of blocks and inside them."""
  return frozenset(frozenset(row[row >= 0].tolist()) for row in labels.reshape(-1, block_size))


def cut(grid):
  """Raster position of every block-major token, -1 for padding."""
  positions = jnp.arange(1, grid.height * grid.width + 1)[None]
  return np.asarray(blocks.to_blocks(positions, grid))[0] - 1


class BlocksTest(parameterized.TestCase):
  def test_offsets_alternate_between_half_a_block_and_zero(self):
    self.assertEqual([blocks.window_offset(layer, 8) for layer in range(4)], [4, 0, 4, 0])
    self.assertEqual([blocks.window_offset(layer, 2) for layer in range(4)], [1, 0, 1, 0])

  @parameterized.parameters(*[g for g in GRIDS if g[0] > g[2] or g[1] > g[2]])
  def test_consecutive_layers_have_different_partitions(self, height, width, side):
    cuts = [
      partition(cut(blocks.BlockGrid(height, width, side, blocks.window_offset(layer, side))), side**2)
      for layer in range(4)
    ]
    self.assertEqual(cuts[0], cuts[2])
    self.assertEqual(cuts[1], cuts[3])
    self.assertNotEqual(cuts[0], cuts[1])

  @parameterized.parameters(16, 64)
  def test_the_literal_plus_four_minus_four_never_alternates(self, size):
    raster = np.arange(size * size).reshape(size, size)
    literal = []
    for shift in (4, -4):
      rolled = np.roll(raster, (shift, shift), (0, 1))
      literal.append(partition(rolled.reshape(size // 8, 8, size // 8, 8).transpose(0, 2, 1, 3), 64))
    self.assertEqual(literal[0], literal[1])
    self.assertEqual(literal[0], partition(cut(blocks.BlockGrid(size, size, 8, 4)), 64))

  def test_a_block_is_a_square_of_neighbours_in_raster_order(self):
    first = cut(blocks.BlockGrid(4, 6, 2))
    np.testing.assert_array_equal(first[:8], [0, 1, 6, 7, 2, 3, 8, 9])
    shifted = cut(blocks.BlockGrid(4, 6, 2, 1))
    np.testing.assert_array_equal(shifted[:4], [7, 8, 13, 14])
    np.testing.assert_array_equal(np.sort(shifted[-4:]), [0, 5, 18, 23])

  @parameterized.product(shape=GRIDS, shifted=[False, True])
  def test_round_trip(self, shape, shifted):
    height, width, side = shape
    text_len = 3 if shifted else 0
    grid = blocks.BlockGrid(height, width, side, side // 2 if shifted else 0)
    x = np.random.default_rng(0).normal(size=(2, text_len + height * width, 2, 3)).astype(np.float32)
    y = blocks.to_blocks(x, grid, text_len)
    self.assertEqual(y.shape, (2, text_len + grid.num_blocks * grid.block_size, 2, 3))
    np.testing.assert_array_equal(y[:, :text_len], x[:, :text_len])
    np.testing.assert_array_equal(blocks.from_blocks(y, grid, text_len), x)

  @parameterized.product(shape=GRIDS, shifted=[False, True])
  def test_valid_marks_padding_and_no_block_is_all_padding(self, shape, shifted):
    height, width, side = shape
    grid = blocks.BlockGrid(height, width, side, side // 2 if shifted else 0)
    np.testing.assert_array_equal(grid.valid(), cut(grid) >= 0)
    self.assertTrue(bool(jnp.all(blocks.block_mask(grid.valid()[None], grid.block_size))))
    self.assertEqual(bool(grid.valid().all()), grid.padding == (0, 0))

  @parameterized.parameters(*range(6))
  def test_any_grid_shifted_or_not(self, seed):
    height, width, side = (int(n) for n in np.random.default_rng(seed).integers([1, 1, 1], [40, 40, 9]))
    for layer in (0, 1):
      grid = blocks.BlockGrid(height, width, side, blocks.window_offset(layer, side))
      positions = cut(grid).reshape(grid.num_blocks, grid.block_size)
      np.testing.assert_array_equal(np.sort(positions[positions >= 0]), np.arange(height * width))
      self.assertTrue((positions >= 0).any(axis=1).all(), "a block of padding only")
      for block, row in enumerate(positions):
        np.testing.assert_array_equal(grid.block_of()[row[row >= 0]], block)

  def test_pool_is_the_mean_over_real_tokens(self):
    grid = blocks.BlockGrid(3, 2, 2)
    x = jnp.arange(6.0)[None, :, None, None] * jnp.ones((1, 6, 2, 3))
    y = blocks.to_blocks(x, grid)
    mask = grid.valid()[None]
    np.testing.assert_allclose(blocks.pool(y, 4, mask)[0, :, 0, 0], [1.5, 4.5])
    np.testing.assert_allclose(blocks.pool(y, 4)[0, :, 0, 0], [1.5, 2.25])
    poisoned = jnp.where(mask[..., None, None], y, jnp.nan)
    np.testing.assert_allclose(blocks.pool(poisoned, 4, mask)[0, :, 0, 0], [1.5, 4.5])
    empty = blocks.pool(y, 4, jnp.array([[True] * 4 + [False] * 4]))
    np.testing.assert_allclose(empty[0, :, 0, 0], [1.5, 0.0])
    self.assertEqual(blocks.pool(y.astype(jnp.bfloat16), 4).dtype, jnp.float32)

  def test_block_mask_per_sample(self):
    mask = np.array([[True, False, False, False], [False, False, False, True]])
    np.testing.assert_array_equal(blocks.block_mask(mask, 2), [[True, False], [False, True]])

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, r"2 text \+ 16 image tokens \(4 x 4 tokens\).*got shape \(1, 16, 1\)"):
      blocks.to_blocks(np.zeros((1, 16, 1)), blocks.BlockGrid(4, 4, 2), 2)
    with self.assertRaisesRegex(ValueError, "64 image tokens"):
      blocks.from_blocks(np.zeros((1, 16, 1)), blocks.BlockGrid(4, 4, 8))
    with self.assertRaisesRegex(ValueError, r"offset: expected 0..7 for side 8, got -4"):
      blocks.BlockGrid(8, 8, 8, -4)
    with self.assertRaisesRegex(ValueError, "height: expected at least 1, got 0"):
      blocks.BlockGrid(0, 8)
    with self.assertRaisesRegex(ValueError, "block_size: expected a divisor of the 10 image tokens, got 4"):
      blocks.pool(np.zeros((1, 10, 1, 1)), 4)


if __name__ == "__main__":
  absltest.main()
