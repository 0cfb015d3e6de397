"""T-DVAE: the tiny wavelet autoencoder of ElasticDiT section 2.3 (Figure 6 left).

  image --DWT--> W0 (12 ch, H/2) --conv--> stage 0 --down--> stage 1 --down--> ... --> latents (16 ch, H/8 or H/16)
                  |                          ^ concat conv(W1)
                  +-- {LL, HL, LH} --DWT--> W1 (36 ch, H/4) -- {LL, HL, LH} --DWT--> W2 ...           (Eq. 2)

The decoder mirrors it: each stage predicts all bands of its level, the kept ones on top of the inverse transform of the
level below (Eq. 3). The first transform replaces one convolutional level, so everything runs at half the usual
resolution. Eq. 2 counts levels from the image; here W0 is the level at H/2.

The encoder is deterministic. Training adds noise to the latents and penalises their energy, which spends latent
amplitude where it lowers the pixel error most (amplitude grows as the square root of a component's standard deviation).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from elasticdit_jax.models.vae_config import NANO, PRESETS, VAEConfig
from elasticdit_jax.models.vae_layers import Conv, ResBlock, Upsample, merge_tree, norm, pad_to_multiple
from elasticdit_jax.ops import haar

__all__ = ["NANO", "PRESETS", "TDVAE", "Decoder", "Encoder", "VAEConfig", "deploy", "init", "init_shapes"]


class Encoder(nn.Module):
  """[B, H, W, 3] in [-1, 1], H and W multiples of the factor -> latents [B, H/f, W/f, 16]."""

  cfg: VAEConfig

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    cfg = self.cfg
    conv, block = _layers(cfg)
    bands = haar.dwt2(image)
    h = conv(cfg.widths[0], name="conv_in")(bands)
    for level, width in enumerate(cfg.widths):
      if level:
        h = conv(cfg.widths[level - 1], strides=2, name=f"down_{level}")(h)
        bands = haar.dwt2(bands[..., : bands.shape[-1] * cfg.carried_bands // 4])
        # Orthonormal LL doubles at every level; bring it back to the range of the image.
        flow = conv(cfg.flow, name=f"flow_{level}")(bands * 0.5 ** (level + 1))
        h = jnp.concatenate([h, flow], axis=-1)
      for i in range(cfg.encoder_blocks[level]):
        h = block(width, cfg.stage_groups(level), name=f"stage_{level}_block_{i}")(h)
    for i in range(cfg.mid_blocks):
      h = block(cfg.widths[-1], cfg.mid_groups, name=f"mid_block_{i}")(h)
    h = nn.silu(norm(h.shape[-1], cfg.norm_groups, name="norm_out")(h))
    z = conv(cfg.latent_channels, name="conv_out")(h)
    if cfg.shortcut:
      z = z + conv(cfg.latent_channels, size=1, use_bias=False, name="shortcut")(bands * 0.5**cfg.levels)
    return z


class Decoder(nn.Module):
  """Latents [B, h, w, 16] -> image [B, f*h, f*w, 3], not clipped."""

  cfg: VAEConfig
  fused_upsample: bool = True

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    cfg = self.cfg
    conv, block = _layers(cfg)
    h = conv(cfg.widths[-1], name="conv_in")(z)
    for i in range(cfg.mid_blocks):
      h = block(cfg.widths[-1], cfg.mid_groups, name=f"mid_block_{i}")(h)
    carried = None
    for level in reversed(range(cfg.levels)):
      for i in range(cfg.decoder_blocks[level]):
        h = block(cfg.widths[level], cfg.stage_groups(level), name=f"stage_{level}_block_{i}")(h)
      if cfg.decoder_norm and not level:
        h = nn.silu(norm(h.shape[-1], cfg.norm_groups, name="norm_out")(h))
      bands = conv(cfg.band_channels(level), name=f"delta_{level}")(h)
      if carried is None:
        if cfg.shortcut:
          bands = bands + conv(bands.shape[-1], size=1, use_bias=False, name="shortcut")(z) * 2**cfg.levels
      else:
        missing = bands.shape[-1] - carried.shape[-1]
        bands = bands + jnp.pad(carried, ((0, 0), (0, 0), (0, 0), (0, missing)))
      carried = haar.idwt2(bands)
      if level:
        width = cfg.widths[level - 1 if cfg.narrow_upsample else level]
        h = Upsample(width, self.fused_upsample, cfg.branches, name=f"up_{level}")(h)
    return carried


def _layers(cfg: VAEConfig) -> tuple[Any, Any]:
  """Convolution and residual block with what all of them share."""
  return (
    functools.partial(Conv, branches=cfg.branches),
    functools.partial(ResBlock, norm_groups=cfg.norm_groups, branches=cfg.branches),
  )


class TDVAE(nn.Module):
  """Encoder and decoder under one parameter tree: {"encoder": ..., "decoder": ...}.

  Attributes:
    cfg: shape.
    fused_upsample: False runs every upsampling as it is written, for comparisons: same outputs, more work.
  """

  cfg: VAEConfig
  fused_upsample: bool = True

  def setup(self) -> None:
    self.encoder = Encoder(self.cfg)
    self.decoder = Decoder(self.cfg, self.fused_upsample)

  def encode(self, image: jax.Array) -> jax.Array:
    """Images [B, H, W, 3] in [-1, 1] of any size -> latents [B, ceil(H/f), ceil(W/f), C]; edges are repeated to fit."""
    return self.encoder(pad_to_multiple(image, self.cfg.factor))

  def decode(self, z: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Latents -> images in [-1, 1] (unclipped), cropped to size = (H, W) where the encoder had to pad."""
    image = self.decoder(z)
    return image if size is None else image[:, : size[0], : size[1]]

  def __call__(self, image: jax.Array) -> jax.Array:
    return self.decode(self.encode(image), image.shape[1:3])


def init_shapes(cfg: VAEConfig) -> dict:
  """Parameter tree of jax.ShapeDtypeStruct, without allocating anything."""
  image = jax.ShapeDtypeStruct((1, 2 * cfg.factor, 2 * cfg.factor, 3), jnp.float32)
  return jax.eval_shape(lambda x: TDVAE(cfg).init(jax.random.key(0), x)["params"], image)


def init(cfg: VAEConfig, key: jax.Array) -> dict:
  """Random parameters, float32."""
  image = jnp.zeros((1, 2 * cfg.factor, 2 * cfg.factor, 3))
  return jax.jit(lambda k: TDVAE(cfg).init(k, image)["params"])(key)


def deploy(cfg: VAEConfig, params: Mapping[str, Any]) -> tuple[VAEConfig, dict[str, Any]]:
  """The same function with one kernel per convolution: the branches of training added up, exactly.

  Args:
    cfg: says in `branches` which form the parameters have; the deployed form comes back as it is.
    params: the tree of TDVAE(cfg), or its "encoder" or "decoder" alone.

  Returns:
    (configuration with branches=False, parameters).
  """
  return dataclasses.replace(cfg, branches=False), merge_tree(params) if cfg.branches else dict(params)
