"""Validation flow-matching loss at fixed times, noise and images."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.elastic import Route
from elasticdit_jax.flow import path
from elasticdit_jax.models import dit
from elasticdit_jax.models.codec import Codec
from elasticdit_jax.ops import blocks
from elasticdit_jax.types import Batch, Text, to_float


@dataclasses.dataclass(frozen=True)
class Validation:
  """Fixed inputs, so that two numbers differ only by what was changed on purpose.

  Attributes:
    cfg: the backbone.
    latents: VAE factor -> x0 [N, h, w, C].
    text: N captions.
    bins: equal bins of t whose centres are tested.
    seed: of the noise.
  """

  cfg: dit.DiTConfig
  latents: Mapping[int, jax.Array]
  text: Text
  bins: int = 8
  seed: int = 0

  def num_blocks(self, route: Route) -> int:
    """Key blocks that a query block of a dense layer reads, T_b."""
    rows, columns = (n // self.cfg.patch for n in self.latents[route.vae].shape[1:3])
    return blocks.BlockGrid(rows, columns, self.cfg.block_side).num_blocks

  def by_time(
    self, params: Any, route: Route, bypass: Sequence[int] = (), kept: Sequence[int] | None = None
  ) -> np.ndarray:
    """Mean loss per time bin, float32 [bins].

    Args:
      params: of the backbone.
      route: which way through it.
      bypass: blocks to replace by the identity. The same number as a route without them, from one program for all of
        them: an importance analysis would otherwise compile hundreds.
      kept: per block of the backbone, key blocks to keep in place of route.sparsity; likewise one program for all.
    """
    bypassed = np.zeros(self.cfg.depth, bool)
    bypassed[list(bypass)] = True
    kept = None if kept is None else np.asarray(kept, np.int32)
    key = jax.random.fold_in(jax.random.key(self.seed), route.vae)
    x0 = self.latents[route.vae]
    return np.asarray(_by_time(self.cfg, params, x0, self.text, key, bypassed, kept, route=route, bins=self.bins))

  def loss(self, params: Any, route: Route, bypass: Sequence[int] = (), kept: Sequence[int] | None = None) -> float:
    """Mean over the time bins; see by_time."""
    return float(self.by_time(params, route, bypass, kept).mean())


def make_validation(
  cfg: dit.DiTConfig, codecs: Mapping[int, Codec], batch: Batch, bins: int = 8, seed: int = 0
) -> Validation:
  """Encodes a batch of validation images with every codec."""
  encode = jax.jit(lambda codec, image: codec.encode(to_float(image)))
  return Validation(cfg, {f: encode(codec, batch.image) for f, codec in codecs.items()}, batch.text, bins, seed)


@functools.partial(jax.jit, static_argnames=("cfg", "route", "bins"))
def _by_time(cfg, params, x0, text, key, bypassed, kept, *, route: Route, bins: int) -> jax.Array:
  eps = jax.random.normal(key, x0.shape)

  def at(t):
    times = jnp.full(x0.shape[:1], t)
    v = dit.ElasticDiT(cfg).apply(
      {"params": params},
      path.interpolate(x0, eps, times),
      times,
      text.embedding,
      text.mask,
      route=route,
      bypass=bypassed,
      kept=kept,
    )
    return jnp.mean(jnp.square(v - path.target(x0, eps)))

  return jax.lax.map(at, path.bin_centers(bins))
