"""Route: the one value that says which part of the shared weights runs.

              switch 1: VAE f8 | f16          switch 2: depth                  per layer
  image ----> [ T-DVAE encoder ] --latents--> [ block_00 .. block_NN ] -----> [ kept key blocks ]
                    |                            keep[i] False: absent            sparsity[i]
                    +--------- all three are ONE frozen value, static under jit ---------+

Parameters never depend on a route; a route only says which of them the compiled program reads (ElasticDiT section 2.1).
A route is data: `routes.json` beside a checkpoint, written by the importance analysis and read by everything else.
"""

import dataclasses
import heapq
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

VAE_FACTORS = (8, 16)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_BLOCK = re.compile(r"block_(\d+)$")


@dataclasses.dataclass(frozen=True)
class Route:
  """One way through the shared weights; hashable, so it is a static argument under jit.

  Attributes:
    name: for people and files: "max-f8", "lite-f16", "d20-s84-f16".
    keep: one bool per block of the full backbone; False leaves the block out of the program (section 2.1.2).
    sparsity: one fraction in [0, 1) per block: share of key blocks each query block drops; 0 means dense (section 2.2).
    vae: spatial compression of the VAE, 8 or 16 (section 2.1.1).
  """

  name: str
  keep: tuple[bool, ...]
  sparsity: tuple[float, ...]
  vae: int

  def __post_init__(self):
    if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
      raise ValueError(f"Route.name: expected lower-case letters, digits, '.', '_' or '-', got {self.name!r}")
    object.__setattr__(self, "keep", tuple(self.keep))
    object.__setattr__(self, "sparsity", tuple(float(s) for s in self.sparsity))
    if not self.keep or not all(isinstance(k, bool) for k in self.keep):
      raise ValueError(f"Route.keep of {self.name!r}: expected one bool per block, got {self.keep!r}")
    if not self.keep[0] or not self.keep[-1]:
      raise ValueError(f"Route.keep of {self.name!r}: the first and the last block are protected and cannot be skipped")
    if len(self.sparsity) != len(self.keep):
      raise ValueError(
        f"Route.sparsity of {self.name!r}: expected {len(self.keep)} values like Route.keep, got {len(self.sparsity)}"
      )
    if not all(0.0 <= s < 1.0 for s in self.sparsity):
      raise ValueError(f"Route.sparsity of {self.name!r}: expected values in [0, 1), got {self.sparsity}")
    if type(self.vae) is not int or self.vae not in VAE_FACTORS:
      raise ValueError(f"Route.vae of {self.name!r}: expected one of {VAE_FACTORS}, got {self.vae!r}")

  @property
  def depth(self) -> int:
    """Blocks of the full backbone."""
    return len(self.keep)

  @property
  def active(self) -> tuple[int, ...]:
    """Indices of the blocks that run."""
    return tuple(i for i, kept in enumerate(self.keep) if kept)

  def owns(self, path: Iterable[str]) -> bool:
    """Whether a DiT parameter with this key path is read by the route.

    Everything outside the blocks belongs to every route; `block_07/...` belongs to it where block 7 is kept.
    """
    for key in path:
      match = _BLOCK.match(key)
      if match:
        return self.keep[int(match.group(1))]
    return True


def standard_routes(depth: int, skipped: Iterable[int] = ()) -> dict[str, Route]:
  """The paper's four dense routes: max and lite depth, each at f8 and f16.

  Args:
    depth: blocks of the full backbone.
    skipped: blocks that flex-lite leaves out.

  Raises:
    ValueError: for an index outside the backbone or a protected (first, last) block.
  """
  skipped = tuple(skipped)
  if any(not 0 <= i < depth for i in skipped):
    raise ValueError(f"skipped: expected block indices in 0..{depth - 1}, got {skipped}")
  lite = tuple(i not in skipped for i in range(depth))
  dense = (0.0,) * depth
  routes = [
    Route(f"{name}-f{vae}", keep, dense, vae)
    for vae in VAE_FACTORS
    for name, keep in (("max", (True,) * depth), ("lite", lite))
  ]
  return {route.name: route for route in routes}


def select_route(routes: Mapping[str, Route], name: str) -> Route:
  """The route of that name; raises ValueError listing the known ones."""
  if name not in routes:
    raise ValueError(f"route: unknown route {name!r}; expected one of {', '.join(sorted(routes))}")
  return routes[name]


