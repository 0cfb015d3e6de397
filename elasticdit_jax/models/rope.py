"""2-D positions in physical units, so that the token grids of f8 and f16 latents of one image share coordinates."""

import jax
import jax.numpy as jnp
import numpy as np

PIXELS_PER_UNIT = 16.0


def token_centres(grid: tuple[int, int], pixels_per_token: int) -> np.ndarray:
  """Centres of the tokens of a raster.

  Args:
    grid: (rows, columns) of tokens.
    pixels_per_token: VAE factor times patch size.

  Returns:
    float32 [rows * columns, 2] (y, x) in units of 16 pixels, raster order.
  """
  pitch = pixels_per_token / PIXELS_PER_UNIT
  y, x = np.meshgrid(*((np.arange(n) + 0.5) * pitch for n in grid), indexing="ij")
  return np.stack([y.ravel(), x.ravel()], -1).astype(np.float32)


def rotary_table(centres: np.ndarray, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines of axial rotary embedding, half of the pairs for y and half for x.

  Args:
    centres: [T, 2].
    head_dim: divisible by 4.
    theta: base of the geometric frequencies.

  Returns:
    Two float32 arrays [T, head_dim / 2].
  """
  if head_dim % 4:
    raise ValueError(f"head_dim: axial rotary embedding needs a multiple of 4, got {head_dim}")
  count = head_dim // 4
  frequency = theta ** (-np.arange(count) / count)
  angle = np.concatenate([centres[:, :1] * frequency, centres[:, 1:] * frequency], -1)
  return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: jax.Array, table: tuple[np.ndarray, np.ndarray]) -> jax.Array:
  """Applies the table to x [B, T, heads, head_dim], computed in float32, returned in x.dtype."""
  cos, sin = (jnp.asarray(a)[None, :, None] for a in table)
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def position_features(centres: np.ndarray, count: int = 16) -> np.ndarray:
  """Sinusoids of the absolute position, periods from 2 to 512 units (32 to 8192 pixels): float32 [T, 4 * count]."""
  angle = centres[:, :, None] * (2 * np.pi / np.geomspace(2.0, 512.0, count))
  angle = angle.reshape(len(centres), -1)
  return np.concatenate([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
