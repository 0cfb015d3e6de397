"""A trained T-DVAE together with the statistics of its latents: images in, unit-variance latents out, and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from elasticdit_jax.models.tdvae import TDVAE, VAEConfig


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "shift", "scale"), meta_fields=("cfg",))
@dataclasses.dataclass(frozen=True)
class Codec:
  """One side of switch 1; a pytree, so that it enters jitted functions as an argument.

  Attributes:
    cfg: shape of the VAE (static).
    params: {"encoder": ..., "decoder": ...}.
    shift: float32 [C], per-channel mean of the raw latents.
    scale: float32 scalar, one over their overall standard deviation. One number for all channels keeps their relative
      energies, which say how much a channel matters to the image.
  """

  cfg: VAEConfig
  params: dict
  shift: jax.Array
  scale: jax.Array

  @property
  def factor(self) -> int:
    return self.cfg.factor

  def encode(self, image: jax.Array) -> jax.Array:
    """[B, H, W, 3] in [-1, 1] -> normalised latents [B, ceil(H/f), ceil(W/f), C]; no gradient goes back."""
    z = TDVAE(self.cfg).apply({"params": self.params}, image, method="encode")
    return jax.lax.stop_gradient((z - self.shift) * self.scale)

  def decode(self, latents: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Normalised latents [B, h, w, C] -> images [B, f*h, f*w, 3], clipped to [-1, 1]; cropped to size = (H, W)."""
    z = latents / self.scale + self.shift
    return jnp.clip(TDVAE(self.cfg).apply({"params": self.params}, z, size, method="decode"), -1.0, 1.0)


def fit_statistics(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(shift [C], scale []) that centre raw latents [N, h, w, C] and bring them to unit overall variance.

  Raises:
    ValueError: for latents that do not vary or are not finite: no scale brings those to unit variance.
  """
  mean = latents.mean((0, 1, 2))
  deviation = jnp.sqrt(jnp.square(latents - mean).mean())
  # Rounding alone makes constant latents deviate by some 1e-7 of their size.
  if not 1e-6 * (1.0 + jnp.abs(mean).max()) < deviation < jnp.inf:
    raise ValueError(
      f"latents: expected finite values that differ between pictures, got a standard deviation of {deviation:.2g}; the"
      " VAE encodes nothing: train it for longer, or with less config.loss.energy"
    )
  return mean, 1.0 / deviation


def to_uint8(image: jax.Array) -> jax.Array:
  """[-1, 1] to uint8, rounded to the nearest level."""
  return jnp.round((image + 1.0) * 127.5).astype(jnp.uint8)
