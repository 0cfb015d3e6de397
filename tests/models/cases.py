"""A backbone of a few thousand parameters and inputs for it.

Parameters are random everywhere: at its own initialisation every block is the identity and every velocity is zero.
"""

import functools
import zlib

import jax
import numpy as np

from elasticdit_jax.models import dit

CFG = dit.DiTConfig(
  32,
  4,
  16,
  activation="relu2",
  text_dim=16,
  text_length=8,
  text_pool="flatten",
  block_side=2,
  rope_theta=100.0,
)


def random_tree(shapes):
  """Normal values of standard deviation 0.1, norm scales around 1; a leaf depends on its path and shape only."""

  def leaf(path, shape):
    rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return (0.1 * rng.normal(size=shape.shape) + (path[-1].key == "scale")).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def params(cfg=CFG):
  return random_tree(dit.init_shapes(cfg))


def inputs(rows=8, columns=8, cfg=CFG):
  """(x, t, text, text_mask) of two samples; the first has all text tokens, the second three."""
  rng = np.random.default_rng(rows * 100 + columns)
  x = rng.normal(size=(2, rows, columns, cfg.latent_channels)).astype(np.float32)
  text = rng.normal(size=(2, cfg.text_length, cfg.text_dim)).astype(np.float32)
  mask = np.arange(cfg.text_length)[None] < np.array([[cfg.text_length], [3]])
  return x, np.float32([0.3, 0.8]), text, mask


@functools.cache
def forward(cfg=CFG):
  """Jitted (params, x, t, text, text_mask, bypass=None, *, route) -> velocity, shared by the tests of one process."""

  def apply(params, x, t, text, text_mask, bypass=None, *, route):
    return dit.ElasticDiT(cfg).apply({"params": params}, x, t, text, text_mask, route=route, bypass=bypass)

  return jax.jit(apply, static_argnames="route")
