"""Validation flow-matching loss at fixed times, noise and images; and the importance analysis that is made of it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from elasticdit_jax.elastic import Route
from elasticdit_jax.flow import path
from elasticdit_jax.models import dit
from elasticdit_jax.train.step import Codecs
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
  latents: dict[int, jax.Array]
  text: Text
  bins: int = 8
  seed: int = 0

  def by_time(self, params: Any, route: Route, bypass: Sequence[int] = ()) -> np.ndarray:
    """Mean loss per time bin, float32 [bins].

    Args:
      params: of the backbone.
      route: which way through it.
      bypass: blocks to replace by the identity. The same number as a route without them, from one program for all of
        them: the analysis would otherwise compile hundreds.
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


def make_validation(cfg: dit.DiTConfig, codecs: Codecs, batch: Batch, bins: int = 8, seed: int = 0) -> Validation:
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


@dataclasses.dataclass(frozen=True)
class Importance:
  """Result of the layer importance analysis (section 2.1.2).

  Attributes:
    skipped: the blocks flex-lite leaves out, ascending.
    base: validation loss of the full backbone.
    alone: per block, rise of the loss when only that block is skipped; NaN for protected blocks.
    order: blocks in the order in which the greedy search took them.
    curve: loss after each of them.
  """

  skipped: tuple[int, ...]
  base: float
  alone: tuple[float, ...]
  order: tuple[int, ...]
  curve: tuple[float, ...]


def analyse(validation: Validation, params: Any, routes: Sequence[Route], count: int) -> Importance:
  """Greedily removes the block whose absence raises the validation loss least, `count` times.

  Args:
    validation: the fixed inputs.
    params: weights of the trained backbone (EMA).
    routes: full-depth routes whose losses are averaged, one per VAE factor in use.
    count: blocks to skip; the first and the last block are protected.

  Raises:
    ValueError: where count leaves no block between the protected ones.
  """
  depth = validation.cfg.depth
  if not 0 < count <= depth - 2:
    raise ValueError(f"lite.skip: expected 1..{depth - 2} blocks for a backbone of {depth}, got {count}")

  def loss(bypass: Sequence[int]) -> float:
    return float(np.mean([validation.loss(params, route, bypass) for route in routes]))

  base = loss(())
  order, curve, alone = [], [], ()
  for _ in range(count):
    losses = {i: loss([*order, i]) for i in range(1, depth - 1) if i not in order}
    if not order:
      alone = tuple(losses[i] - base if i in losses else float("nan") for i in range(depth))
    best = min(losses, key=losses.__getitem__)
    order.append(best)
    curve.append(losses[best])
    logging.info("importance: skipping block %d costs %+.4f (loss %.4f)", best, losses[best] - base, losses[best])
  return Importance(tuple(sorted(order)), base, alone, tuple(order), tuple(curve))
