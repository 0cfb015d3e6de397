"""Convolutions of the autoencoders, NHWC with HWIO kernels: grouped, fused with upsampling, merged from branches."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from elasticdit_jax.ops import placement

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_IMPLEMENTATIONS = ("split", "native")


def conv2d(
  x: jax.Array, kernel: jax.Array, *, strides: int = 1, groups: int = 1, implementation: str | None = None
) -> jax.Array:
  """Convolution with zero padding "SAME": for stride 2 and even sizes that is a row below and a column to the right.

  Args:
    x: [B, H, W, C].
    kernel: [kh, kw, C / groups, D]; the D outputs of a group are consecutive.
    strides: along both axes.
    groups: of channels that do not see each other.
    implementation: "split" makes one dense convolution per group, "native" one grouped convolution of XLA. None takes
      "split" on a CPU, where gradients of native ones are 25 to 66 times slower, and "native" elsewhere.

  Returns:
    [B, ceil(H / strides), ceil(W / strides), D].

  Raises:
    ValueError: for an unknown implementation.
  """
  if implementation is None:
    implementation = "split" if placement.platform() == "cpu" else "native"
  if implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f"conv2d.implementation: expected None or one of {', '.join(_IMPLEMENTATIONS)}, got {implementation!r}"
    )

  def convolve(x, kernel, groups):
    return jax.lax.conv_general_dilated(
      x, kernel, (strides, strides), "SAME", dimension_numbers=_LAYOUT, feature_group_count=groups
    )

  if groups == 1 or implementation == "native":
    return convolve(x, kernel, groups)
  pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
  return jnp.concatenate([convolve(part, weights, 1) for part, weights in pairs], -1)


def upsample_conv(x: jax.Array, kernel: jax.Array, *, fused: bool = True) -> jax.Array:
  """Nearest x2, then a 3x3 convolution.

  Fused, it runs as four 2x2 convolutions at the low resolution: a nearest-upsampled pixel repeats its source, so for
  each output phase the 3x3 taps fold into 2x2. The same function, zero padding included, for 2.25x fewer FLOPs.

  Args:
    x: [B, H, W, C].
    kernel: [3, 3, C, D].
    fused: False computes it as it is written.

  Returns:
    [B, 2H, 2W, D].
  """
  batch, h, w, _ = x.shape
  if not fused:
    return conv2d(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)
  rows = (
    jnp.stack([kernel[0], kernel[1] + kernel[2]]),
    jnp.stack([kernel[0] + kernel[1], kernel[2]]),
  )
  phases = []
  for i, row in enumerate(rows):
    for j in range(2):
      taps = (row[:, 0], row[:, 1] + row[:, 2]) if j == 0 else (row[:, 0] + row[:, 1], row[:, 2])
      phases.append(
        jax.lax.conv_general_dilated(x, jnp.stack(taps, 1), (1, 1), ((1 - i, i), (1 - j, j)), dimension_numbers=_LAYOUT)
      )
  width = kernel.shape[-1]
  y = jnp.stack(phases, axis=3).reshape(batch, h, w, 2, 2, width)
  return y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * h, 2 * w, width)


def merge_branches(branches: Mapping[str, jax.Array]) -> jax.Array:
  """One 3x3 kernel that does what parallel linear branches do together (without normalisation or bias inside them).

  Args:
    branches: for C inputs and D outputs in g groups
      kernel    [3, 3, C/g, D]            a 3x3 convolution
      point     [1, 1, C/g, D]            a 1x1 convolution
      identity  [D]                       the input, scaled per channel; only where C = D
      expand    [g, C/g, E]               a 1x1 convolution to E channels per group, followed by
      project   [3, 3, g, E, D/g]         a 3x3 convolution

  Returns:
    [3, 3, C/g, D]; for stride 2 the 1x1 branches read the central tap of the window.
  """
  kernel, expand, project = branches["kernel"], branches["expand"], branches["project"]
  groups, inputs, _ = expand.shape
  sequence = jnp.einsum("gie,hwgeo->hwigo", expand, project, precision=jax.lax.Precision.HIGHEST)
  center = branches["point"][0, 0]
  if "identity" in branches:
    center = center + jnp.tile(jnp.eye(inputs, dtype=kernel.dtype), (1, groups)) * branches["identity"]
  return (kernel + sequence.reshape(kernel.shape)).at[1, 1].add(center)
