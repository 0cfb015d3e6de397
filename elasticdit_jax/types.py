"""The nouns that travel between rooms: their names, shapes and checks.

Shapes use B batch, H and W pixels, h and w latent cells, L text tokens, D text features.
"""

import dataclasses

import jax
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
  """Encoded prompts; precomputed embeddings of any encoder fit here.

  Attributes:
    embedding: float [B, L, D].
    mask: bool [B, L], True where a token is present. A row without any token is the null prompt of
      classifier-free guidance.
  """

  embedding: Array
  mask: Array

  def validate(self) -> None:
    """Raises ValueError where shapes or dtypes do not fit together."""
    if self.embedding.ndim != 3:
      raise ValueError(f"Text.embedding: expected [B, L, D], got shape {self.embedding.shape}")
    if self.mask.shape != self.embedding.shape[:2]:
      raise ValueError(f"Text.mask: expected shape {self.embedding.shape[:2]}, got {self.mask.shape}")
    if self.mask.dtype != np.bool_:
      raise ValueError(f"Text.mask: expected bool, got {self.mask.dtype}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One training batch as the data pipeline delivers it.

  Attributes:
    image: uint8 [B, H, W, 3].
    text: the encoded captions.
    bad: int32 [B], how many unreadable images were replaced to fill each row.
  """

  image: Array
  text: Text
  bad: Array

  def validate(self) -> None:
    """Raises ValueError naming the field, what it got and what it expected."""
    if self.image.ndim != 4 or self.image.shape[-1] != 3:
      raise ValueError(f"Batch.image: expected [B, H, W, 3], got shape {self.image.shape}")
    if self.image.dtype != np.uint8:
      raise ValueError(f"Batch.image: expected uint8, got {self.image.dtype}")
    self.text.validate()
    if self.text.mask.shape[0] != self.image.shape[0]:
      raise ValueError(
        f"Batch.text: expected {self.image.shape[0]} rows like the images, got {self.text.mask.shape[0]}"
      )
    if self.bad.shape != (self.image.shape[0],):
      raise ValueError(f"Batch.bad: expected shape ({self.image.shape[0]},), got {self.bad.shape}")


def to_float(image: Array) -> Array:
  """uint8 [..., 3] in 0..255 to float32 in [-1, 1], the range of every VAE here."""
  return image.astype(np.float32) / 127.5 - 1.0