def kept_budget(layers: int, num_blocks: int, target: float, least: int = 1) -> int:
  """Key blocks that `layers` layers keep together so that their average sparsity is as near to `target` as can be.

  Args:
    layers: blocks of the backbone that run.
    num_blocks: key blocks that a query block of a dense layer reads, T_b.
    target: wanted share of dropped blocks over all layers, in [0, 1); the paper's is 0.8416.
    least: that every layer keeps: 1, or 2 where one of them is the query block itself.

  Raises:
    ValueError: for a target outside [0, 1) or fewer than `least` blocks.
  """
  if not 0.0 <= target < 1.0:
    raise ValueError(f"target: expected an average share of dropped blocks in [0, 1), got {target}")
  if layers < 1 or not 1 <= least <= num_blocks:
    raise ValueError(f"least: expected 1..{num_blocks} of {num_blocks} blocks in at least 1 layer, got {least}")
  return max(layers * least, math.floor((1 - target) * layers * num_blocks + 0.5))


def allocate(budget: int, num_blocks: int, curves: Sequence[Mapping[int, float]], least: int = 1) -> tuple[int, ...]:
  """Kept key blocks of every layer: the largest measured drop of the loss first (section 2.2.3).

  Every layer starts with `least`; the others go out one by one, each to the layer whose loss it lowers most. Between
  measured counts and over their noise a curve is its lower convex hull, so this is the allocation of least total loss,
  and a larger budget takes no block away from any layer.

  Args:
    budget: sum of the result, see kept_budget.
    num_blocks: T_b.
    curves: per layer, kept blocks -> loss with only this layer sparse; each holds `least` and `num_blocks`.
    least: that every layer keeps.

  Raises:
    ValueError: for a budget that cannot be met or a curve that does not fit.
  """
  _check_budget(budget, num_blocks, len(curves), least, num_blocks)
  drops = [_drops(i, curve, least, num_blocks) for i, curve in enumerate(curves)]
  kept = [least] * len(curves)
  # Ties: the layer with fewer blocks, then the lower index.
  queue = [(-drop[0], least, i) for i, drop in enumerate(drops) if drop]
  heapq.heapify(queue)
  for _ in range(budget - sum(kept)):
    i = heapq.heappop(queue)[2]
    kept[i] += 1
    if kept[i] < num_blocks:
      heapq.heappush(queue, (-drops[i][kept[i] - least], kept[i], i))
  return tuple(kept)


def _drops(layer: int, curve: Mapping[int, float], least: int, num_blocks: int) -> list[float]:
  """How much each block after the first `least` lowers the loss, never growing: slopes of the lower convex hull."""
  points = sorted((kept, loss) for kept, loss in curve.items() if kept >= least)
  if not points or points[0][0] != least or points[-1][0] != num_blocks:
    raise ValueError(f"curves[{layer}]: expected losses at {least} and {num_blocks} kept blocks, got {sorted(curve)}")
  if not all(math.isfinite(loss) for _, loss in points):
    raise ValueError(f"curves[{layer}]: expected finite losses, got {dict(points)}")
  hull: list[tuple[int, float]] = []
  for x, y in points:
    while len(hull) > 1 and _slope(*hull[-2], *hull[-1]) >= _slope(*hull[-2], x, y):
      hull.pop()
    hull.append((x, y))
  return [-_slope(*a, *b) for a, b in zip(hull, hull[1:], strict=False) for _ in range(b[0] - a[0])]


def _slope(x0: int, y0: float, x1: int, y1: float) -> float:
  return (y1 - y0) / (x1 - x0)


def allocate_by_importance(
  budget: int, num_blocks: int, scores: Sequence[float], least: int = 1, most: int | None = None
) -> tuple[int, ...]:
  """Kept key blocks of every layer in proportion to its importance, for want of curves: largest remainder.

  Args:
    budget, num_blocks, least: as in `allocate`.
    scores: importance of every layer; one below zero counts as zero. A more important layer never gets fewer blocks.
    most: that a layer may keep; num_blocks where None.

  Raises:
    ValueError: for a budget that cannot be met or a score that is not a number.
  """
  most = num_blocks if most is None else most
  _check_budget(budget, num_blocks, len(scores), least, most)
  if not all(math.isfinite(score) for score in scores):
    raise ValueError(f"scores: expected one finite number per layer, got {tuple(scores)}")
  weights = [Fraction(max(score, 0.0)) for score in scores]
  kept = [least] * len(scores)
  open_layers, spare, shares = list(range(len(scores))), budget - least * len(scores), {}
  while open_layers:
    total = sum(weights[i] for i in open_layers)
    shares = {i: spare * weights[i] / total if total else Fraction(spare, len(open_layers)) for i in open_layers}
    full = [i for i in open_layers if shares[i] >= most - least]
    if not full:
      break
    for i in full:
      kept[i] = most
    spare -= len(full) * (most - least)
    open_layers = [i for i in open_layers if i not in full]
  left = spare - sum(math.floor(share) for share in shares.values())
  ahead = sorted(open_layers, key=lambda i: (math.floor(shares[i]) - shares[i], -weights[i], i))
  for i in open_layers:
    kept[i] += math.floor(shares[i]) + (i in ahead[:left])
  return tuple(kept)


