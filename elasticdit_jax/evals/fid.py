"""Fréchet Inception distance between two sets of pictures (Heusel et al. 2017), as pytorch-fid defines it.

The weights are the user's (interop/inception_weights.py). FID shrinks as sets grow: compare only values of equally many
pictures, and expect nothing of fewer than some thousands.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.models import inception


@jax.jit
def features(params: Any, image: jax.Array) -> jax.Array:
  """uint8 pictures [B, H, W, 3] of any size -> float32 [B, 2048]; resized to 299 bilinearly, without antialiasing."""
  size = (image.shape[0], inception.SIDE, inception.SIDE, 3)
  resized = jax.image.resize(image.astype(jnp.float32) / 255.0, size, "bilinear", antialias=False)
  return inception.InceptionV3().apply({"params": params}, 2.0 * resized - 1.0)


def statistics(params: Any, batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Mean [2048] and covariance [2048, 2048] of the features, float64.

  Args:
    params: from interop.inception_weights.load.
    batches: uint8 arrays [B, H, W, 3]; sizes may differ between batches, each size is compiled once.

  Raises:
    ValueError: for fewer than two pictures, and for arrays that are no uint8 pictures.
  """
  found = []
  for batch in batches:
    if batch.ndim != 4 or batch.shape[-1] != 3 or batch.dtype != np.uint8:
      raise ValueError(
        f"fid: expected uint8 pictures [B, H, W, 3], got {batch.dtype} {batch.shape}; convert them first"
      )
    found.append(np.asarray(features(params, batch), np.float64))
  count = sum(map(len, found))
  if count < 2:
    raise ValueError(f"fid: expected at least 2 pictures on each side, got {count}; a covariance needs several")
  every = np.concatenate(found)
  return every.mean(0), np.cov(every, rowvar=False)


def frechet_distance(
  mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
  """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two normal distributions, 0 or more.

  The root's trace is taken from the symmetric A^(1/2) B A^(1/2), which has the same eigenvalues and needs no complex
  numbers where a covariance has no full rank.
  """
  values, vectors = np.linalg.eigh(covariance_a)
  root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
  product = np.linalg.eigvalsh(root @ covariance_b @ root)
  trace = np.sqrt(np.maximum(product, 0.0)).sum()
  distance = np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace
  return float(max(distance, 0.0))


def fid(params: Any, real: Iterable[np.ndarray], drawn: Iterable[np.ndarray]) -> float:
  """FID of two iterables of uint8 batches; see `statistics`."""
  return frechet_distance(*statistics(params, real), *statistics(params, drawn))
