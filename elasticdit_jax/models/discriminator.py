"""PatchGAN: a small convolutional network that judges overlapping patches of a picture (Isola et al. 2017).

The layout is that of taming-transformers' NLayerDiscriminator: 4x4 convolutions, the first `layers` of stride 2, leaky
ReLU of slope 0.2, weights from N(0, 0.02). GroupNorm stands in for its BatchNorm: a judgement depends on its own
picture alone, on any number of devices, and there are no running averages to save.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

_INIT = nn.initializers.normal(0.02)
_SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """Shape of the critic.

  Attributes:
    width: channels of the first layer; they double per layer up to eight times that.
    layers: convolutions of stride 2. Three see patches of 70 px, two of 34 px.
  """

  width: int = 64
  layers: int = 3

  def __post_init__(self):
    for field in ("width", "layers"):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"discriminator.{field}: expected a positive number, got {value!r}")

  @property
  def least_size(self) -> int:
    """Shortest side in pixels of a picture that leaves at least one patch."""
    return 3 * 2**self.layers


class PatchDiscriminator(nn.Module):
  """Pictures [B, H, W, 3] in [-1, 1] -> one score per patch [B, h, w, 1]; positive means real.

  Raises:
    ValueError: for a picture smaller than `cfg.least_size`.
  """

  cfg: DiscriminatorConfig

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    cfg = self.cfg
    if min(image.shape[1:3]) < cfg.least_size:
      raise ValueError(
        f"discriminator: a picture of {image.shape[1]} x {image.shape[2]} pixels is too small for {cfg.layers} layers,"
        f" expected at least {cfg.least_size} a side; use fewer discriminator.layers"
      )
    h = nn.leaky_relu(_conv(cfg.width, 2, True, "conv_0")(image), _SLOPE)
    for layer in range(1, cfg.layers + 1):
      width = cfg.width * min(2**layer, 8)
      h = _conv(width, 2 if layer < cfg.layers else 1, False, f"conv_{layer}")(h)
      h = nn.GroupNorm(math.gcd(32, width), name=f"norm_{layer}")(h)
      h = nn.leaky_relu(h, _SLOPE)
    return _conv(1, 1, True, "conv_out")(h)


def _conv(width: int, stride: int, bias: bool, name: str) -> nn.Conv:
  return nn.Conv(width, (4, 4), stride, padding=1, use_bias=bias, kernel_init=_INIT, name=name)


def init(cfg: DiscriminatorConfig, key: jax.Array) -> dict:
  """Random parameters, float32."""
  image = jnp.zeros((1, cfg.least_size, cfg.least_size, 3))
  return jax.jit(lambda k: PatchDiscriminator(cfg).init(k, image)["params"])(key)


def init_shapes(cfg: DiscriminatorConfig) -> dict:
  """Parameter tree of jax.ShapeDtypeStruct, without allocating anything."""
  image = jax.ShapeDtypeStruct((1, cfg.least_size, cfg.least_size, 3), jnp.float32)
  return jax.eval_shape(lambda x: PatchDiscriminator(cfg).init(jax.random.key(0), x)["params"], image)
