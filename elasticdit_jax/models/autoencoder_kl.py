"""AutoencoderKL: the convolutional VAE of Stable Diffusion, SD3 and FLUX.1, laid out like the class of diffusers.

Users bring its weights as a teacher, or as one side of switch 1 (interop/diffusers_vae.py reads and writes them).
Parameters carry the names of diffusers with "_" before a number instead of ".": `decoder/up_blocks_0/resnets_1/conv1`.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from elasticdit_jax.models.vae_layers import Conv, Upsample, pad_to_multiple

# Queries whose logits are held at once: 16384 tokens (1024 px) would make a matrix of 1 GiB otherwise.
_QUERIES = 4096


@dataclasses.dataclass(frozen=True)
class KLConfig:
  """Shape of an AutoencoderKL; fields are named as in the config.json of diffusers.

  Attributes:
    block_out_channels: of the levels from the image down; each but the last halves the picture.
    layers_per_block: residual blocks of an encoder level; a decoder level has one more.
    latent_channels: 4 (SD) or 16 (SD3, FLUX.1).
    norm_num_groups: of every GroupNorm.
    mid_block_add_attention: self-attention at the lowest resolution.
    use_quant_conv, use_post_quant_conv: 1x1 convolutions around the latents (SD; not SD3 and FLUX.1).
    in_channels, out_channels: of the picture.
    scaling_factor, shift_factor: normalised latents are (z - shift) * scaling.
  """

  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  latent_channels: int = 16
  norm_num_groups: int = 32
  mid_block_add_attention: bool = True
  use_quant_conv: bool = False
  use_post_quant_conv: bool = False
  in_channels: int = 3
  out_channels: int = 3
  scaling_factor: float = 0.3611
  shift_factor: float = 0.1159

  def __post_init__(self):
    widths = self.block_out_channels
    if not isinstance(widths, tuple | list) or not widths:
      raise ValueError(f"KLConfig.block_out_channels: expected one number per level, got {widths!r}")
    object.__setattr__(self, "block_out_channels", tuple(widths))
    numbers = {f"block_out_channels[{i}]": width for i, width in enumerate(widths)}
    names = ("layers_per_block", "latent_channels", "norm_num_groups", "in_channels", "out_channels")
    for field, value in (numbers | {name: getattr(self, name) for name in names}).items():
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"KLConfig.{field}: expected a positive number, got {value!r}")
    uneven = [width for width in widths if width % self.norm_num_groups]
    if uneven:
      raise ValueError(
        f"KLConfig.block_out_channels: {uneven[0]} channels do not split into norm_num_groups={self.norm_num_groups}"
      )
    for field in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
      if not isinstance(getattr(self, field), bool):
        raise ValueError(f"KLConfig.{field}: expected true or false, got {getattr(self, field)!r}")
    for field in ("scaling_factor", "shift_factor"):
      value = getattr(self, field)
      if not isinstance(value, int | float) or not math.isfinite(value) or (field[:2] == "sc" and value <= 0):
        raise ValueError(f"KLConfig.{field}: expected a finite number, positive for the scale, got {value!r}")

  @property
  def factor(self) -> int:
    """Spatial compression: 8 for the four levels of every published one."""
    return 2 ** (len(self.block_out_channels) - 1)


KL_PRESETS = {
  "flux": KLConfig(),
  "sd3": KLConfig(scaling_factor=1.5305, shift_factor=0.0609),
  "sd": KLConfig(
    latent_channels=4, use_quant_conv=True, use_post_quant_conv=True, scaling_factor=0.18215, shift_factor=0.0
  ),
  "sdxl": KLConfig(
    latent_channels=4, use_quant_conv=True, use_post_quant_conv=True, scaling_factor=0.13025, shift_factor=0.0
  ),
  "ostris-f8-d16": KLConfig(
    (128, 128, 256, 512), use_quant_conv=True, use_post_quant_conv=True, scaling_factor=1.0, shift_factor=0.0
  ),
}


def _norm(cfg: KLConfig, name: str) -> nn.GroupNorm:
  # The two-pass variance: E[x^2] - E[x]^2 loses the digits that agreement with diffusers to 1e-5 needs.
  return nn.GroupNorm(cfg.norm_num_groups, epsilon=1e-6, use_fast_variance=False, name=name)


class _Resnet(nn.Module):
  cfg: KLConfig
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = Conv(self.width, name="conv1")(nn.silu(_norm(self.cfg, "norm1")(x)))
    h = Conv(self.width, name="conv2")(nn.silu(_norm(self.cfg, "norm2")(h)))
    if x.shape[-1] != self.width:
      x = Conv(self.width, size=1, name="conv_shortcut")(x)
    return x + h


class _Attention(nn.Module):
  """One head over all positions; queries in chunks, so that memory grows with the positions and not their square."""

  cfg: KLConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    h = _norm(self.cfg, "group_norm")(x).reshape(batch, height * width, channels)
    q, k, v = (nn.Dense(channels, name=f"to_{name}")(h) for name in "qkv")

    def attend(q):
      logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * channels**-0.5
      return jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits).astype(v.dtype), v)

    tokens = height * width
    if tokens <= _QUERIES:
      out = attend(q)
    else:
      chunks = -(-tokens // _QUERIES)
      q = jnp.pad(q, ((0, 0), (0, chunks * _QUERIES - tokens), (0, 0)))
      out = jax.lax.map(attend, jnp.moveaxis(q.reshape(batch, chunks, _QUERIES, channels), 1, 0))
      out = jnp.moveaxis(out, 0, 1).reshape(batch, chunks * _QUERIES, channels)[:, :tokens]
    return x + nn.Dense(channels, name="to_out_0")(out).reshape(x.shape)


class _Middle(nn.Module):
  cfg: KLConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _Resnet(self.cfg, x.shape[-1], name="resnets_0")(x)
    if self.cfg.mid_block_add_attention:
      x = _Attention(self.cfg, name="attentions_0")(x)
    return _Resnet(self.cfg, x.shape[-1], name="resnets_1")(x)


class _Down(nn.Module):
  cfg: KLConfig
  width: int
  last: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.cfg.layers_per_block):
      x = _Resnet(self.cfg, self.width, name=f"resnets_{i}")(x)
    return x if self.last else _Resample(self.width, up=False, name="downsamplers_0")(x)


class _Up(nn.Module):
  cfg: KLConfig
  width: int
  last: bool
  fused_upsample: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.cfg.layers_per_block + 1):
      x = _Resnet(self.cfg, self.width, name=f"resnets_{i}")(x)
    return x if self.last else _Resample(self.width, up=True, fused=self.fused_upsample, name="upsamplers_0")(x)


class _Resample(nn.Module):
  width: int
  up: bool
  fused: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.up:
      return Upsample(self.width, self.fused, name="conv")(x)
    return Conv(self.width, strides=2, name="conv")(x)


class _Encoder(nn.Module):
  cfg: KLConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    widths = self.cfg.block_out_channels
    x = Conv(widths[0], name="conv_in")(x)
    for i, width in enumerate(widths):
      x = _Down(self.cfg, width, i == len(widths) - 1, name=f"down_blocks_{i}")(x)
    x = _Middle(self.cfg, name="mid_block")(x)
    x = nn.silu(_norm(self.cfg, "conv_norm_out")(x))
    return Conv(2 * self.cfg.latent_channels, name="conv_out")(x)


class _Decoder(nn.Module):
  cfg: KLConfig
  fused_upsample: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    widths = self.cfg.block_out_channels[::-1]
    x = _Middle(self.cfg, name="mid_block")(Conv(widths[0], name="conv_in")(x))
    for i, width in enumerate(widths):
      x = _Up(self.cfg, width, i == len(widths) - 1, self.fused_upsample, name=f"up_blocks_{i}")(x)
    x = nn.silu(_norm(self.cfg, "conv_norm_out")(x))
    return Conv(self.cfg.out_channels, name="conv_out")(x)


class AutoencoderKL(nn.Module):
  """Encoder and decoder; latents are raw: normalise them with the factors of cfg (models/codec.py does).

  Attributes:
    cfg: shape.
    fused_upsample: False runs every upsampling as it is written, for comparisons: same outputs, more work.
  """

  cfg: KLConfig
  fused_upsample: bool = True

  def setup(self) -> None:
    self.encoder = _Encoder(self.cfg)
    self.decoder = _Decoder(self.cfg, self.fused_upsample)
    if self.cfg.use_quant_conv:
      self.quant_conv = Conv(2 * self.cfg.latent_channels, size=1)
    if self.cfg.use_post_quant_conv:
      self.post_quant_conv = Conv(self.cfg.latent_channels, size=1)

  def moments(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images [B, H, W, 3] in [-1, 1] -> (mean, log variance) of the posterior, each [B, ceil(H/f), ceil(W/f), C].

    Edges are repeated until f divides the size; diffusers drops what is over instead. The log variance is not clipped.
    """
    h = self.encoder(pad_to_multiple(image, self.cfg.factor))
    mean, log_variance = jnp.split(self.quant_conv(h) if self.cfg.use_quant_conv else h, 2, axis=-1)
    return mean, log_variance

  def encode(self, image: jax.Array) -> jax.Array:
    """The mean of `moments`: what diffusers calls the mode of the latent distribution."""
    return self.moments(image)[0]

  def decode(self, z: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Raw latents -> images in [-1, 1] (unclipped), cropped to size = (H, W) where the encoder had to pad."""
    image = self.decoder(self.post_quant_conv(z) if self.cfg.use_post_quant_conv else z)
    return image if size is None else image[:, : size[0], : size[1]]

  def __call__(self, image: jax.Array) -> jax.Array:
    return self.decode(self.encode(image), image.shape[1:3])


def init_shapes(cfg: KLConfig) -> dict:
  """Parameter tree of jax.ShapeDtypeStruct, without allocating anything."""
  image = jax.ShapeDtypeStruct((1, 2 * cfg.factor, 2 * cfg.factor, cfg.in_channels), jnp.float32)
  return jax.eval_shape(lambda x: AutoencoderKL(cfg).init(jax.random.key(0), x)["params"], image)
