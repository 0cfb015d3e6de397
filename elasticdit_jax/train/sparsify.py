"""Task `sparsify`: the sparse routes of the paper's Table 2 over the weights of a finished model (section 2.2.3).

    baseline             a dense route                        max-f8
    vanilla-sparse       75 % dropped in every layer          d8-s75-f8
    layer-aware-sparse   84.16 % dropped on average:          d8-s84-f8
                         dense route -> loss of every layer at a few kept counts -> elastic.allocate -> counts

The names on the left stand for the routes on the right, whose names tell depth and realised sparsity. Weights stay as
they are: a route is data.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from elasticdit_jax import elastic
from elasticdit_jax.elastic import Route
from elasticdit_jax.evals.evaluate import held_out
from elasticdit_jax.evals.validation import Validation
from elasticdit_jax.generate import Pipeline, parse_routes
from elasticdit_jax.interop import model_dir
from elasticdit_jax.ops import gating
from elasticdit_jax.train.importance import Sensitivity, kept_levels, measure_sensitivity

SECOND_NAMES = ("baseline", "vanilla-sparse", "layer-aware-sparse")


@dataclasses.dataclass(frozen=True)
class Study:
  """The sparse routes of one dense route.

  Attributes:
    base: the dense route.
    vanilla, aware: equally sparse in every layer; sparse where it costs least.
    target: average sparsity that was asked of `aware`.
    sensitivity: what `aware` was allocated by.
    kept: name of each of the three -> key blocks that every block that runs keeps.
    losses: name of each of the three -> validation loss; "even" is that of the blocks of `aware` spread evenly.
  """

  base: Route
  vanilla: Route
  aware: Route
  target: float
  sensitivity: Sensitivity
  kept: dict[str, tuple[int, ...]]
  losses: dict[str, float]

  def realised(self, name: str) -> float:
    """Share of key blocks dropped, mean over the blocks that run."""
    return 1 - sum(self.kept[name]) / (len(self.kept[name]) * self.sensitivity.num_blocks)


def study(validation: Validation, params: Any, base: Route, *, vanilla: float = 0.75, target: float = 0.8416) -> Study:
  """Measures `base` and makes its two sparse routes; one program, whatever the number of layers.

  Args:
    validation: the fixed inputs; its grid is what the counts of kept blocks are exact for.
    params: of the backbone.
    base: a dense route.
    vanilla: sparsity of every layer of the one.
    target: average sparsity of the other; the nearest reachable is taken.

  Raises:
    ValueError: for a base that is not dense, a share outside (0, 1), or a grid without a block to drop.
  """
  for field, value in (("vanilla", vanilla), ("target", target)):
    if not 0 < value < 1:
      raise ValueError(f"{field}: expected a share of dropped blocks between 0 and 1, got {value}")
  if any(base.sparsity):
    raise ValueError(f"routes: expected dense routes to start from, {base.name!r} is sparse")
  least, total, layers = 1 + validation.cfg.force_self, validation.num_blocks(base), len(base.active)
  if total <= least:
    raise ValueError(
      f"routes: {base.name!r} has {total} blocks of {validation.cfg.block_side}x{validation.cfg.block_side} tokens at"
      f" this resolution and keeps at least {least}: nothing to drop; take a route with more tokens"
    )
  measured = measure_sensitivity(validation, params, base, kept_levels(total, least))
  budget = elastic.kept_budget(layers, total, target, least)
  even = elastic.allocate_by_importance(budget, total, (0.0,) * layers, least)
  found = {
    "vanilla": (max(least, gating.num_kept(total, vanilla)),) * layers,
    "aware": elastic.allocate(budget, total, measured.curves, least),
  }
  routes = {name: elastic.sparse_route(base, kept, total) for name, kept in found.items()}
  if routes["aware"].name == routes["vanilla"].name and found["aware"] != found["vanilla"]:
    routes["aware"] = dataclasses.replace(routes["aware"], name=f"{routes['aware'].name}-aware")

  def loss(kept: Sequence[int]) -> float:
    shares = dict(zip(base.active, kept, strict=True))
    return validation.loss(params, base, kept=[shares.get(i, total) for i in range(base.depth)])

  kept = {base.name: (total,) * layers} | {routes[name].name: found[name] for name in found}
  losses = {base.name: measured.base} | {routes[name].name: loss(found[name]) for name in found} | {"even": loss(even)}
  return Study(base, routes["vanilla"], routes["aware"], target, measured, kept, losses)


def add_routes(routes: Mapping[str, Route], studies: Sequence[Study]) -> dict[str, Route]:
  """`routes` and the sparse ones; the names of Table 2 stand for those of the first study."""
  first = dict(zip(SECOND_NAMES, (studies[0].base, studies[0].vanilla, studies[0].aware), strict=True))
  return {**routes, **{r.name: r for s in studies for r in (s.vanilla, s.aware)}, **first}


def run(config: Any, workdir: str) -> None:
  """Writes WORKDIR/model, the same weights with more routes, and what was measured: sparsity.json and sparsity.md.

  Args:
    config: fields checkpoint ("" = the weights inside the package), routes (dense ones: "all", or names separated by
      commas), vanilla, target (see `study`), validation (number of held-out pictures) and data (as in training; size
      0 = the model's).
    workdir: is created.

  Raises:
    ValueError: in one line; nothing has been written then.
  """
  if os.path.exists(os.path.join(workdir, "config.json")):
    raise ValueError(
      f"workdir: {workdir} holds a training run, whose model would be replaced; choose another --workdir"
    )
  if config.validation < 1:
    raise ValueError(f"config.validation: expected at least 1, got {config.validation}")
  pipeline = Pipeline.load(config.checkpoint or None)
  bases = [pipeline.select(name) for name in parse_routes(config.routes, pipeline)]
  if config.routes == "all":
    bases = [base for base in bases if not any(base.sparsity)]
  validation, _ = held_out(config.data, pipeline, config.validation)
  params = pipeline.model.params
  studies = [study(validation, params, base, vanilla=config.vanilla, target=config.target) for base in bases]
  os.makedirs(workdir, exist_ok=True)
  model = dataclasses.replace(pipeline.model, routes=add_routes(pipeline.model.routes, studies))
  model_dir.save(os.path.join(workdir, "model"), model)
  for file, text in (
    ("sparsity.json", json.dumps([_plain(s) for s in studies], indent=1)),
    ("sparsity.md", _text(studies)),
  ):
    with open(os.path.join(workdir, file), "w", encoding="utf-8") as f:
      f.write(f"{text}\n")
  for line in (line for s in studies for line in _lines(s)):
    logging.info("%s", line)
  logging.info(
    "done: compare them with python -m elasticdit_jax.main --config=configs/evaluate.py --config.checkpoint=%s"
    " --config.routes=%s",
    workdir,
    ",".join(SECOND_NAMES),
  )


def _plain(s: Study) -> dict[str, Any]:
  return {
    "base": s.base.name,
    "vanilla": s.vanilla.name,
    "aware": s.aware.name,
    "target": s.target,
    "num_blocks": s.sensitivity.num_blocks,
    "blocks": s.base.active,
    "curves": s.sensitivity.curves,
    "routes": {n: {"kept": k, "realised": s.realised(n), "loss": s.losses[n]} for n, k in s.kept.items()},
    "loss_of_aware_spread_evenly": s.losses["even"],
  }


def _lines(s: Study) -> list[str]:
  lines = [
    f"{name}: keeps {' '.join(map(str, kept))} of {s.sensitivity.num_blocks} key blocks, realised sparsity"
    f" {100 * s.realised(name):.2f} %, validation loss {s.losses[name]:.4f}"
    for name, kept in s.kept.items()
  ]
  lines[-1] += f" ({s.losses['even']:.4f} with the same blocks spread evenly); asked for {100 * s.target:.2f} %"
  return lines


def _text(studies: Sequence[Study]) -> str:
  """sparsity.md."""
  sections = ["# Sparse routes"]
  for s in studies:
    levels = sorted(s.sensitivity.curves[0])
    rows = [["block", *(f"{level} kept" for level in levels), f"kept in {s.aware.name}"]]
    rows.append(["---:"] * len(rows[0]))
    for i, (block, curve) in enumerate(zip(s.base.active, s.sensitivity.curves, strict=True)):
      rises = (f"{curve[level] - s.sensitivity.base:+.4f}" for level in levels)
      rows.append([f"{block}", *rises, f"{s.kept[s.aware.name][i]}"])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    said = "Rise of the validation loss with one layer sparse and all others dense, by kept key blocks:"
    sections += [f"## {s.base.name}", "\n".join(f"- {line}" for line in _lines(s)), said, table]
  return "\n\n".join(sections)
