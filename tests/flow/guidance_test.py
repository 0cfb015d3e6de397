"""Guidance: the formula, the number of calls, and rows that stay with their sample."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from elasticdit_jax.flow import guidance
from elasticdit_jax.types import Text


class GuidanceTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.calls = []
    self.x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    self.t = jnp.array([0.1, 0.5, 0.9])
    self.text = Text(jax.random.normal(jax.random.key(1), (3, 4, 5)), jnp.ones((3, 4), bool))
    self.null = Text(jnp.zeros((3, 4, 5)), jnp.zeros((3, 4), bool))

  def velocity(self, x, t, text):
    self.calls.append(x.shape[0])
    prompt = jnp.sum(text.embedding * text.mask[..., None], axis=(1, 2))
    return x * t[:, None, None, None] + prompt[:, None, None, None]

  def expected(self, scale):
    text = self.velocity(self.x, self.t, self.text)
    null = self.velocity(self.x, self.t, self.null)
    self.calls.clear()
    return null + np.reshape(scale, (-1, 1, 1, 1)) * (text - null)

  def test_one_batched_call(self):
    expected = self.expected(4.5)
    v = guidance.guide(self.velocity, self.text, self.null, 4.5)(self.x, self.t)
    np.testing.assert_allclose(v, expected, rtol=1e-5, atol=1e-5)
    self.assertEqual(self.calls, [6])

  def test_static_one_is_a_single_conditional_call(self):
    v = guidance.guide(self.velocity, self.text, self.null, 1.0)(self.x, self.t)
    self.assertEqual(self.calls, [3])
    np.testing.assert_allclose(v, self.expected(1.0), rtol=1e-5)

  def test_traced_scale_does_not_recompile(self):
    @jax.jit
    def run(scale):
      return guidance.guide(self.velocity, self.text, self.null, scale)(self.x, self.t)

    for scale in (0.0, 1.0, 7.0):
      np.testing.assert_allclose(run(scale), self.expected_without_clearing(scale), rtol=1e-4, atol=1e-4)
    self.assertEqual(self.calls.count(6), 1)

  def expected_without_clearing(self, scale):
    calls = list(self.calls)
    result = self.expected(scale)
    self.calls = calls
    return result

  def test_scale_per_sample(self):
    scale = jnp.array([0.0, 1.0, 3.0])
    v = guidance.guide(self.velocity, self.text, self.null, scale)(self.x, self.t)
    np.testing.assert_allclose(v, self.expected(scale), rtol=1e-5, atol=1e-5)

  def test_one_null_row_serves_the_batch(self):
    one = jax.tree.map(lambda a: a[:1], self.null)
    a = guidance.guide(self.velocity, self.text, one, 3.0)(self.x, self.t)
    b = guidance.guide(self.velocity, self.text, self.null, 3.0)(self.x, self.t)
    np.testing.assert_array_equal(a, b)

  def test_keeps_dtype(self):
    v = guidance.guide(lambda x, t, text: x, self.text, self.null, 3.0)(self.x.astype(jnp.bfloat16), self.t)
    self.assertEqual(v.dtype, jnp.bfloat16)


if __name__ == "__main__":
  absltest.main()
