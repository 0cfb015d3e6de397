"""The weight-free distance: its parts against PyWavelets and scipy, and what it must tell apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pywt
from absl.testing import absltest
from scipy import ndimage

from elasticdit_jax.data import scenes
from elasticdit_jax.evals import perceptual
from elasticdit_jax.types import to_float


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class PerceptualTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.image = to_float(scenes.render(np.arange(2), seed=0, size=32).image)
    cls.noise = np.random.default_rng(0).normal(0, 0.1, cls.image.shape).astype(np.float32)

  def test_haar_equals_pywavelets(self):
    x = self.noise[:, :30, :26]  # odd sizes from the second level on
    low, want = x.astype(np.float64), 0.0
    for level in (1, 2, 3):
      low, details = pywt.dwt2(low, "haar", mode="symmetric", axes=(1, 2))
      want = want + np.abs(np.concatenate(details, -1)).mean((1, 2, 3)) * 3 / 2**level
    want = (want + np.abs(low).mean((1, 2, 3)) / 8) / 3
    np.testing.assert_allclose(perceptual.haar_l1(jnp.asarray(x)), want, rtol=1e-5)

  def test_blur_equals_scipy(self):
    taps = np.array([1, 4, 6, 4, 1]) / 16
    got = perceptual.blurred_l1(jnp.asarray(self.noise), rounds=1)
    once = ndimage.correlate1d(
      ndimage.correlate1d(self.noise, taps, axis=1, mode="nearest"), taps, axis=2, mode="nearest"
    )
    np.testing.assert_allclose(got, np.abs(once).mean((1, 2, 3)), rtol=1e-5)
    # Two rounds repeat borders twice: inside they are the fourfold correlation.
    self.assertLess(float(perceptual.blurred_l1(jnp.asarray(self.noise)).mean()), float(np.abs(once).mean()))

  def test_zero_for_equal_pictures_and_finite_gradients(self):
    distance = jax.jit(jax.value_and_grad(lambda a: perceptual.distance(a, self.image).sum()))
    value, grad = distance(jnp.asarray(self.image))
    self.assertAlmostEqual(float(value), 0.0, places=5)
    self.assertTrue(np.isfinite(grad).all())

  def test_edges_weigh_more_than_their_pixels(self):
    """A blurred picture with the error of a shifted one is further away: it lost the edges."""
    soft = ndimage.gaussian_filter(self.image, (0, 1.5, 1.5, 0))
    error = np.abs(soft - self.image).mean()
    shifted = self.image + error
    far = float(perceptual.haar_l1(jnp.asarray(soft - self.image)).mean())
    near = float(perceptual.haar_l1(jnp.asarray(shifted - self.image)).mean())
    self.assertGreater(far, 1.5 * near)

  def test_one_pixel_and_refused_shapes(self):
    dot = jnp.zeros((1, 1, 1, 3))
    self.assertGreater(float(perceptual.distance(dot, dot + 1)[0]), 1.0)
    with self.assertRaisesRegex(ValueError, "of one shape"):
      perceptual.distance(jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16, 12, 3)))


if __name__ == "__main__":
  absltest.main()
