"""A trained VAE together with the statistics of its latents: images in, unit-variance latents out, and back."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.models import autoencoder_kl, tdvae
from elasticdit_jax.models.autoencoder_kl import KLConfig
from elasticdit_jax.models.tdvae import VAEConfig
from elasticdit_jax.types import Array, to_float

Config = VAEConfig | KLConfig
_LARGEST = 1.001  # resampled pictures overshoot by rounding


def network(cfg: Config) -> nn.Module:
  """The autoencoder of a configuration: a TDVAE or an AutoencoderKL, both with `encode` and `decode`."""
  return tdvae.TDVAE(cfg) if isinstance(cfg, VAEConfig) else autoencoder_kl.AutoencoderKL(cfg)


def init_shapes(cfg: Config) -> dict:
  """Parameter tree of jax.ShapeDtypeStruct, without allocating anything."""
  return (tdvae if isinstance(cfg, VAEConfig) else autoencoder_kl).init_shapes(cfg)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "shift", "scale"), meta_fields=("cfg",))
@dataclasses.dataclass(frozen=True)
class Codec:
  """One side of switch 1; a pytree, so that it enters jitted functions as an argument.

  Attributes:
    cfg: shape of the VAE (static): of a T-DVAE, or of an AutoencoderKL that a user brought.
    params: {"encoder": ..., "decoder": ...}.
    shift: float32 [C], per-channel mean of the raw latents.
    scale: float32 scalar, one over their overall standard deviation. One number for all channels keeps their relative
      energies, which say how much a channel matters to the image.
  """

  cfg: Config
  params: dict
  shift: jax.Array
  scale: jax.Array

  @property
  def factor(self) -> int:
    return self.cfg.factor

  def deploy(self) -> "Codec":
    """The same codec with one kernel per convolution; itself unless its T-DVAE is in training form."""
    if not getattr(self.cfg, "branches", False):
      return self
    cfg, params = tdvae.deploy(self.cfg, self.params)
    return dataclasses.replace(self, cfg=cfg, params=params)

  def encode(self, image: jax.Array) -> jax.Array:
    """Pictures as `as_rgb` takes them -> normalised latents [B, ceil(H/f), ceil(W/f), C]; no gradient goes back."""
    z = network(self.cfg).apply({"params": self.params}, as_rgb(image), method="encode")
    return jax.lax.stop_gradient((z - self.shift) * self.scale)

  def decode(self, latents: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Normalised latents [B, h, w, C] -> images [B, f*h, f*w, 3], clipped to [-1, 1]; cropped to size = (H, W)."""
    z = latents / self.scale + self.shift
    return jnp.clip(network(self.cfg).apply({"params": self.params}, z, size, method="decode"), -1.0, 1.0)


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


def as_rgb(image: Array) -> Array:
  """What encoders read: floats [B, H, W, 3] in [-1, 1]; uint8 is rescaled, grey is repeated.

  Raises:
    ValueError: for anything else. Values outside [-1, 1] are found in NumPy arrays alone: those of arrays under
      jax.jit are not known when the program is made.
  """
  if image.ndim != 4 or 0 in image.shape or image.shape[-1] not in (1, 3):
    hint = "; blend the alpha channel onto a background" if image.ndim == 4 and image.shape[-1] == 4 else ""
    raise ValueError(f"image: expected [B, H, W, 3], or 1 channel of grey, got shape {tuple(image.shape)}{hint}")
  if image.dtype == np.uint8:
    image = to_float(image)
  elif not jnp.issubdtype(image.dtype, jnp.floating):
    raise ValueError(f"image: expected uint8, or floats in [-1, 1], got {image.dtype}; convert it first")
  elif isinstance(image, np.ndarray) and not np.abs(image).max() <= _LARGEST:
    raise ValueError(
      f"image: expected floats in [-1, 1], got values from {image.min():.4g} to {image.max():.4g}; give uint8, or"
      " divide by 127.5 and subtract 1"
    )
  return jnp.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def to_uint8(image: jax.Array) -> jax.Array:
  """[-1, 1] to uint8, rounded to the nearest level."""
  return jnp.round((image + 1.0) * 127.5).astype(jnp.uint8)
