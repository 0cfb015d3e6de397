"""PSNR and SSIM against closed forms, a slow SSIM written out, and scikit-image where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import ndimage

from elasticdit_jax.evals import image_metrics


def _pictures(height=24, width=31, noise=0.1):
  rng = np.random.default_rng(0)
  a = ndimage.gaussian_filter(rng.uniform(size=(2, height, width, 3)), (0, 2, 2, 0)) * 4 % 1
  return a.astype(np.float32), np.clip(a + noise * rng.normal(size=a.shape), 0, 1).astype(np.float32)


def _slow_ssim(a, b):
  """One picture, float64, window by window."""
  grid = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
  weights = np.outer(grid, grid) / grid.sum() ** 2
  values = []
  for i in range(a.shape[0] - 10):
    for j in range(a.shape[1] - 10):
      for c in range(a.shape[2]):
        x, y = (z[i : i + 11, j : j + 11, c].astype(np.float64) for z in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
  return np.mean(values)


class PsnrTest(absltest.TestCase):
  def test_closed_form(self):
    a = np.full((3, 4, 5, 3), 0.5, np.float32)
    b = a + np.float32([0.1, 0.01, 0.0])[:, None, None, None]
    np.testing.assert_allclose(image_metrics.psnr(a, b), [20.0, 40.0, np.inf], atol=1e-4)

  def test_uint8(self):
    a = np.zeros((1, 2, 2, 3), np.uint8)
    np.testing.assert_allclose(image_metrics.psnr(a, a + np.uint8(255)), [0.0], atol=1e-6)
    np.testing.assert_allclose(image_metrics.psnr(a, a + np.uint8(1)), [20 * np.log10(255)], rtol=1e-6)


class SsimTest(parameterized.TestCase):
  def test_written_out(self):
    a, b = _pictures(14, 17)
    np.testing.assert_allclose(image_metrics.ssim(a, b), [_slow_ssim(*p) for p in zip(a, b, strict=True)], atol=1e-5)

  @parameterized.parameters(0.02, 0.3)
  def test_scikit_image(self, noise):
    try:
      from skimage import metrics
    except ImportError:
      self.skipTest("scikit-image is not installed")
    a, b = _pictures(noise=noise)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = [metrics.structural_similarity(x, y, channel_axis=-1, **options) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(image_metrics.ssim(a, b), expected, atol=1e-5)
    expected = [metrics.peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(image_metrics.psnr(a, b), expected, rtol=1e-5)

  def test_equal_pictures_and_the_range_of_uint8(self):
    a, b = _pictures()
    np.testing.assert_allclose(image_metrics.ssim(a, a), [1, 1], atol=1e-6)
    eight = [np.round(x * 255).astype(np.uint8) for x in (a, b)]
    np.testing.assert_allclose(image_metrics.ssim(*eight), image_metrics.ssim(a, b), atol=5e-3)

  @parameterized.parameters((1, 1), (2, 30), (10, 11), (11, 5))
  def test_small_pictures(self, height, width):
    a, b = _pictures(height, width)
    value = np.asarray(image_metrics.ssim(a, b))
    self.assertTrue((np.abs(value) <= 1).all(), value)
    np.testing.assert_allclose(image_metrics.ssim(a, a), [1, 1], atol=1e-6)

  def test_gradient_is_finite_and_points_to_the_original(self):
    a, b = _pictures()
    grad = jax.grad(lambda x: image_metrics.ssim(a, x).sum())(b)
    self.assertTrue(np.isfinite(grad).all())
    self.assertGreater(jnp.sum(grad * (a - b)), 0)
    self.assertTrue(np.isfinite(jax.grad(lambda x: image_metrics.ssim(a, x).sum())(a)).all())


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 4, 4, 3), np.uint8, (1, 4, 5, 3), np.uint8, "one shape and dtype, got uint8 .1, 4, 4, 3. and uint8 .1, 4, 5"),
    ((1, 4, 4, 3), np.uint8, (1, 4, 4, 3), np.float32, "one shape and dtype"),
    ((4, 4, 3), np.uint8, (4, 4, 3), np.uint8, "two arrays .B, H, W, C."),
    ((0, 4, 4, 3), np.uint8, (0, 4, 4, 3), np.uint8, "two arrays"),
    ((1, 4, 4, 3), np.int32, (1, 4, 4, 3), np.int32, "expected uint8 or floats in .0, 1., got int32"),
  )
  def test_pairs_that_do_not_fit(self, shape, dtype, other_shape, other_dtype, message):
    for metric in (image_metrics.psnr, image_metrics.ssim):
      with self.assertRaisesRegex(ValueError, message):
        metric(np.zeros(shape, dtype), np.zeros(other_shape, other_dtype))


if __name__ == "__main__":
  absltest.main()
