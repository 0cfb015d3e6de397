"""The phases of Unified Weight Co-Optimization as a table (ElasticDiT section 2.1.3, Figure 4).

  phase        routes trained                       parameters that move
  coarse       max, short token grids               all
  init         max                                  all
  warmup       max and lite on identical batches    all
  specialise   lite                                 those lite reads; skipped blocks are bit-frozen
  recover      max and lite                         all

Phases init to recover are the paper's 1 to 4. Before them, `coarse` learns what pictures hold at the price of the f16
grid, a quarter of the tokens, as backbones learn at a low resolution first (PixArt-alpha, arXiv 2310.00426).

A phase lists groups of routes: "max-f8+lite-f8,max-f16+lite-f16". Commas separate groups, which take turns step by
step; "+" joins the routes of one group, which share a batch, its times and its noise, and one update. Name a group
twice to train it twice as often.

"drop-f8" and "drop-f16" are stochastic depth (LayerDrop, arXiv 1909.11556), for coarse and init: not one route but a
family, of which each round through the groups takes the next member, see `shallow_routes`. A backbone trained with them
does without any such set of blocks, so that flex-lite starts phase 2 nearer to flex-max. Blocks left out in one step
are not frozen in it: momentum and weight decay move them on.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from elasticdit_jax.elastic import VAE_FACTORS, Route, select_route

NAMES = ("coarse", "init", "warmup", "specialise", "recover")
BACKBONE = ("coarse", "init")  # before the importance analysis: there is no flex-lite yet

Families = Mapping[str, tuple[Route, ...]]


@dataclasses.dataclass(frozen=True)
class Phase:
  """One row of the table.

  Attributes:
    name: one of NAMES.
    start, stop: first step, and the step after the last.
    groups: names of the routes that are trained together, in turn.
  """

  name: str
  start: int
  stop: int
  groups: tuple[tuple[str, ...], ...]

  @property
  def label(self) -> str:
    return f"{NAMES.index(self.name)}-{self.name}"

  def group_at(self, step: int, routes: Mapping[str, Route], families: Families) -> tuple[Route, ...]:
    """The routes trained at a step; of a family, the member whose turn it is."""
    round_, place = divmod(step - self.start, len(self.groups))
    members = [_members(name, routes, families) for name in self.groups[place]]
    return tuple(m[round_ % len(m)] for m in members)

  def trained(self, routes: Mapping[str, Route], families: Families) -> tuple[Route, ...]:
    """Every route of the phase once; what none of them reads is frozen."""
    names = dict.fromkeys(name for group in self.groups for name in group)
    return tuple(route for name in names for route in _members(name, routes, families))


def _members(name: str, routes: Mapping[str, Route], families: Families) -> tuple[Route, ...]:
  return families[name] if name in families else (select_route(routes, name),)


def shallow_routes(depth: int, skip: int) -> dict[str, tuple[Route, ...]]:
  """Families "drop-f8" and "drop-f16": routes that skip `skip` blocks at even distances, each set shifted by one.

  Few sets, for each is a program of its own; together they leave out every block but the first and the last, equally
  often where `skip` divides their number.

  Args:
    depth: blocks of the full backbone.
    skip: blocks that each member leaves out, 1 .. depth - 2.
  """
  inner = depth - 2
  sets = [{1 + (i * inner // skip + shift) % inner for i in range(skip)} for shift in range(-(-inner // skip))]
  keeps = [tuple(i not in skipped for i in range(depth)) for skipped in sets]
  return {
    f"drop-f{vae}": tuple(Route(f"drop-f{vae}", keep, (0.0,) * depth, vae) for keep in keeps) for vae in VAE_FACTORS
  }


def check_families(table: Iterable[Phase], families: Families) -> None:
  """Raises ValueError where a phase after the importance analysis names one: flex-lite is one fixed route by then."""
  for phase in table:
    named = sorted({name for group in phase.groups for name in group} & set(families))
    if named and phase.name not in BACKBONE:
      raise ValueError(
        f"config.phases.{phase.name}.routes: {named[0]} belongs to the phases {' and '.join(BACKBONE)}, before the"
        f" importance analysis; name {named[0].replace('drop', 'lite')}"
      )


def parse_groups(text: str, field: str) -> tuple[tuple[str, ...], ...]:
  """Turns "a+b,c" into (("a", "b"), ("c",)).

  Raises:
    ValueError: naming `field` for an empty list, an empty name, or a route twice in one group.
  """
  groups = tuple(tuple(name.strip() for name in group.split("+")) for group in text.split(","))
  for group in groups:
    if not all(group) or len(set(group)) != len(group):
      raise ValueError(f"{field}: expected groups like 'max-f8+lite-f8,max-f16', each route once a group, got {text!r}")
  return groups


def make_table(config: Mapping[str, Any], names: Iterable[str] = NAMES) -> tuple[Phase, ...]:
  """The phases of config.phases that have steps, in order.

  Args:
    config: name -> object with `steps` and `routes`.
    names: which of NAMES to take.

  Raises:
    ValueError: naming the field with a negative number of steps or an invalid route list, or where no phase has steps.
  """
  phases, start = [], 0
  for name in names:
    steps = config[name].steps
    if steps < 0:
      raise ValueError(f"config.phases.{name}.steps: expected 0 or more, got {steps}")
    groups = parse_groups(config[name].routes, f"config.phases.{name}.routes")
    if steps:
      phases.append(Phase(name, start, start + steps, groups))
    start += steps
  if not phases:
    raise ValueError(
      "config.phases: no phase has steps; give at least one, for example --config.phases.init.steps=1000"
    )
  return tuple(phases)


def phase_at(phases: tuple[Phase, ...], step: int) -> Phase:
  """The phase that trains this step; past the end, the last one."""
  return phases[max(0, bisect.bisect_right([p.start for p in phases], step) - 1)]