def _check_budget(budget: int, num_blocks: int, layers: int, least: int, most: int) -> None:
  if not 1 <= least <= most <= num_blocks:
    raise ValueError(f"least, most: expected 1 <= least <= most <= {num_blocks} blocks, got {least} and {most}")
  if layers < 1 or not layers * least <= budget <= layers * most:
    raise ValueError(
      f"budget: {layers} layers that keep {least}..{most} blocks take {layers * least}..{layers * most}, got {budget}"
    )


def sparse_route(base: Route, kept: Sequence[int], num_blocks: int) -> Route:
  """`base` with these key blocks kept, named after depth and realised sparsity: "d20-s84-f16".

  A Route holds shares, so that it also means something on other grids: there, a layer keeps at least the same share of
  blocks, rounded up to whole ones. On a grid of `num_blocks` it keeps exactly `kept` (ops.gating.num_kept).

  Args:
    base: says which blocks run, and the VAE.
    kept: one count in 1..num_blocks per block that runs; num_blocks is dense.
    num_blocks: T_b of the grid that `kept` was made for.
  """
  if len(kept) != len(base.active) or not all(1 <= k <= num_blocks for k in kept):
    raise ValueError(f"kept: expected {len(base.active)} counts in 1..{num_blocks}, got {tuple(kept)}")
  shares = dict(zip(base.active, (1 - k / num_blocks for k in kept), strict=True))
  realised = 1 - sum(kept) / (len(kept) * num_blocks)
  name = f"d{len(kept)}-s{math.floor(100 * realised + 0.5)}-f{base.vae}"
  return dataclasses.replace(base, name=name, sparsity=tuple(shares.get(i, 0.0) for i in range(base.depth)))


def routes_to_json(routes: Mapping[str, Route]) -> dict[str, Any]:
  """JSON values of a table of routes; a second name of a route in it becomes the string of its own name."""
  return {
    name: r.name
    if name != r.name and routes.get(r.name) == r
    else {"keep": list(r.keep), "sparsity": list(r.sparsity), "vae": r.vae}
    for name, r in routes.items()
  }


def routes_from_json(table: Any) -> dict[str, Route]:
  """The inverse of routes_to_json; raises ValueError or TypeError for anything else."""
  if not isinstance(table, dict) or not table:
    raise ValueError("expected an object of routes by name")
  routes = {}
  for name, fields in table.items():
    if isinstance(fields, str):
      if not _NAME.fullmatch(name) or not isinstance(table.get(fields), dict):
        raise ValueError(f"route {name!r}: expected the fields of a route or the name of one, got {fields!r}")
      routes[name] = Route(name=fields, **table[fields])
      continue
    if not isinstance(fields, dict) or set(fields) != {"keep", "sparsity", "vae"}:
      raise ValueError(f"route {name!r}: expected exactly the fields keep, sparsity and vae")
    routes[name] = Route(name=name, **fields)
  return routes


def save_routes(path: str | os.PathLike, routes: Mapping[str, Route]) -> None:
  """Writes routes.json atomically (a reader never sees half a file)."""
  text = json.dumps(routes_to_json(routes), indent=1)
  partial = f"{os.fspath(path)}.partial"
  with open(partial, "w") as f:
    f.write(f"{text}\n")
  os.replace(partial, path)


def load_routes(path: str | os.PathLike) -> dict[str, Route]:
  """Reads routes.json: every name in it -> its route; two names may stand for one route.

  Raises:
    ValueError: where the file is missing, is not JSON, or a route in it is invalid; the message names the file.
  """
  try:
    with open(path) as f:
      routes = routes_from_json(json.load(f))
  except FileNotFoundError:
    raise ValueError(f"routes: no file {os.fspath(path)}; it is written beside a checkpoint by the uwco task") from None
  except (ValueError, TypeError) as e:
    raise ValueError(f"routes: {os.fspath(path)} is not a valid route file: {e}") from e
  depths = {r.depth for r in routes.values()}
  if len(depths) > 1:
    raise ValueError(f"routes: {os.fspath(path)} mixes backbones of {sorted(depths)} blocks")
  return routes
