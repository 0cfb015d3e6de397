"""Patches, norms, modulation and timestep features of the transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from elasticdit_jax.models import layers


class LayersTest(absltest.TestCase):
  def test_patches_are_raster_ordered_and_invertible(self):
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = layers.patchify(x, 2)
    self.assertEqual(tokens.shape, (2, 6, 12))
    # The second row of tokens starts with the cell [2:4, 0:2].
    np.testing.assert_array_equal(tokens[0, 3], x[0, 2:4, 0:2].reshape(-1))
    np.testing.assert_array_equal(layers.unpatchify(tokens, (2, 3), 2), x)

  def test_norms(self):
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (2, 4, 64))
    y = layers.layer_norm(x)
    np.testing.assert_allclose(y.mean(-1), np.zeros((2, 4)), atol=1e-5)
    np.testing.assert_allclose(y.std(-1), np.ones((2, 4)), atol=1e-4)
    norm = layers.RMSNorm()
    z = norm.apply({"params": {"scale": jnp.full(64, 2.0)}}, x)
    np.testing.assert_allclose(jnp.square(z).mean(-1), np.full((2, 4), 4.0), rtol=1e-4)
    for out in (layers.layer_norm(x.astype(jnp.bfloat16)), norm.apply({"params": {"scale": jnp.ones(64)}}, x[:1])):
      self.assertTrue(np.isfinite(out.astype(jnp.float32)).all())
    self.assertEqual(layers.layer_norm(x.astype(jnp.bfloat16)).dtype, jnp.bfloat16)
    # A constant token has no variance; it must give zeros, and finite gradients.
    grad = jax.grad(lambda a: layers.layer_norm(a).sum())(jnp.ones((1, 1, 8)))
    self.assertTrue(np.isfinite(grad).all())

  def test_modulate(self):
    x = jax.random.normal(jax.random.key(0), (2, 4, 8))
    shift, scale = jnp.full((2, 1, 8), 3.0), jnp.full((2, 1, 8), -1.0)
    np.testing.assert_allclose(layers.modulate(x, shift, scale), jnp.full((2, 4, 8), 3.0), atol=1e-6)

  def test_squared_relu(self):
    np.testing.assert_array_equal(layers.ACTIVATIONS["relu2"](jnp.array([-2.0, 0.0, 3.0])), [0.0, 0.0, 9.0])

  def test_timestep_features_tell_near_times_apart(self):
    features = layers.timestep_features(jnp.linspace(0, 1, 101))
    self.assertEqual((features.shape, features.dtype), ((101, 256), jnp.float32))
    steps = jnp.linalg.norm(jnp.diff(features, axis=0), axis=-1)
    self.assertGreater(steps.min(), 1.0)
    half = layers.timestep_features(jnp.array([0.5], jnp.bfloat16))
    np.testing.assert_array_equal(half, features[50:51])


if __name__ == "__main__":
  absltest.main()
