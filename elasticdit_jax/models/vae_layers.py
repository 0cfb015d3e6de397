"""Layers that the autoencoders share: convolution with optional training branches, residual block, upsampling."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.ops import convolution

# Channels inside the sequential branch, per input channel of its group.
_EXPANSION = 2
BRANCHES = ("point", "identity", "expand", "project")
_lecun = nn.initializers.lecun_normal()


def _add_branches(module: nn.Module, kernel: jax.Array, groups: int) -> jax.Array:
  """The merged kernel of a convolution in its training form; the branches start at zero, so that it starts plain."""
  inputs, width = kernel.shape[2:]
  inner, zeros = _EXPANSION * inputs, nn.initializers.zeros
  branches = {
    "kernel": kernel,
    "point": module.param("point", zeros, (1, 1, inputs, width)),
    "expand": module.param("expand", nn.initializers.lecun_normal(batch_axis=0), (groups, inputs, inner)),
    "project": module.param("project", zeros, (3, 3, groups, inner, width // groups)),
  }
  if inputs * groups == width:
    branches["identity"] = module.param("identity", zeros, (width,))
  return convolution.merge_branches(branches)


def merge_tree(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters in training form -> the same function in deployed form: every convolution one kernel and one bias.

  Args:
    params: any nested dict; parts without branches come back as they are.
  """
  if "project" in params:
    kept = {name: leaf for name, leaf in params.items() if name not in BRANCHES}
    return kept | {"kernel": convolution.merge_branches(params)}
  return {name: merge_tree(part) if isinstance(part, Mapping) else part for name, part in params.items()}


class Conv(nn.Module):
  """Square convolution, zero padding "SAME", in deployed form {kernel, bias} or with the branches of training.

  Branches are linear, so the forward pass adds up their kernels and runs one convolution: training costs no more than
  the deployed form, whose kernel is that sum.

  Attributes:
    width: output channels.
    size: of the kernel.
    strides: along both axes.
    groups: of channels.
    branches: training form; for 3x3 kernels only.
    use_bias: whether there is a bias.
    kernel_init: of the kernel.
  """

  width: int
  size: int = 3
  strides: int = 1
  groups: int = 1
  branches: bool = False
  use_bias: bool = True
  kernel_init: Callable[..., jax.Array] = _lecun

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.width)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.width,)) if self.use_bias else None
    if self.branches and self.size == 3:
      kernel = _add_branches(self, kernel, self.groups)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=None)
    y = convolution.conv2d(x, kernel, strides=self.strides, groups=self.groups)
    return y if bias is None else y + bias


class Upsample(nn.Module):
  """Nearest x2 followed by a 3x3 convolution; fused unless told otherwise, which changes cost, not results."""

  width: int
  fused: bool = True
  branches: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", _lecun, (3, 3, x.shape[-1], self.width))
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    if self.branches:
      kernel = _add_branches(self, kernel, 1)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=None)
    return convolution.upsample_conv(x, kernel, fused=self.fused) + bias


def norm(channels: int, most_groups: int, **options: Any) -> nn.GroupNorm:
  """GroupNorm of the largest power of two of groups, up to most_groups, that divides the channels."""
  groups = int(np.gcd(channels, 1 << (most_groups.bit_length() - 1)))
  return nn.GroupNorm(groups, **options)


def pad_to_multiple(image: jax.Array, factor: int) -> jax.Array:
  """[B, H, W, C] with its last row and column repeated until factor divides H and W."""
  height, width = image.shape[1:3]
  pad = (-height % factor, -width % factor)
  if any(pad):
    image = jnp.pad(image, ((0, 0), (0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
  return image


class ResBlock(nn.Module):
  """Pre-activation residual block: (GroupNorm, SiLU, conv3) twice; starts as the identity (or its 1x1 skip)."""

  width: int
  groups: int = 1
  norm_groups: int = 8
  branches: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    form = {"groups": self.groups, "branches": self.branches}
    h = nn.silu(norm(x.shape[-1], self.norm_groups, name="norm1")(x))
    h = Conv(self.width, **form, name="conv1")(h)
    h = nn.silu(norm(self.width, self.norm_groups, name="norm2")(h))
    h = Conv(self.width, **form, kernel_init=nn.initializers.zeros, name="conv2")(h)
    if x.shape[-1] != self.width:
      x = Conv(self.width, size=1, name="skip")(x)
    return x + h
