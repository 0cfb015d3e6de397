"""Physical positions: f8 and f16 grids of one image share coordinates, and rotation encodes differences only."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.models import rope


class CentresTest(parameterized.TestCase):
  def test_units_and_raster_order(self):
    # 32 x 48 pixels, tokens of 16 pixels.
    centres = rope.token_centres((2, 3), 16)
    self.assertEqual(centres.dtype, np.float32)
    expected = [(y, x) for y in (0.5, 1.5) for x in (0.5, 1.5, 2.5)]
    np.testing.assert_array_equal(centres, expected)

  @parameterized.parameters(((8, 8), 2), ((6, 10), 2), ((4, 4), 4))
  def test_an_f16_token_lies_between_the_f8_tokens_it_covers(self, grid, patch):
    f8 = rope.token_centres(grid, 8 * patch).reshape(*grid, 2)
    half = (grid[0] // 2, grid[1] // 2)
    f16 = rope.token_centres(half, 16 * patch).reshape(*half, 2)
    covered = f8.reshape(half[0], 2, half[1], 2, 2)
    np.testing.assert_allclose(f16, covered.mean((1, 3)))
    self.assertTrue((covered[:, 0, :, 0] < f16).all() and (f16 < covered[:, 1, :, 1]).all())

  def test_equal_centres_have_equal_tables_and_features_on_any_grid(self):
    # Patch 2 at f8 and patch 1 at f16 give the same tokens; a larger image begins with those of a smaller one.
    small, large = rope.token_centres((4, 4), 16), rope.token_centres((6, 8), 16)
    first = large.reshape(6, 8, 2)[:4, :4].reshape(-1, 2)
    np.testing.assert_array_equal(first, small)
    for make in (lambda c: np.stack(rope.rotary_table(c, 16, 100.0)), lambda c: rope.position_features(c)[None]):
      whole = make(large).reshape(-1, 6, 8, make(large).shape[-1])[:, :4, :4]
      np.testing.assert_array_equal(whole.reshape(make(small).shape), make(small))


class RotationTest(absltest.TestCase):
  def _dots(self, shift):
    """Inner products of a rotated query at every centre with a rotated key at every centre moved by `shift`."""
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 2, 16)) for i in range(2))
    centres = rope.token_centres((3, 4), 16) + np.float32(shift)
    table = rope.rotary_table(centres, 16, 100.0)
    q, k = (rope.rotate(jnp.broadcast_to(x, (1, 12, 2, 16)), table) for x in (q, k))
    return jnp.einsum("bqhd,bkhd->bhqk", q, k)

  def test_inner_products_depend_on_differences_only(self):
    here = self._dots((0.0, 0.0))
    np.testing.assert_allclose(self._dots((7.5, -3.25)), here, atol=1e-4)
    # Diagonal neighbours (0 -> 5 and 1 -> 6) are alike, steps along y and along x are not.
    np.testing.assert_allclose(here[:, :, 0, 5], here[:, :, 1, 6], atol=1e-4)
    self.assertGreater(np.abs(here[:, :, 0, 1] - here[:, :, 0, 4]).max(), 1e-2)

  def test_length_is_kept_and_the_origin_is_not_rotated(self):
    x = jax.random.normal(jax.random.key(0), (2, 12, 2, 16))
    out = rope.rotate(x, rope.rotary_table(rope.token_centres((3, 4), 16), 16, 100.0))
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    self.assertGreater(np.abs(out - x).max(), 0.1)
    origin = rope.rotary_table(np.zeros((12, 2), np.float32), 16, 100.0)
    np.testing.assert_array_equal(rope.rotate(x, origin), x)

  def test_computed_in_float32_and_cast_back(self):
    x = jax.random.normal(jax.random.key(0), (1, 12, 2, 16), jnp.bfloat16)
    table = rope.rotary_table(rope.token_centres((3, 4), 16), 16, 100.0)
    self.assertEqual(table[0].shape, (12, 8))
    out = rope.rotate(x, table)
    self.assertEqual(out.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(out, rope.rotate(x.astype(jnp.float32), table).astype(jnp.bfloat16))

  def test_half_of_the_pairs_belong_to_y(self):
    cos, sin = rope.rotary_table(np.float32([[3.0, 0.0]]), 16, 100.0)
    np.testing.assert_array_equal(cos[0, 4:], np.ones(4))
    np.testing.assert_array_equal(sin[0, 4:], np.zeros(4))
    np.testing.assert_allclose(sin[0, :4], np.sin(3.0 * 100.0 ** (-np.arange(4) / 4)), rtol=1e-6)

  def test_head_dim_must_be_a_multiple_of_four(self):
    with self.assertRaisesRegex(ValueError, "head_dim: .* multiple of 4, got 6"):
      rope.rotary_table(np.zeros((1, 2)), 6, 100.0)


class FeaturesTest(absltest.TestCase):
  def test_far_and_near_positions_differ(self):
    # A side of 8192 pixels at f8.
    centres = np.stack([np.arange(512), np.zeros(512)], -1).astype(np.float32)
    features = rope.position_features(centres)
    self.assertEqual((features.shape, features.dtype), ((512, 64), np.float32))
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1) + 10 * np.eye(512)
    self.assertGreater(distance.min(), 0.3)


if __name__ == "__main__":
  absltest.main()
