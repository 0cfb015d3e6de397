"""Dense joint attention: absent text is invisible, and nothing else changes."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.evals import flops
from elasticdit_jax.ops import attention, placement


def inputs(text_len=3, image=6, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(jax.random.normal(k, (2, text_len + image, 2, 4), dtype) for k in keys)


class DenseAttentionTest(parameterized.TestCase):
  def test_equals_plain_softmax(self):
    q, k, v = inputs()
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5, axis=-1)
    expected = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    np.testing.assert_allclose(attention.dense_attention(q, k, v, 3), expected, atol=1e-5)

  def test_absent_text_equals_shorter_text(self):
    q, k, v = inputs()
    mask = jnp.array([[True, True, False], [False, False, False]])
    out = attention.dense_attention(q, k, v, 3, mask)
    for row, present in ((0, [0, 1]), (1, [])):
      keep = np.array(present + list(range(3, 9)))
      alone = attention.dense_attention(q[row : row + 1, keep], k[row : row + 1, keep], v[row : row + 1, keep], 0)
      np.testing.assert_allclose(out[row, keep], alone[0], atol=1e-5)
    grad = jax.grad(lambda k: jnp.sum(attention.dense_attention(q, k, v, 3, mask)[:, 3:] ** 2))(k)
    np.testing.assert_array_equal(grad[1, :3], jnp.zeros((3, 2, 4)))

  def test_text_queries_can_be_left_out(self):
    q, k, v = inputs()
    mask = jnp.array([[True, True, False], [False, False, False]])
    expected = attention.dense_attention(q, k, v, 3, mask)[:, 3:]
    out = attention.dense_attention(q[:, 3:], k, v, 3, mask, text_queries=False)
    np.testing.assert_allclose(out, expected, atol=1e-6)

  def test_image_mask_hides_image_keys_from_image_queries_only(self):
    q, k, v = inputs()
    seen = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 1, 6, 6))
    text_mask = jnp.array([[True, True, False], [True, True, True]])
    whole = (
      jnp.ones((2, 1, 9, 9), bool).at[:, :, 3:, 3:].set(seen)
      & jnp.pad(text_mask, ((0, 0), (0, 6)), constant_values=True)[:, None, None]
    )
    expected = jax.nn.dot_product_attention(q, k, v, mask=whole)
    out = attention.dense_attention(q, k, v, 3, text_mask, image_mask=seen)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    alone = attention.dense_attention(q[:, 3:], k, v, 3, text_mask, image_mask=seen, text_queries=False)
    np.testing.assert_allclose(alone, expected[:, 3:], atol=1e-6)
    without = attention.dense_attention(q[:, 3:], k[:, 3:], v[:, 3:], 0, image_mask=seen)
    np.testing.assert_allclose(
      without, jax.nn.dot_product_attention(q[:, 3:], k[:, 3:], v[:, 3:], mask=seen), atol=1e-6
    )

  def test_form_for_cpu_is_that_of_jax_elsewhere_with_gradients(self):
    mask = jnp.array([[True, True, False], [False, False, False]])
    seen = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 2, 6, 6))
    cases = (jnp.float32, "float32", 2e-6), (jnp.bfloat16, "float32", 3e-2), (jnp.bfloat16, "bfloat16", 3e-2)
    for dtype, products, tolerance in cases:

      def value(q, k, v):
        out = attention.dense_attention(q, k, v, 3, mask, image_mask=seen, scale=0.7)
        return jnp.sum(jnp.sin(out[:, 3:].astype(jnp.float32))), out

      differentiated = jax.value_and_grad(value, (0, 1, 2), has_aux=True)
      with mock.patch.object(placement, "product_dtype", return_value=jnp.dtype(products)):
        here = differentiated(*inputs(dtype=dtype))
        with mock.patch.multiple(attention, _MANY_LOGITS=80, _QUERIES=4):
          in_parts = differentiated(*inputs(dtype=dtype))
      with mock.patch.object(placement, "platform", return_value="gpu"):
        elsewhere = differentiated(*inputs(dtype=dtype))
      for found in (here, in_parts):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(elsewhere), strict=True):
          self.assertEqual(a.dtype, b.dtype)
          np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=tolerance)

  @parameterized.parameters(True, False)
  def test_many_tokens_take_one_head_and_some_queries_at_a_time(self, text_queries):
    """The same as all at once, and memory for the logits of a few rows, with the gradient too."""
    mask = jnp.array([[True, True, False], [False, True, False]])
    q, k, v = inputs()
    q = q if text_queries else q[:, 3:]

    def value(q, k, v):
      out = attention.dense_attention(q, k, v, 3, mask, text_queries=text_queries)
      return jnp.sum(jnp.sin(out)), out

    expected = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(q, k, v)
    with mock.patch.multiple(attention, _MANY_LOGITS=50, _QUERIES=2):
      work = [flops.count_flops(lambda *qkv: value(*qkv)[1], q, k, v, attention=several) for several in (True, False)]
      found = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-6)
    self.assertEqual(work, [2 * 2 * 2 * q.shape[1] * 9 * 2 * 4, 0])
    if jax.default_backend() == "cpu":
      long = jax.ShapeDtypeStruct((2, 4096, 4, 16), jnp.float32)
      loss = jax.grad(lambda q, k, v: jnp.sum(attention.dense_attention(q, k, v, 0)), (0, 1, 2))
      memory = jax.jit(loss).lower(long, long, long).compile().memory_analysis()
      self.assertLess(memory.temp_size_in_bytes, 4 * 4096**2)  # the logits of one of eight heads

  @parameterized.parameters("float32", "bfloat16")
  def test_products_of_bfloat16_in_either_dtype(self, wide):
    """In float32 weights are not rounded on their way: the output is that of float32 inputs, rounded once."""
    qkv = inputs(dtype=jnp.bfloat16)
    expected = np.asarray(attention.dense_attention(*(x.astype(jnp.float32) for x in qkv), 0))
    with (
      mock.patch.object(placement, "platform", return_value="cpu"),
      mock.patch.object(placement, "product_dtype", return_value=jnp.dtype(wide)),
    ):
      out = np.asarray(attention.dense_attention(*qkv, 0).astype(jnp.float32))
    off = np.max(np.abs(out - expected) / np.maximum(np.abs(expected), 2**-6))
    self.assertEqual(off < 1.01 * 2**-8, wide == "float32")

  def test_scale_and_dtype(self):
    q, k, v = inputs(dtype=jnp.bfloat16)
    out = attention.dense_attention(q, k, v, 0, scale=0.0)
    self.assertEqual(out.dtype, jnp.bfloat16)
    average = jnp.broadcast_to(jnp.mean(v.astype(jnp.float32), axis=1, keepdims=True), v.shape)
    np.testing.assert_allclose(out.astype(jnp.float32), average, atol=0.02)

  def test_bad_input_names_the_argument(self):
    q, k, v = inputs()
    for message, args in (
      (r"k: expected shape", (q, k[:, 1:], v, 3)),
      (r"v: expected dtype float32 like q, got bfloat16", (q, k, v.astype(jnp.bfloat16), 3)),
      (r"q: expected \[B, T, heads, head_dim\]", (q[0], k, v, 3)),
      (r"text_len: expected 0..9", (q, k, v, 10)),
      (r"text_mask: expected bool \(2, 3\), got float32 \(2, 3\)", (q, k, v, 3, jnp.ones((2, 3)))),
    ):
      with self.assertRaisesRegex(ValueError, message):
        attention.dense_attention(*args)
    for rows in (1, 5, 8, 10):
      with self.assertRaisesRegex(ValueError, r"image_mask: expected bool \[2, 2 or 1, 6 or 9, 6\], got bool \(2, 1, "):
        attention.dense_attention(q, k, v, 3, image_mask=jnp.ones((2, 1, rows, 6), bool))
    with self.assertRaisesRegex(ValueError, r"image_mask: expected bool \[2, 2 or 1, 6, 6\]"):
      attention.dense_attention(q[:, 3:], k, v, 3, image_mask=jnp.ones((2, 1, 9, 6), bool), text_queries=False)
    with self.assertRaisesRegex(ValueError, r"k: expected shape \(2, 12, 2, 4\) like q with 3 tokens of text"):
      attention.dense_attention(q, k, v, 3, text_queries=False)


if __name__ == "__main__":
  absltest.main()
