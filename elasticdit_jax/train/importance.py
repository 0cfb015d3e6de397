"""Layer importance analysis: which blocks flex-lite can do without (ElasticDiT section 2.1.2), and how sparse the
attention of each layer may become (section 2.2.3)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from elasticdit_jax.elastic import Route
from elasticdit_jax.evals.validation import Validation


@dataclasses.dataclass(frozen=True)
class Importance:
  """Result of the analysis.

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


def check_skip(depth: int, count: int) -> None:
  """Raises ValueError where `count` blocks cannot be skipped between the protected first and last one."""
  if not 0 < count <= depth - 2:
    raise ValueError(f"config.lite.skip: expected 1..{depth - 2} blocks for a backbone of {depth}, got {count}")


def analyse(validation: Validation, params: Any, routes: Sequence[Route], count: int) -> Importance:
  """Greedily removes the block whose absence raises the validation loss least, `count` times.

  Args:
    validation: the fixed inputs.
    params: weights of the trained backbone (EMA).
    routes: full-depth routes whose losses are averaged, one per VAE factor in use.
    count: blocks to skip; the first and the last block are protected.

  Raises:
    ValueError: see check_skip.
  """
  depth = validation.cfg.depth
  check_skip(depth, count)

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


@dataclasses.dataclass(frozen=True)
class Sensitivity:
  """How the loss answers to sparse attention in single layers.

  Attributes:
    num_blocks: key blocks of a dense layer, T_b.
    base: validation loss with every layer dense.
    curves: per block that runs, kept key blocks -> loss with that layer alone sparse; what elastic.allocate takes.
  """

  num_blocks: int
  base: float
  curves: tuple[dict[int, float], ...]


def kept_levels(num_blocks: int, least: int = 1) -> tuple[int, ...]:
  """The counts a curve is measured at: `least`, twice that, and so on below num_blocks."""
  return tuple(least * 2**i for i in range(num_blocks.bit_length()) if least * 2**i < num_blocks)


def measure_sensitivity(
  validation: Validation, params: Any, route: Route, levels: Sequence[int] | None = None
) -> Sensitivity:
  """Measures the loss with one layer sparse and all others dense, for every layer and a few counts of kept blocks.

  One program serves all of it: key blocks are masked at run time. That takes (levels * layers + 1) validation losses.

  Args:
    validation: the fixed inputs.
    params: of the backbone.
    route: says which blocks run and the VAE; its own sparsity is not used.
    levels: counts below T_b, the least that a layer may keep among them; kept_levels(T_b) where None.

  Raises:
    ValueError: for a grid of one block, or counts outside 1..T_b - 1.
  """
  total = validation.num_blocks(route)
  levels = kept_levels(total) if levels is None else tuple(levels)
  if total < 2 or not levels or not all(1 <= level < total for level in levels):
    raise ValueError(f"levels: expected counts in 1..{total - 1} of the {total} blocks of {route.name!r}, got {levels}")
  dense = np.full(route.depth, total)

  def loss(layer: int, kept: int) -> float:
    return validation.loss(params, route, kept=np.where(np.arange(route.depth) == layer, kept, dense))

  base, curves = loss(0, total), []
  for layer in route.active:
    curves.append({level: loss(layer, level) for level in levels} | {total: base})
    rises = ", ".join(f"{level}: {curves[-1][level] - base:+.4f}" for level in levels)
    logging.info("sensitivity: %s, block %d, loss rise by kept of %d blocks: %s", route.name, layer, total, rises)
  return Sensitivity(total, base, tuple(curves))
