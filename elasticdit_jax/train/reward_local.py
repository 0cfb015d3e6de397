"""Rewards that this process computes from nothing but the picture and its caption.

The scene rewards are those of GenEval training (Liu et al. 2025, arXiv 2505.05470) with two corrections: each term lies
in [0, 1] and a wrong relation counts once, as 0; and objects nobody asked for count against the picture in every task,
because a model that is not told so learns to draw spare ones.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from elasticdit_jax.data import scene_prompts
from elasticdit_jax.evals import detector, scenes_score

SCENE = ("scene_strict", "scene_partial")
"""Names of `scene_scores`."""
_JPEG_QUALITY = 95  # of DDPO's compression task


def scene_scores(
  images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
  """Exact rewards of pictures of the embedded world.

  Args:
    images: uint8 [B, S, S, 3].
    prompts: B captions of the world.
    metadata: not read.

  Returns:
    "scene_strict": 1 where everything asked for is there and nothing else, else 0. "scene_partial": the share of what
    was asked for, in [0, 1], times asked / (asked + spare) objects; 1 exactly where scene_strict is.

  Raises:
    ValueError: a prompt is none of the world's, or pictures are not square.
  """
  del metadata
  strict, partial = [], []
  for prompt, found in zip(prompts, detector.detect(images), strict=True):
    score, spec = scenes_score.score(prompt, found, images.shape[1]), scene_prompts.parse(prompt)
    # The partial score of counting has spare objects in it already.
    spare = 0 if spec.task == "counting" else score.extra
    asked = len(spec.objects)
    strict.append(score.strict and score.extra == 0)
    partial.append(score.partial * asked / (asked + spare))
  return {"scene_strict": np.float32(strict), "scene_partial": np.float32(partial)}


def jpeg_scores(
  images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
  """Compressibility, a toy that needs no model: "jpeg_size" is minus the kilobytes as JPEG of quality 95 over 500."""
  del prompts, metadata
  sizes = []
  for image in images:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=_JPEG_QUALITY)
    sizes.append(file.tell() / 1000)
  return {"jpeg_size": -np.float32(sizes) / 500}
