"""Pictures that arrive as arrays: converted to uint8 RGB, or refused with the reason."""

import numpy as np

_TOLERANCE = 1e-3  # rounding of whoever normalised


def to_rgb(images: np.ndarray) -> np.ndarray:
  """One or more pictures of any common kind -> uint8 [N, H, W, 3].

  Args:
    images: [H, W], [H, W, C] or [N, H, W, C] with C = 1 (grey), 3 (RGB) or 4 (RGBA, laid on white). uint8 in 0..255;
      bool as black and white; floats in [-1, 1], the range of every VAE here.

  Raises:
    ValueError: for other shapes or dtypes, values out of range or not finite, or no pixels.
  """
  images = np.asarray(images)
  if images.ndim == 2:
    images = images[..., None]
  if images.ndim == 3:
    images = images[None]
  if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not images.size:
    raise ValueError(
      f"images: expected [H, W], [H, W, C] or [N, H, W, C] with 1 (grey), 3 (RGB) or 4 (RGBA) channels and at least one"
      f" pixel, got shape {images.shape}"
    )
  images = _to_uint8(images)
  if images.shape[-1] == 4:
    alpha = images[..., 3:].astype(np.float32) / 255
    images = np.rint(images[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
  return np.broadcast_to(images, (*images.shape[:3], 3))


def _to_uint8(images: np.ndarray) -> np.ndarray:
  if images.dtype == np.uint8:
    return images
  if images.dtype == np.bool_:
    return images.astype(np.uint8) * 255
  if not np.issubdtype(images.dtype, np.floating):
    raise ValueError(f"images: expected uint8, or floats in [-1, 1], got {images.dtype}; convert with astype(np.uint8)")
  low, high = float(images.min()), float(images.max())
  if not (low >= -1 - _TOLERANCE and high <= 1 + _TOLERANCE):  # False for NaN
    raise ValueError(
      f"images: floats are expected in [-1, 1], got {low:.4g} to {high:.4g}; divide 0..255 by 127.5 and subtract 1, or"
      " give uint8"
    )
  return np.rint((np.clip(images, -1, 1).astype(np.float32) + 1) * 127.5).astype(np.uint8)
