"""Inception-v3 up to its last pooling, in the variant that defines FID (the graph of 2015-12-05, ported to PyTorch).

It differs from torchvision's: average pooling leaves padding out of its means, and the last block pools maxima. Batch
normalisation is folded into the convolutions, whose parameters are a kernel and a bias each. Names are those of the
PyTorch port: `Mixed_5b/branch1x1/kernel`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

FEATURES = 2048
SIDE = 299  # pixels; what pictures are resized to

# (name, output channels, kernel, stride); stride 2 goes without padding, stride 1 keeps the size.
_Conv = tuple[str, int, tuple[int, int], int]
_Branch = tuple[_Conv, ...]


def _conv(name: str, width: int, rows: int = 1, columns: int | None = None, stride: int = 1) -> _Conv:
  return name, width, (rows, rows if columns is None else columns), stride


def _block_a(pool: int) -> tuple[_Branch, ...]:
  return (
    (_conv("branch1x1", 64),),
    (_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)),
    (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)),
    (_conv("branch_pool", pool),),
  )


def _block_c(inner: int) -> tuple[_Branch, ...]:
  long = [_conv("branch7x7dbl_1", inner)]
  long += [_conv(f"branch7x7dbl_{i}", inner, *((7, 1) if i % 2 == 0 else (1, 7))) for i in (2, 3, 4)]
  return (
    (_conv("branch1x1", 192),),
    (_conv("branch7x7_1", inner), _conv("branch7x7_2", inner, 1, 7), _conv("branch7x7_3", 192, 7, 1)),
    (*long, _conv("branch7x7dbl_5", 192, 1, 7)),
    (_conv("branch_pool", 192),),
  )


_BLOCK_B = (
  (_conv("branch3x3", 384, 3, stride=2),),
  (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3, stride=2)),
  (),
)
_BLOCK_D = (
  (_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, stride=2)),
  (
    _conv("branch7x7x3_1", 192),
    _conv("branch7x7x3_2", 192, 1, 7),
    _conv("branch7x7x3_3", 192, 7, 1),
    _conv("branch7x7x3_4", 192, 3, stride=2),
  ),
  (),
)
# The convolutions named ..a and ..b read the same input, side by side.
_BLOCK_E = (
  (_conv("branch1x1", 320),),
  (_conv("branch3x3_1", 384), _conv("branch3x3_2a", 384, 1, 3), _conv("branch3x3_2b", 384, 3, 1)),
  (
    _conv("branch3x3dbl_1", 448),
    _conv("branch3x3dbl_2", 384, 3),
    _conv("branch3x3dbl_3a", 384, 1, 3),
    _conv("branch3x3dbl_3b", 384, 3, 1),
  ),
  (_conv("branch_pool", 192),),
)
_MIXED = (
  ("Mixed_5b", _block_a(32)),
  ("Mixed_5c", _block_a(64)),
  ("Mixed_5d", _block_a(64)),
  ("Mixed_6a", _BLOCK_B),
  ("Mixed_6b", _block_c(128)),
  ("Mixed_6c", _block_c(160)),
  ("Mixed_6d", _block_c(160)),
  ("Mixed_6e", _block_c(192)),
  ("Mixed_7a", _BLOCK_D),
  ("Mixed_7b", _BLOCK_E),
  ("Mixed_7c", _BLOCK_E),
)
_STEM = (
  _conv("Conv2d_1a_3x3", 32, 3, stride=2),
  _conv("Conv2d_2a_3x3", 32, 3),
  _conv("Conv2d_2b_3x3", 64, 3),
  _conv("Conv2d_3b_1x1", 80),
  _conv("Conv2d_4a_3x3", 192, 3),
)
_UNPADDED = ("Conv2d_2a_3x3", "Conv2d_4a_3x3")
_POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")  # maxima are taken after these

_max_pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
_same_max = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
_same_mean = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)


def _apply(conv: _Conv, x: jax.Array) -> jax.Array:
  name, width, size, stride = conv
  padding = "VALID" if stride == 2 or name in _UNPADDED else "SAME"
  return nn.relu(nn.Conv(width, size, stride, padding, name=name)(x))


class _Mixed(nn.Module):
  branches: tuple[_Branch, ...]
  last: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    outputs = []
    for branch in self.branches:
      h = x
      if not branch:
        h = _max_pool(x)
      elif branch[0][0] == "branch_pool":
        h = _same_max(x) if self.last else _same_mean(x)
      sides = []
      for conv in branch:
        if conv[0][-1] in "ab":
          sides.append(_apply(conv, h))
        else:
          h = _apply(conv, h)
      outputs += sides or [h]
    return jnp.concatenate(outputs, axis=-1)


class InceptionV3(nn.Module):
  """Pictures [B, 299, 299, 3] in [-1, 1] -> features [B, 2048]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for conv in _STEM:
      x = _apply(conv, x)
      if conv[0] in _POOLED:
        x = _max_pool(x)
    for name, branches in _MIXED:
      x = _Mixed(branches, name == _MIXED[-1][0], name=name)(x)
    return x.mean((1, 2))


def init_shapes() -> dict:
  """Parameter tree of jax.ShapeDtypeStruct, without allocating anything."""
  image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  return jax.eval_shape(lambda x: InceptionV3().init(jax.random.key(0), x)["params"], image)
