"""A distance between pictures that needs no trained weights: Haar bands, blurred colours, structure.

  distance = sum over bands and levels |dwt(a) - dwt(b)|  +  |blur(a) - blur(b)|  +  0.1 (1 - SSIM(a, b))

The first two terms follow the weight-free losses of LiteVAE (Sadat et al. 2024): every band counts like the whole
picture does, so edges weigh more than in pixels, and the blurred pictures hold the colours. It measures fidelity of
structure, not what people see: it is no LPIPS, and its values compare with nothing but themselves.
"""

import jax
import jax.numpy as jnp

from elasticdit_jax.evals import image_metrics
from elasticdit_jax.ops import haar

LEVELS = 3
SSIM_WEIGHT = 0.1
_BLUR = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # binomial, standard deviation 1


def distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """Distance of pictures; differentiable, 0 where they are equal.

  Args:
    a, b: [B, H, W, 3] in [-1, 1].

  Returns:
    float32 [B].

  Raises:
    ValueError: for pictures that differ in shape.
  """
  if a.shape != b.shape:
    raise ValueError(f"perceptual: expected pictures of one shape, got {a.shape} and {b.shape}")
  structure = 1.0 - image_metrics.ssim((a + 1) / 2, (b + 1) / 2)
  return haar_l1(a - b) + blurred_l1(a - b) + SSIM_WEIGHT * structure


def haar_l1(difference: jax.Array, levels: int = LEVELS) -> jax.Array:
  """Mean absolute values of the Haar bands of [B, H, W, C], each in the range of the picture, added up; float32 [B].

  LL goes on to the next level and counts at the last one alone; the sum is divided by the number of levels.
  """
  low, total = difference, 0.0
  channels = difference.shape[-1]
  for level in range(1, levels + 1):
    bands = jnp.abs(haar.dwt2(low)) * 0.5**level  # an orthonormal band doubles at every level
    total = total + 3 * bands[..., channels:].mean((1, 2, 3))
    low = haar.dwt2(low)[..., :channels]
  return (total + bands[..., :channels].mean((1, 2, 3))) / levels


def blurred_l1(difference: jax.Array, rounds: int = 2) -> jax.Array:
  """Mean absolute value of [B, H, W, C] after a Gaussian-like blur, borders repeated; float32 [B]."""
  for _ in range(rounds):
    difference = _blur(_blur(difference, 1), 2)
  return jnp.abs(difference).mean((1, 2, 3))


def _blur(x: jax.Array, axis: int) -> jax.Array:
  reach = len(_BLUR) // 2
  widths = [(reach, reach) if i == axis else (0, 0) for i in range(x.ndim)]
  padded, size = jnp.pad(x, widths, mode="edge"), x.shape[axis]
  taps = [w * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, w in enumerate(_BLUR)]
  return sum(taps)
