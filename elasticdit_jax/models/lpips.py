"""LPIPS (Zhang et al. 2018): distance of two pictures in the features of VGG16, weighted as people judge.

  picture --scale--> VGG16 --> relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                                 each: unit length per pixel, squared difference, 1x1 weights, mean over pixels
                                 --> sum of the five

The weights are the user's (`interop.lpips_weights` says where they come from); none are inside this package. Without
the 1x1 weights of the authors the features count alike: that is a plain VGG feature distance and no LPIPS.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

# Channels of the convolutions between two poolings; the last of each group is a tap.
GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10
LEAST_SIZE = 16  # four poolings


class VGG16Features(nn.Module):
  """Scaled pictures [B, H, W, 3] -> the five taps, [B, H / 2^i, W / 2^i, C_i]."""

  @nn.compact
  def __call__(self, image: jax.Array) -> list[jax.Array]:
    taps, h = [], image
    for group, widths in enumerate(GROUPS):
      if group:
        h = nn.max_pool(h, (2, 2), (2, 2))
      for i, width in enumerate(widths):
        h = nn.relu(nn.Conv(width, (3, 3), name=f"conv_{group}_{i}")(h))
      taps.append(h)
    return taps


def distance(params: Mapping, a: jax.Array, b: jax.Array) -> jax.Array:
  """LPIPS between pictures.

  Args:
    params: {"vgg": parameters of VGG16Features, "heads": {"head_0": [C_0], ...}}; without "heads" every channel has
      weight 1 / C, a plain feature distance.
    a, b: [B, H, W, 3] in [-1, 1].

  Returns:
    float32 [B]; 0 where the pictures are equal.

  Raises:
    ValueError: for pictures of different shapes, or smaller than 16 pixels a side.
  """
  if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3:
    raise ValueError(f"lpips: expected two stacks [B, H, W, 3] of one shape, got {a.shape} and {b.shape}")
  if min(a.shape[1:3]) < LEAST_SIZE:
    raise ValueError(f"lpips: expected pictures of at least {LEAST_SIZE} pixels a side, got {a.shape[1:3]}")
  both = (jnp.concatenate([a, b]) - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
  taps = VGG16Features().apply({"params": params["vgg"]}, both)
  total = 0.0
  for i, tap in enumerate(taps):
    length = jnp.sqrt(jnp.sum(jnp.square(tap), axis=-1, keepdims=True) + _EPSILON)
    first, second = jnp.split(tap / length, 2)
    squared = jnp.square(first - second)
    head = params["heads"][f"head_{i}"] if "heads" in params else jnp.full(tap.shape[-1], 1 / tap.shape[-1])
    total = total + jnp.mean(squared @ head, axis=(1, 2))
  return total


def init_shapes() -> dict:
  """The tree that `distance` takes, heads included, as jax.ShapeDtypeStruct."""
  image = jax.ShapeDtypeStruct((1, LEAST_SIZE, LEAST_SIZE, 3), jnp.float32)
  vgg = jax.eval_shape(lambda x: VGG16Features().init(jax.random.key(0), x)["params"], image)
  heads = {f"head_{i}": jax.ShapeDtypeStruct((widths[-1],), jnp.float32) for i, widths in enumerate(GROUPS)}
  return {"vgg": vgg, "heads": heads}
