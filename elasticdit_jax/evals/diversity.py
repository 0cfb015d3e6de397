"""How different the pictures of one prompt are: what collapses first when a model learns to please a reward."""

import numpy as np


def diversity(images: np.ndarray) -> float:
  """Root mean square distance between two pictures of one prompt, averaged over prompts.

  Args:
    images: uint8 [prompts, G, H, W, 3], G >= 2 pictures of each prompt from different noise.

  Returns:
    Between 0 (all the same) and 1 (black against white).

  Raises:
    ValueError: for another shape or dtype.
  """
  if images.ndim != 5 or images.shape[1] < 2 or images.dtype != np.uint8:
    raise ValueError(
      f"diversity: expected uint8 [prompts, 2 or more, H, W, 3], got {images.dtype} {tuple(images.shape)}"
    )
  pixels = images.astype(np.float64) / 255
  # The mean squared distance of two different ones is twice the unbiased variance.
  squared = 2 * pixels.var(axis=1, ddof=1).mean(axis=(1, 2, 3))
  return float(np.sqrt(squared).mean())
