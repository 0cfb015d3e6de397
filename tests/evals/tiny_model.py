"""A model of a few thousand random parameters with everything that generation needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax import elastic
from elasticdit_jax.data.scenes import MAX_WORDS, VOCABULARY
from elasticdit_jax.data.text import WordEncoder
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import dit, tdvae
from elasticdit_jax.models.codec import Codec

SIZE = 64
_CFG = dit.DiTConfig(
  32,
  3,
  16,
  activation="relu2",
  text_dim=16,
  text_length=MAX_WORDS,
  text_pool="flatten",
  block_side=2,
  rope_theta=100.0,
)
_VAES = (
  tdvae.VAEConfig(8, (4, 8, 8), (0, 0, 1), (0, 0, 1), flow=4),
  tdvae.VAEConfig(16, (4, 8, 8, 8), (0, 0, 0, 1), (0, 0, 0, 1), flow=4),
)


def make(factors: tuple[int, ...] = (8, 16), seed: int = 0) -> model_dir.Model:
  """A random model for 64 px pictures; its velocity is not zero, so prompts, routes and blocks all matter."""
  rng = np.random.default_rng(seed)

  def fill(shapes, gain):
    # Without a compiled initialiser: many small programs would take longer than the tests.
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, gain / np.sqrt(s.size / s.shape[-1]), s.shape)), shapes)

  codecs = {
    cfg.factor: Codec(cfg, fill(tdvae.init_shapes(cfg), 0.3), jnp.zeros(16), jnp.float32(10.0))
    for cfg in _VAES
    if cfg.factor in factors
  }
  routes = elastic.standard_routes(_CFG.depth, [1])
  sparse = dataclasses.replace(routes["max-f8"], name="max-s50-f8", sparsity=(0.0, 0.5, 0.5))
  return model_dir.Model(
    _CFG,
    fill(dit.init_shapes(_CFG), 0.7),
    codecs,
    WordEncoder(VOCABULARY, MAX_WORDS, _CFG.text_dim),
    routes | {sparse.name: sparse},
    model_dir.FlowShift(3.0, 16),
    SIZE,
  )
