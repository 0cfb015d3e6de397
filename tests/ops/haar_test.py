"""The Haar transform against PyWavelets, and the properties the autoencoder relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pywt
from absl.testing import absltest, parameterized

from elasticdit_jax.ops import haar

dwt2, idwt2 = jax.jit(haar.dwt2), jax.jit(haar.idwt2)


def _image(height, width, channels=3, batch=2):
  return np.random.default_rng(height * 100 + width).normal(size=(batch, height, width, channels)).astype(np.float32)


def _oracle(x):
  """One level of PyWavelets, bands one after another on the last axis."""
  low, details = pywt.dwt2(x, "haar", mode="symmetric", axes=(1, 2))
  return np.concatenate([low, *details], axis=-1)


class HaarTest(parameterized.TestCase):
  @parameterized.parameters((8, 8), (2, 6), (7, 8), (8, 5), (3, 7), (1, 1), (1, 4))
  def test_dwt2_equals_pywavelets(self, height, width):
    x = _image(height, width)
    y = dwt2(x)
    self.assertEqual(y.shape, (2, -(-height // 2), -(-width // 2), 12))
    np.testing.assert_allclose(y, _oracle(x), atol=1e-6)

  def test_idwt2_equals_pywavelets(self):
    y = _image(3, 5, channels=8)
    low, *details = np.split(y, 4, axis=-1)
    expected = pywt.idwt2((low, tuple(details)), "haar", axes=(1, 2))
    np.testing.assert_allclose(idwt2(y), expected, atol=1e-6)

  @parameterized.parameters((8, 8), (7, 5), (1, 3))
  def test_round_trip(self, height, width):
    x = _image(height, width)
    np.testing.assert_allclose(idwt2(dwt2(x))[:, :height, :width], x, atol=1e-6)
    y = _image(height, width, channels=12)
    np.testing.assert_allclose(dwt2(idwt2(y)), y, atol=1e-6)

  def test_energy_is_kept_and_the_inverse_is_the_transpose(self):
    x, y = _image(6, 4), _image(3, 2, channels=12)
    np.testing.assert_allclose(np.square(dwt2(x)).sum(), np.square(x).sum(), rtol=1e-5)
    _, transpose = jax.vjp(dwt2, x)
    np.testing.assert_allclose(transpose(y)[0], idwt2(y), atol=1e-6)

  def test_bands_of_flat_and_of_striped_images(self):
    flat = np.ones((1, 4, 4, 1), np.float32)
    rows = flat * np.array([1, -1, 1, -1])[None, :, None, None]
    columns = np.swapaxes(rows, 1, 2)
    for band, x in enumerate((flat, rows, columns, rows * columns)):
      y = np.zeros((1, 2, 2, 4))
      y[..., band] = 2.0
      np.testing.assert_allclose(dwt2(x.astype(np.float32)), y, atol=1e-6)

  def test_levels_of_kept_bands_equal_repeated_pywavelets(self):
    # Equation 2: LL, cH and cV of every channel are transformed again.
    x = _image(16, 24)
    ours, theirs = dwt2(x), _oracle(x)
    for channels in (36, 108, 324):
      kept = ours.shape[-1] * 3 // 4
      ours, theirs = dwt2(ours[..., :kept]), _oracle(theirs[..., :kept])
      self.assertEqual(ours.shape[-1], channels)
      np.testing.assert_allclose(ours, theirs, atol=1e-5)

  def test_bfloat16_is_the_rounded_float32_result(self):
    x = jnp.asarray(_image(6, 7), jnp.bfloat16)
    for run, value in ((dwt2, x), (idwt2, jnp.asarray(_image(3, 4, channels=12), jnp.bfloat16))):
      out = run(value)
      self.assertEqual(out.dtype, jnp.bfloat16)
      np.testing.assert_array_equal(out, run(value.astype(jnp.float32)).astype(jnp.bfloat16))

  def test_channels_that_are_no_four_bands(self):
    with self.assertRaisesRegex(ValueError, r"idwt2: .* divisible by 4 \(LL, cH, cV, cD\), got 6"):
      idwt2(np.zeros((1, 2, 2, 6), np.float32))


if __name__ == "__main__":
  absltest.main()
