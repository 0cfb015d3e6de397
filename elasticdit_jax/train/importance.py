"""Layer importance analysis: which blocks flex-lite can do without (ElasticDiT section 2.1.2)."""

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
