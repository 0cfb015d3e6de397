"""Length of a TPU kernel from the final schedule that the compiler writes (one line per VLIW bundle).

  0x2d   : > { ... sbr.rel (%p) target = $region16 }     ">" per loop; a conditional branch opens a region
  0x78 PF: > { ... }                                     that ends at the next PF (predicated fallthrough) of its depth
  0x271 LB: >> { ... }                                   loop body of a loop inside the grid loop

A schedule says in which bundle every instruction issues. It knows nothing of waiting for memory.
"""

import re
from typing import NamedTuple

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s?)*)\{")
_COPYING = 64
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region")


class Region(NamedTuple):
  """Conditional code of the grid loop.

  Attributes:
    bundles: its length without inner loops.
    loops: the body lengths of its inner loops.
  """

  bundles: int
  loops: tuple[int, ...]

  @property
  def long(self) -> bool:
    """Whether it does more than start or await copies of tiles."""
    return bool(self.loops) or self.bundles > _COPYING


class Schedule(NamedTuple):
  """The grid loop of one kernel.

  Attributes:
    straight: bundles that every step runs.
    regions: conditional code, in order.
  """

  straight: int
  regions: tuple[Region, ...]

  def every_step(self) -> int:
    """Bundles of one step if all short conditional code, the copying of tiles, runs in it: an upper bound."""
    return self.straight + sum(region.bundles for region in self.regions if not region.long)

  def main_path(self) -> int:
    """Bundles of one step if of all conditional code only the longest region runs: a lower bound."""
    return self.straight + max((region.bundles for region in self.regions), default=0)

  def long_regions(self, trips: int) -> int:
    """Bundles of the conditional code that is not short, each inner loop run `trips` times."""
    return sum(region.bundles + trips * sum(region.loops) for region in self.regions if region.long)


def read(text: str) -> Schedule:
  """Parses a file named *final_bundles.txt."""
  straight, regions, bundles, loops, inside = 0, [], 0, [], False
  for line in text.splitlines():
    found = _BUNDLE.match(line)
    depth = found.group(2).count(">") if found else 0
    if depth == 1 and found.group(1) == "PF" and inside:
      regions.append(Region(bundles, tuple(loops)))
      bundles, loops, inside = 0, [], False
    if depth > 1:
      if found.group(1) == "LB" and depth == 2:
        loops.append(0)
      loops[-1] += 1
    elif depth == 1 and inside:
      bundles += 1
    elif depth == 1:
      straight += 1
      inside = bool(_BRANCH.search(line))
  # The last branch is that of the grid loop itself: what was counted behind it runs in every step.
  return Schedule(straight + bundles, tuple(regions))
