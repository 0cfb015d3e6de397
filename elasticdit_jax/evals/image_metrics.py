"""PSNR and SSIM of picture pairs: the definitions of their papers, checked against scikit-image.

Values are expected in [0, 1] or as uint8. Both functions are differentiable, so that they also serve as losses.
"""

import jax
import jax.numpy as jnp

from elasticdit_jax.types import Array

WINDOW = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def psnr(a: Array, b: Array) -> jax.Array:
  """Peak signal-to-noise ratio in dB, per picture; infinite for equal ones.

  Args:
    a: [B, H, W, C], uint8 or floats in [0, 1].
    b: like a.

  Returns:
    float32 [B].

  Raises:
    ValueError: where shapes or dtypes differ.
  """
  a, b = _pair(a, b)
  return -10.0 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(1, 2, 3)))


def ssim(a: Array, b: Array) -> jax.Array:
  """Structural similarity per picture (Wang et al. 2004): Gaussian windows of 11x11, sigma 1.5, mean over channels.

  Only windows that lie inside the picture count, as in the original code; a side shorter than 11 shortens the window to
  the largest odd size that fits.

  Args:
    a: [B, H, W, C], uint8 or floats in [0, 1].
    b: like a.

  Returns:
    float32 [B], 1 for equal pictures.

  Raises:
    ValueError: where shapes or dtypes differ.
  """
  a, b = _pair(a, b)
  height, width = a.shape[1:3]

  def blur(x):
    return _along(_along(x, 1, _window(height)), 2, _window(width))

  mean_a, mean_b = blur(a), blur(b)
  var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
  covariance = blur(a * b) - mean_a * mean_b
  light = (2 * mean_a * mean_b + _K1**2) / (mean_a**2 + mean_b**2 + _K1**2)
  structure = (2 * covariance + _K2**2) / (var_a + var_b + _K2**2)
  return jnp.mean(light * structure, axis=(1, 2, 3))


def _window(side: int) -> jax.Array:
  size = min(WINDOW, side - 1 + side % 2)
  weights = jnp.exp(-0.5 * jnp.square((jnp.arange(size) - size // 2) / _SIGMA))
  return weights / weights.sum()


def _along(x: jax.Array, axis: int, weights: jax.Array) -> jax.Array:
  """Weighted sum of shifted slices along one axis: as fast as a convolution over so few channels, and exact float32."""
  length = x.shape[axis] - weights.size + 1
  slices = [jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i in range(weights.size)]
  return sum(weight * part for weight, part in zip(weights, slices, strict=True))


def _pair(a: Array, b: Array) -> tuple[jax.Array, jax.Array]:
  if a.ndim != 4 or a.shape != b.shape or a.dtype != b.dtype or 0 in a.shape:
    raise ValueError(
      f"pictures: expected two arrays [B, H, W, C] of one shape and dtype, got {a.dtype} {a.shape} and {b.dtype}"
      f" {b.shape}; convert and crop them first"
    )
  if a.dtype == jnp.uint8:
    return jnp.asarray(a, jnp.float32) / 255.0, jnp.asarray(b, jnp.float32) / 255.0
  if not jnp.issubdtype(a.dtype, jnp.floating):
    raise ValueError(f"pictures: expected uint8 or floats in [0, 1], got {a.dtype}; convert them first")
  return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
