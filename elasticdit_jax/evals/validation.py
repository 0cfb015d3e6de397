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

  def by_time(self, params: Any, route: Route, bypass: Sequence[int] = ()) -> np.ndarray:
    """Mean loss per time bin, float32 [bins].

    Args:
      params: of the backbone.
      route: which way through it.
      bypass: blocks to replace by the identity. The same number as a route without them, from one program for all of
        them: an importance analysis would otherwise compile hundreds.
    """
    bypassed = np.zeros(self.cfg.depth, bool)
    bypassed[list(bypass)] = True
    key = jax.random.fold_in(jax.random.key(self.seed), route.vae)
    return np.asarray(
      _by_time(self.cfg, params, self.latents[route.vae], self.text, key, bypassed, route=route, bins=self.bins)
    )

  def loss(self, params: Any, route: Route, bypass: Sequence[int] = ()) -> float:
    """Mean over the time bins."""
    return float(self.by_time(params, route, bypass).mean())


def make_validation(
  cfg: dit.DiTConfig, codecs: Mapping[int, Codec], batch: Batch, bins: int = 8, seed: int = 0
) -> Validation:
  """Encodes a batch of validation images with every codec."""
  encode = jax.jit(lambda codec, image: codec.encode(to_float(image)))
  return Validation(cfg, {f: encode(codec, batch.image) for f, codec in codecs.items()}, batch.text, bins, seed)


@functools.partial(jax.jit, static_argnames=("cfg", "route", "bins"))
def _by_time(cfg, params, x0, text, key, bypassed, *, route: Route, bins: int) -> jax.Array:
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
    )
    return jnp.mean(jnp.square(v - path.target(x0, eps)))

  return jax.lax.map(at, path.bin_centers(bins))
