"""One contract, every implementation: against the dense-mask oracle, and the oracle against JAX's own attention."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.evals import flops
from elasticdit_jax.ops import blocks, gating, placement, sparse_attention_xla
from elasticdit_jax.ops.attention import dense_attention
from elasticdit_jax.ops.sparse_attention import sparse_attention
from elasticdit_jax.ops.sparse_attention_reference import dense_mask

TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 3e-2}


# The oracle is compiled without optimisation: it runs once and is tiny, compiling it is what takes time.
ONCE = {"xla_backend_optimization_level": 0}


def make_case(
  height, width, side, count, *, batch=2, heads=2, dim=8, text_len=5, per_head=False, dtype=jnp.float32, text="full"
):
  """Inputs as a model makes them: raster tokens, cut into blocks, pooled, selected; sample 0 has less text.

  text: "full", "skipped" or "sparse", what its queries do.
  """
  grid = blocks.BlockGrid(height, width, side, side // 2)
  shape = (batch, text_len + height * width, heads, dim)
  rng = np.random.default_rng(height * 100 + width)
  key_mask = grid.valid()[None] if any(grid.padding) else None

  def arrange(raster):
    qkv = [blocks.to_blocks(x.astype(dtype), grid, text_len) for x in raster]
    pooled = [blocks.pool(x[:, text_len:], grid.block_size, key_mask) for x in qkv[:2]]
    return qkv, gating.select_blocks(*pooled, count, per_head=per_head)

  raster = [rng.normal(size=shape).astype(np.float32) for _ in range(3)]
  qkv, kept = jax.jit(arrange, compiler_options=ONCE)(raster)
  text_mask = np.arange(text_len)[None] < np.array([max(text_len - 3, 0)] + [text_len] * (batch - 1))[:, None]
  options = {"text_len": text_len, "block_size": grid.block_size, "key_mask": key_mask}
  options["text_mask"] = text_mask if text_len else None
  weight = rng.normal(size=qkv[0].shape).astype(np.float32)
  if text == "sparse":
    options["text_kept"] = kept[:, :, 1:2, : max(1, count - 1)]
  elif text == "skipped":
    options["text_queries"] = False
    qkv[0], weight = qkv[0][:, text_len:], weight[:, text_len:]
  return qkv, kept, options, weight


def compiled(kept, options, weight, implementation):
  """(q, k, v) -> output and the gradients of q, k and v of a weighted sum of it."""

  def loss(q, k, v):
    out = sparse_attention(q, k, v, kept, implementation=implementation, **options)
    return jnp.sum(weight * out.astype(jnp.float32)), out

  def run(q, k, v):
    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads

  return jax.jit(run, compiler_options=None if implementation == "xla" else ONCE)


def compare(test, case, name):
  """Output and gradients of one implementation, in two calls, against the oracle; returns both results."""
  qkv, kept, options, weight = case
  expected = compiled(kept, options, weight, "reference")(*(x.astype(jnp.float32) for x in qkv))
  run = compiled(kept, options, weight, name)
  result, again = run(*qkv), run(*qkv)
  for what, a, b, e in zip(("out", "dq", "dk", "dv"), result, again, expected, strict=True):
    test.assertEqual(a.dtype, qkv[0].dtype)
    np.testing.assert_array_equal(a, b, err_msg=f"{name} {what} differs between two calls")
    error = float(jnp.max(jnp.abs(a.astype(jnp.float32) - e)) / jnp.maximum(1.0, jnp.max(jnp.abs(e))))
    test.assertLess(error, TOLERANCE[qkv[0].dtype.type], f"{name} {what}")
  return result, expected


class ImplementationTest(parameterized.TestCase):
  """Cases for any implementation: a further one is a subclass with its name."""

  implementation = "xla"

  def check(self, case):
    return compare(self, case, self.implementation)

  @parameterized.named_parameters(
    ("square", (8, 8, 2, 4), {}),
    ("one_kept_whole_text_blocks", (4, 4, 2, 1), {"text_len": 8}),
    ("no_text", (4, 8, 2, 3), {"text_len": 0}),
    ("per_head", (4, 8, 2, 3), {"per_head": True, "heads": 3}),
    ("odd_grid", (5, 7, 2, 3), {}),
    ("text_queries_skipped", (4, 8, 2, 3), {"text": "skipped"}),
    ("text_queries_sparse_odd_grid", (5, 7, 2, 3), {"text": "sparse"}),
    ("text_queries_sparse_per_head", (4, 4, 2, 2), {"text": "sparse", "per_head": True, "text_len": 8}),
    ("paper_block_odd_grid", (10, 17, 8, 3), {"batch": 1, "dim": 64}),
    ("bfloat16_odd_grid_wide_heads", (5, 6, 4, 2), {"dtype": jnp.bfloat16, "dim": 128, "batch": 3}),
  )
  def test_equals_reference(self, shape, options):
    self.check(make_case(*shape, **options))

  @parameterized.parameters(7, 8)
  def test_random_shapes(self, seed):
    rng = np.random.default_rng(seed)
    height, width, side = (int(x) for x in rng.integers([1, 1, 1], [10, 10, 4]))
    count = int(rng.integers(1, blocks.BlockGrid(height, width, side).num_blocks + 1))
    heads, batch, text_len = (int(x) for x in rng.integers([1, 1, 0], [4, 4, 7]))
    self.check(make_case(height, width, side, count, text_len=text_len, heads=heads, batch=batch))

  def test_queries_without_any_key_are_zero_with_zero_gradients(self):
    qkv, kept, options, weight = make_case(4, 4, 2, 2)
    # Sample 0 has no text and only block 3 is real, which its first query block does not list.
    options["text_mask"] = np.array([[False] * 5, [True] * 5])
    options["key_mask"] = np.array([[False] * 12 + [True] * 4, [True] * 16])
    kept = kept.at[0, 0, 0].set(jnp.array([0, 1]))
    for out, *grads in self.check((qkv, kept, options, weight)):
      np.testing.assert_array_equal(out[0, 5:9], jnp.zeros((4, 2, 8)))
      np.testing.assert_array_equal(grads[0][0, 5:9], jnp.zeros((4, 2, 8)))
      self.assertTrue(all(bool(jnp.all(jnp.isfinite(g))) for g in grads))

  def test_under_checkpoint(self):
    qkv, kept, options, weight = make_case(4, 4, 2, 2)
    remat = jax.checkpoint(partial(sparse_attention, kept=kept, implementation=self.implementation, **options))
    grads = jax.grad(lambda *qkv: jnp.sum(weight * remat(*qkv)), (0, 1, 2))
    expected = compiled(kept, options, weight, self.implementation)(*qkv)[1:]
    for a, b in zip(jax.jit(grads, compiler_options=ONCE)(*qkv), expected, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6)


class ChunksTest(parameterized.TestCase):
  @parameterized.parameters((1, 1, (4, 4, 2, 2), 2), (700, 2, (5, 7, 2, 3), 2), (160, 2, (5, 5, 2, 3), 1))
  def test_any_chunk_size_gives_the_same(self, chunk, unroll, shape, count):
    """The last one has nine query blocks in chunks of two, so that one chunk is padding."""
    with mock.patch.object(sparse_attention_xla, "_chunking", return_value=(chunk, unroll)):
      compare(self, make_case(*shape, batch=count, heads=count), "xla")

  @parameterized.parameters("float32", "bfloat16")
  def test_products_of_bfloat16_in_either_dtype(self, wide):
    """In float32 weights are not rounded on their way: the output is the oracle's, rounded once."""
    case = make_case(5, 6, 4, 2, dtype=jnp.bfloat16, text="sparse")
    with mock.patch.object(placement, "product_dtype", return_value=jnp.dtype(wide)):
      (out, *_), (expected, *_) = compare(self, case, "xla")
    off = np.max(np.abs(out.astype(np.float32) - expected) / np.maximum(np.abs(expected), 2**-6))
    self.assertEqual(off < 1.01 * 2**-8, wide == "float32")

  def test_a_core_of_its_own_takes_a_block_at_a_time(self):
    """The temporaries show it: those of a step are the logits, keys and values of a chunk, times the chunks in it."""
    qkv, kept, options, weight = make_case(64, 64, 8, 11, dim=64, heads=1, batch=1)
    sizes = []
    for cores in (1, 2):
      with mock.patch.object(placement, "cores_per_device", return_value=cores):
        run = jax.jit(lambda *qkv: sparse_attention(*qkv, kept, implementation="xla", **options))
        sizes.append(run.lower(*qkv).compile().memory_analysis().temp_size_in_bytes)
    if jax.default_backend() == "cpu":
      self.assertLess(sizes[0], sizes[1] - 2**21)


