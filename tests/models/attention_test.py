"""Joint attention of one layer: sparse against dense, windows that shift, and what text queries see."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.evals import flops
from elasticdit_jax.models import attention, rope
from elasticdit_jax.models.attention import JointAttention, Sparsity
from tests.models import cases

HEAD_DIM, WIDTH = 8, 16


def _inputs(grid):
  rng = np.random.default_rng(grid[0] * 10 + grid[1])
  image = rng.normal(size=(2, grid[0] * grid[1], WIDTH)).astype(np.float32)
  text = rng.normal(size=(2, 3, WIDTH)).astype(np.float32)
  return image, text, np.array([[True, True, True], [True, False, False]])


def _layer(dtype=jnp.float32, text_output=True):
  return JointAttention(HEAD_DIM, jnp.dtype(dtype), text_output)


def _shapes(grid, text_output=True):
  table = rope.rotary_table(rope.token_centres(grid, 16), HEAD_DIM, 100.0)
  init = _layer(text_output=text_output).init
  return jax.eval_shape(
    lambda *x: init(jax.random.key(0), *x, table, Sparsity(0.0, grid, 2, 0))["params"], *_inputs(grid)
  )


def _params(grid):
  return jax.tree.map(lambda a: 3 * a, cases.random_tree(_shapes(grid)))


def _program(grid, ratio, layer=0, dtype=jnp.float32, side=2, text_output=True, **options):
  """Jitted (params, image, text, mask, kept=None) -> outputs of both streams."""
  table = rope.rotary_table(rope.token_centres(grid, 16), HEAD_DIM, 100.0)
  sparsity = Sparsity(ratio, grid, side, layer, **options)

  def apply(params, image, text, mask, kept=None):
    return _layer(dtype, text_output).apply({"params": params}, image, text, mask, table, sparsity, kept)

  return jax.jit(apply)


def _run(grid, ratio, layer=0, dtype=jnp.float32, params=None, **options):
  image, text, mask = _inputs(grid)
  run = _program(grid, ratio, layer, dtype, **options)
  return run(params or _params(grid), image.astype(dtype), text.astype(dtype), mask)


def _with_lists():
  """While active, lists are walked even where they hold every block."""
  return mock.patch.object(Sparsity, "dense", False)


def text_queries_macs(args):
  """Multiply-accumulates of projecting the text queries."""
  return args[1].size * WIDTH


class JointAttentionTest(parameterized.TestCase):
  @parameterized.parameters(((4, 4),), ((3, 5),))
  def test_sparse_equals_dense_where_every_block_is_kept(self, grid):
    for layer in (0, 1):
      with _with_lists():
        lists = _run(grid, 0.01, layer)
      for sparse, dense in zip(lists, _run(grid, 0.0, layer), strict=True):
        self.assertEqual(sparse.shape, dense.shape)
        np.testing.assert_allclose(sparse, dense, atol=1e-5)

  def test_a_layer_that_drops_no_whole_block_is_dense(self):
    args = (_params((4, 4)), *_inputs((4, 4)))
    dense, all_kept, sparse = (str(jax.make_jaxpr(_program((4, 4), ratio))(*args)) for ratio in (0.0, 0.2, 0.25))
    self.assertEqual(all_kept, dense)
    self.assertNotIn("top_k", dense)
    self.assertIn("top_k", sparse)

  @parameterized.parameters(
    ((4, 4), {}), ((3, 5), {"per_head": True}), ((3, 5), {"force_self": True}), ((3, 5), {"sparse_text": True})
  )
  def test_one_masked_program_has_the_numbers_of_every_list_length(self, grid, options):
    params, blocks = _params(grid), -(-grid[0] // 2) * -(-grid[1] // 2)
    masked = _program(grid, 0.0, 0, **options)
    seen = []
    for kept in range(1, blocks + 1):
      expected = _run(grid, 1 - kept / blocks, 0, params=params, **options)
      seen.append(expected[0])
      for a, b in zip(masked(params, *_inputs(grid), kept), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    self.assertEqual(masked._cache_size(), 1)
    self.assertGreater(np.abs(seen[0] - seen[1]).max(), 1e-2)

  def test_options_of_the_selection_reach_it(self):
    plain = _run((4, 4), 0.7)[0]
    for option in ("per_head", "force_self"):
      self.assertGreater(np.abs(_run((4, 4), 0.7, **{option: True})[0] - plain).max(), 1e-2)

  def test_text_queries_see_the_blocks_nearest_to_the_present_text_where_told_to(self):
    plain, sparse = (_run((3, 5), 0.7, sparse_text=option, per_head=True) for option in (False, True))
    np.testing.assert_allclose(sparse[0], plain[0], atol=1e-5)
    self.assertGreater(np.abs(sparse[1] - plain[1]).max(), 1e-2)
    # Absent words have no say in which: sample 1 has one word.
    image, text, mask = _inputs((3, 5))
    text[1, 1:] = 50.0
    program = _program((3, 5), 0.7, sparse_text=True, per_head=True)
    other = program(_params((3, 5)), image, text, mask)[1]
    np.testing.assert_allclose(other[1, 0], sparse[1][1, 0], atol=1e-5)

  @parameterized.parameters(False, True)
  def test_the_blocks_of_text_queries_are_those_of_the_largest_product(self, per_head):
    with mock.patch.object(attention, "sparse_attention", wraps=attention.sparse_attention) as attend:
      jax.disable_jit()(_run)((4, 4), 0.5, sparse_text=True, per_head=per_head)
    (q, k, _, kept), options = attend.call_args
    mask = _inputs((4, 4))[2][..., None, None]
    text = np.sum(np.where(mask, q[:, :3], 0), 1) / mask.sum(1)
    blocks = np.asarray(k[:, 3:]).reshape(2, 4, 4, *k.shape[2:]).mean(2)
    affinity = np.einsum("bhd,bkhd->bhk", text, blocks)
    affinity = affinity if per_head else affinity.sum(1, keepdims=True)
    expected = np.sort(np.argsort(-affinity, axis=-1)[..., : kept.shape[-1]], axis=-1)
    np.testing.assert_array_equal(options["text_kept"][:, :, 0], expected)

  @parameterized.parameters(0.0, 0.7)
  def test_without_text_output_only_its_queries_are_missing(self, ratio):
    params, args = _params((3, 5)), _inputs((3, 5))
    self.assertEqual(_shapes((3, 5), text_output=False), _shapes((3, 5)))
    full, alone = _program((3, 5), ratio), _program((3, 5), ratio, text_output=False)
    image, text = alone(params, *args)
    self.assertIsNone(text)
    np.testing.assert_allclose(image, full(params, *args)[0], atol=1e-6)
    work = [flops.count_flops(run, params, *args) for run in (full, alone)]
    self.assertLessEqual(work[1], work[0] - 2 * text_queries_macs(args))

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
    with _with_lists():
      results = _run((3, 5), 0.01, dtype=jnp.bfloat16), _run((3, 5), 0.01)
    for half, full in zip(*results, strict=True):
      self.assertEqual(half.dtype, jnp.bfloat16)
      self.assertLess(np.abs(half.astype(jnp.float32) - full).mean(), 0.03)


if __name__ == "__main__":
  absltest.main()
