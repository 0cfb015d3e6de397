"""Route: the one value that says which part of the shared weights runs.

              switch 1: VAE f8 | f16          switch 2: depth                  per layer
  image ----> [ T-DVAE encoder ] --latents--> [ block_00 .. block_NN ] -----> [ kept key blocks ]
                    |                            keep[i] False: absent            sparsity[i]
                    +--------- all three are ONE frozen value, static under jit ---------+

Parameters never depend on a route; a route only says which of them the compiled program reads (ElasticDiT section 2.1).
A route is data: `routes.json` beside a checkpoint, written by the importance analysis and read by everything else.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping

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


def save_routes(path: str | os.PathLike, routes: Mapping[str, Route]) -> None:
  """Writes routes.json atomically (a reader never sees half a file)."""
  table = {name: {k: v for k, v in dataclasses.asdict(r).items() if k != "name"} for name, r in routes.items()}
  partial = f"{os.fspath(path)}.partial"
  with open(partial, "w") as f:
    json.dump(table, f, indent=1)
    f.write("\n")
  os.replace(partial, path)


def load_routes(path: str | os.PathLike) -> dict[str, Route]:
  """Reads routes.json.

  Raises:
    ValueError: where the file is missing, is not JSON, or a route in it is invalid; the message names the file.
  """
  try:
    with open(path) as f:
      table = json.load(f)
    if not isinstance(table, dict) or not table:
      raise ValueError("expected an object of routes by name")
    routes = {}
    for name, fields in table.items():
      if not isinstance(fields, dict) or set(fields) != {"keep", "sparsity", "vae"}:
        raise ValueError(f"route {name!r}: expected exactly the fields keep, sparsity and vae")
      routes[name] = Route(name=name, **fields)
  except FileNotFoundError:
    raise ValueError(f"routes: no file {os.fspath(path)}; it is written beside a checkpoint by the uwco task") from None
  except (ValueError, TypeError) as e:
    raise ValueError(f"routes: {os.fspath(path)} is not a valid route file: {e}") from e
  depths = {r.depth for r in routes.values()}
  if len(depths) > 1:
    raise ValueError(f"routes: {os.fspath(path)} mixes backbones of {sorted(depths)} blocks")
  return routes