class ScaleTest(parameterized.TestCase):
  @parameterized.parameters(-0.3, 0.0)
  def test_any_scale(self, scale):
    qkv, kept, options, weight = make_case(4, 4, 2, 2)
    compare(self, (qkv, kept, {**options, "scale": scale}, weight), "xla")


class ReferenceTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_equals_jax_attention_with_the_same_mask(self, per_head):
    qkv, kept, options, weight = make_case(5, 7, 2, 3, per_head=per_head)
    mask = dense_mask(kept, **options)

    def loss(q, k, v):
      out = jax.nn.dot_product_attention(q, k, v, mask=mask)
      return jnp.sum(weight * out), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)
    for a, b in zip(compiled(kept, options, weight, "reference")(*qkv), (out, *grads), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5)

  def test_mask_written_out_by_hand(self):
    kept = jnp.array([[[[1], [0]]]])
    mask = dense_mask(
      kept,
      text_len=2,
      block_size=2,
      text_mask=jnp.array([[True, False]]),
      key_mask=jnp.array([[True, True, True, False]]),
    )
    expected = [[1, 0, 1, 1, 1, 0]] * 2 + [[1, 0, 0, 0, 1, 0]] * 2 + [[1, 0, 1, 1, 0, 0]] * 2
    np.testing.assert_array_equal(mask[0, 0], np.array(expected, bool))

  def test_text_queries_by_hand(self):
    """Of three blocks of two tokens the text, one token, reads the last; each image block reads itself."""
    kept = jnp.array([[[[0], [1], [2]]]])
    mask = dense_mask(kept, text_len=1, block_size=2, text_kept=jnp.array([[[[2]]]]))
    expected = [[1, 0, 0, 0, 0, 1, 1]] + [[1, 1, 1, 0, 0, 0, 0]] * 2 + [[1, 0, 0, 1, 1, 0, 0]] * 2
    np.testing.assert_array_equal(mask[0, 0], np.array(expected + [[1, 0, 0, 0, 0, 1, 1]] * 2, bool))

  def test_without_text_queries_image_queries_have_the_same_numbers(self):
    qkv, kept, options, weight = make_case(4, 8, 2, 3)
    full = compiled(kept, options, weight, "reference")(*qkv)
    alone = make_case(4, 8, 2, 3, text="skipped")
    np.testing.assert_allclose(compiled(kept, *alone[2:], "reference")(*alone[0])[0], full[0][:, 5:], atol=1e-6)

  @parameterized.parameters(None, "reference", "xla")
  def test_nothing_dropped_is_dense_attention(self, implementation):
    qkv, kept, options, _ = make_case(4, 4, 2, 4)
    out = sparse_attention(*qkv, kept, implementation=implementation, **options)
    np.testing.assert_allclose(out, dense_attention(*qkv, 5, options["text_mask"]), atol=1e-5)


