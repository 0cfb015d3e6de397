"""Joint attention of one layer: sparse against dense, windows that shift, and what text queries see."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.models import rope
from elasticdit_jax.models.attention import JointAttention, Sparsity
from tests.models import cases

HEAD_DIM, WIDTH = 8, 16


def _inputs(grid):
  rng = np.random.default_rng(grid[0] * 10 + grid[1])
  image = rng.normal(size=(2, grid[0] * grid[1], WIDTH)).astype(np.float32)
  text = rng.normal(size=(2, 3, WIDTH)).astype(np.float32)
  return image, text, np.array([[True, True, True], [True, False, False]])


def _layer(dtype=jnp.float32):
  return JointAttention(HEAD_DIM, jnp.dtype(dtype))


def _params(grid):
  table = rope.rotary_table(rope.token_centres(grid, 16), HEAD_DIM, 100.0)
  dense = Sparsity(0.0, grid, 2, 0)
  shapes = jax.eval_shape(lambda *x: _layer().init(jax.random.key(0), *x, table, dense)["params"], *_inputs(grid))
  return jax.tree.map(lambda a: 3 * a, cases.random_tree(shapes))


def _run(grid, ratio, layer=0, dtype=jnp.float32, side=2, params=None):
  table = rope.rotary_table(rope.token_centres(grid, 16), HEAD_DIM, 100.0)
  sparsity = Sparsity(ratio, grid, side, layer)

  def apply(params, image, text, mask):
    return _layer(dtype).apply({"params": params}, image, text, mask, table, sparsity)

  image, text, mask = _inputs(grid)
  return jax.jit(apply)(params or _params(grid), image.astype(dtype), text.astype(dtype), mask)


class JointAttentionTest(parameterized.TestCase):
  @parameterized.parameters(((4, 4),), ((3, 5),))
  def test_sparse_equals_dense_where_every_block_is_kept(self, grid):
    for layer in (0, 1):
      for sparse, dense in zip(_run(grid, 0.01, layer), _run(grid, 0.0, layer), strict=True):
        self.assertEqual(sparse.shape, dense.shape)
        np.testing.assert_allclose(sparse, dense, atol=1e-5)

  def test_text_queries_see_every_image_token_on_a_sparse_layer(self):
    dense, sparse = _run((3, 5), 0.0), _run((3, 5), 0.7)
    np.testing.assert_allclose(sparse[1], dense[1], atol=1e-5)
    self.assertGreater(np.abs(sparse[0] - dense[0]).max(), 1e-2)

  def test_consecutive_layers_cut_different_windows(self):
    even, odd = (_run((4, 4), 0.7, layer)[0] for layer in (0, 1))
    self.assertGreater(np.abs(even - odd).max(), 1e-2)

  def test_one_block_over_the_whole_grid(self):
    for sparse, dense in zip(_run((3, 3), 0.9, side=8), _run((3, 3), 0.0), strict=True):
      np.testing.assert_allclose(sparse, dense, atol=1e-5)

  def test_streams_have_projections_of_their_own(self):
    params = _params((4, 4))
    expected = _run((4, 4), 0.0, params=params)
    swapped = _run((4, 4), 0.0, params={"image": params["text"], "text": params["image"]})
    self.assertGreater(np.abs(swapped[0] - expected[0]).max(), 1e-2)

  def test_queries_and_keys_are_normalised(self):
    params = _params((4, 4))
    louder = jax.tree.map(np.array, params)
    for stream in louder.values():
      stream["qkv"]["kernel"][:, : 2 * WIDTH] *= 100.0
      stream["qkv"]["bias"][: 2 * WIDTH] *= 100.0
    for a, b in zip(_run((4, 4), 0.0, params=louder), _run((4, 4), 0.0, params=params), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-3)

  def test_bfloat16(self):
    for half, full in zip(_run((3, 5), 0.01, dtype=jnp.bfloat16), _run((3, 5), 0.01), strict=True):
      self.assertEqual(half.dtype, jnp.bfloat16)
      self.assertLess(np.abs(half.astype(jnp.float32) - full).mean(), 0.03)


if __name__ == "__main__":
  absltest.main()