class SparseAttentionTest(parameterized.TestCase):
  def test_dropped_blocks_are_not_computed(self):
    """Work follows the list, not the grid: a quarter of the blocks is about a quarter of the products."""
    work = []
    for count in (16, 4):
      qkv, kept, options, weight = make_case(32, 32, 8, count, batch=1, dim=16, text_len=0)
      work.append(flops.count_flops(compiled(kept, options, weight, "xla"), *qkv))
    self.assertAlmostEqual(work[1] / work[0], 0.25, delta=0.02)

  @parameterized.parameters(("full", 8 + 32), ("sparse", 8 + 2 * 4), ("skipped", 0))
  def test_text_queries_cost_what_they_read(self, text, keys):
    qkv, kept, options, _ = make_case(4, 8, 2, 3, text_len=8, text=text)
    attend = lambda q, k, v: sparse_attention(q, k, v, kept, implementation="xla", **options)  # noqa: E731
    pairs = 32 * (8 + 3 * 4) + 8 * keys
    self.assertEqual(flops.count_flops(attend, *qkv), 2 * 2 * pairs * 2 * 2 * 8)  # batch, heads, channels; two products

  def test_memory_does_not_grow_with_the_square_of_the_tokens(self):
    def temporaries(side):
      x = jax.ShapeDtypeStruct((1, side * side, 1, 16), jnp.float32)
      kept = jax.ShapeDtypeStruct((1, 1, side * side // 64, 4), jnp.int32)
      run = jax.grad(lambda q, k, v, kept: jnp.sum(sparse_attention(q, k, v, kept, text_len=0)), (0, 1, 2))
      return jax.jit(run).lower(x, x, x, kept).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(64), temporaries(128)
    dense = (128 * 128) ** 2 * 4
    self.assertLess(large, dense / 30)
    self.assertLess(large, 4 * small)

  def test_named_implementation_runs_or_says_why_not(self):
    qkv, kept, options, _ = make_case(4, 4, 2, 2)
    with self.assertRaisesRegex(NotImplementedError, "pallas_tpu': runs on a TPU, this is a cpu; use None or 'xla'"):
      sparse_attention(*qkv, kept, implementation="pallas_tpu", **options)
    with self.assertRaisesRegex(ValueError, "implementation: expected None or one of .*xla, got 'cuda'"):
      sparse_attention(*qkv, kept, implementation="cuda", **options)

  def test_bad_input_names_the_argument(self):
    (q, k, v), kept, options, _ = make_case(4, 4, 2, 2)
    for message, args, changed in (
      (r"k: expected shape \(2, 21, 2, 8\) like q", (q, k[:, 1:], v, kept), {}),
      (r"v: expected dtype float32 like q, got bfloat16", (q, k, v.astype(jnp.bfloat16), kept), {}),
      (r"text_mask: expected bool \(2, 5\)", (q, k, v, kept), {"text_mask": jnp.ones((2, 4), bool)}),
      (r"block_size: expected a divisor of the 16 image tokens .*got 3", (q, k, v, kept), {"block_size": 3}),
      (r"kept: expected \[2, 2 or 1, 4, 1..4\] for 4 blocks of 4 tokens", (q, k, v, kept[:, :, :3]), {}),
      (r"kept: expected integers, got float32", (q, k, v, kept.astype(jnp.float32)), {}),
      (r"text_kept: expected \[2, 2 or 1, 1, 1..4\] for 4 blocks", (q, k, v, kept), {"text_kept": kept}),
      (r"text_kept: expected integers", (q, k, v, kept), {"text_kept": kept[:, :, :1] * 1.0}),
      (r"k: expected shape .* with 5 tokens of text, got", (q, k, v, kept), {"text_queries": False}),
      (r"key_mask: expected bool \[2 or 1, 16\]", (q, k, v, kept), {"key_mask": jnp.ones((2, 21), bool)}),
    ):
      with self.assertRaisesRegex(ValueError, message):
        sparse_attention(*args, **{**options, **changed})


if __name__ == "__main__":
  absltest.main()
