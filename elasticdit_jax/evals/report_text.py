"""The Markdown of a report, from what report.json holds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NONE = "–"


def render(report: Mapping[str, Any]) -> str:
  """report.md; see evals.report for the fields. Sections without numbers are left out."""
  where = report["environment"]
  sections = [
    f"# {report['title']}",
    f"{report['created']} · {where['device_count']} x {where['device']}, {where['cores']} cores,"
    f" load {where['load']:.1f} · jax {where['jax']}, Python {where['python']}, elasticdit_jax {where['version']}",
    *_picture(report, "images/routes.png", "The same prompts and the same noise along every route"),
    *_routes(report["routes"]),
    *_scores(report["routes"]),
    *_losses(report["routes"]),
    *_curve(report["snapshots"]),
    *_picture(report, "images/uwco.png", "The lite routes over the phases, and flex-max at the end"),
    *_importance(report["importance"]),
    *_listed("Notes", [f"- {note}" for note in report["notes"]]),
    *_listed("Config", ["```", *_leaves(report["config"]), "```"] if report["config"] else []),
  ]
  return "\n\n".join(sections) + "\n"


def standard_error(table: Mapping[str, Any]) -> float:
  """Standard error of the overall strict score of one split (scene_eval): independent prompts, tasks of equal size."""
  shares = [share for task, share in table["strict"].items() if task != "overall"]
  per_task = table["prompts"] / len(shares)
  return math.sqrt(sum(p * (1 - p) / per_task for p in shares)) / len(shares)


def _listed(title: str, lines: Sequence[str]) -> list[str]:
  return [f"## {title}", "\n".join(lines)] if lines else []


def _picture(report: Mapping[str, Any], file: str, caption: str) -> list[str]:
  return [f"![{caption}]({file})", f"*{caption}.*"] if file in report["pictures"] else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table; columns but the first are set to the right."""
  lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, pattern: str = "{:.4f}") -> str:
  return _NONE if value is None else pattern.format(value)


def _percent(value: float | None) -> str:
  return _NONE if value is None else f"{100 * value:.1f}"


def _routes(routes: Mapping[str, Any]) -> list[str]:
  splits = _splits(routes)
  head = ["route", "blocks", "active parameters", "tokens", "realised sparsity", "GFLOPs / step", "GFLOPs / image"]
  head += ["ms / step", "ms / image", "compile s", "loss", *(f"strict {split} %" for split in splits)]
  rows = []
  for name, route in routes.items():
    profile, score = route["profile"], route["score"]
    costs = [_number(route["active_blocks"], "{}"), *[_NONE] * 8]
    if profile:
      costs = [
        f"{profile['active_blocks']}",
        f"{profile['active_parameters'] / 1e6:.2f} M",
        f"{profile['tokens']}",
        f"{100 * profile['realised_sparsity']:.1f} %",
        f"{profile['flops_per_step'] / 1e9:.3g}",
        f"{profile['flops_per_image'] / 1e9:.3g}",
        _number(profile["ms_per_step"], "{:.3g}"),
        f"{profile['ms_per_image']:.3g}",
        f"{profile['compile_s']:.1f}",
      ]
    overall = [_overall(score[split]) if score else _NONE for split in splits]
    rows.append([name, *costs, _number(route["loss"]), *overall])
  return ["## Routes", table(head, rows), *_kept(routes)]


def _kept(routes: Mapping[str, Any]) -> list[str]:
  """Kept key blocks of the sparse routes."""
  profiles = {name: route["profile"] for name, route in routes.items() if route["profile"]}
  rows = [
    [name, f"{profile['num_blocks']}", " ".join(map(str, profile["kept"]))]
    for name, profile in profiles.items()
    if profile["realised_sparsity"]
  ]
  head = ["sparse route", "key blocks", "kept by each block that runs"]
  return [table(head, rows)] if rows else []


def _splits(routes: Mapping[str, Any]) -> list[str]:
  return list(dict.fromkeys(split for route in routes.values() for split in route.get("score") or ()))


def _overall(table: Mapping[str, Any]) -> str:
  return f"{_percent(table['strict']['overall'])} ± {100 * standard_error(table):.1f}"


def _scores(routes: Mapping[str, Any]) -> list[str]:
  sections = []
  for split in _splits(routes):
    tables = {name: route["score"][split] for name, route in routes.items() if route["score"]}
    tasks = [task for task in next(iter(tables.values()))["strict"] if task != "overall"]
    rows = [
      [
        name,
        *(_percent(table["strict"][task]) for task in tasks),
        _overall(table),
        _percent(table["partial"]["overall"]),
        _percent(table["extra"]["overall"]),
      ]
      for name, table in tables.items()
    ]
    head = ["route", *tasks, "overall", "partial", "pictures with extra objects"]
    kind = {"seen": "combinations of training", "unseen": "combinations held out from training"}.get(split, "")
    sections += [f"## Strict scores, {split}: {kind} (%)", table(head, rows)]
  return sections


def _losses(routes: Mapping[str, Any]) -> list[str]:
  measured = {name: route for name, route in routes.items() if route["loss_by_time"]}
  if not measured:
    return []
  bins = len(next(iter(measured.values()))["loss_by_time"])
  head = ["route", *(f"t {(i + 0.5) / bins:.2f}" for i in range(bins)), "mean"]
  rows = [[name, *map(_number, route["loss_by_time"]), _number(route["loss"])] for name, route in measured.items()]
  said = "Latents differ between f8 and f16, and so do their losses: compare routes of one VAE. t = 1 is noise."
  return ["## Validation flow-matching loss by time", table(head, rows), said]


def _curve(snapshots: Sequence[Mapping[str, Any]]) -> list[str]:
  """Every route's score and loss over the phases."""
  if len(snapshots) < 2:
    return []
  names = list(dict.fromkeys(name for s in snapshots for name in s["routes"]))
  sections = ["## The curve: every route over the phases"]
  splits = list(dict.fromkeys(split for s in snapshots for split in _splits(s["routes"])))
  tables = {f"Strict score, {split} (%)": ("score", split) for split in splits} | {"Validation loss": ("loss", "")}
  for title, (field, split) in tables.items():
    rows = [
      [s["label"], f"{s['step']}", *(_at(s["routes"].get(name, {}), field, split) for name in names)] for s in snapshots
    ]
    sections += [f"**{title}**", table(["", "step", *names], rows)]
  return sections


def _at(route: Mapping[str, Any], field: str, split: str) -> str:
  if field == "loss":
    return _number(route.get("loss"))
  return _percent(route["score"][split]["strict"]["overall"]) if route.get("score") else _NONE


def _importance(importance: Mapping[str, Any] | None) -> list[str]:
  if not importance:
    return []
  order = list(importance["order"])
  rows = []
  for block, rise in enumerate(importance["alone"]):
    place = order.index(block) if block in order else None
    rows.append(
      [
        f"{block}",
        "protected" if rise is None else f"{rise:+.4f}",
        _NONE if place is None else f"{place + 1}",
        _NONE if place is None else _number(importance["curve"][place]),
      ]
    )
  said = f"Validation loss of the full backbone {importance['base']:.4f}; flex-lite leaves out {importance['skipped']}."
  head = ["block", "loss rise when skipped alone", "taken as number", "loss then"]
  return ["## Layer importance", said, table(head, rows)]


def _leaves(node: Any, name: str = "config") -> list[str]:
  if isinstance(node, Mapping) and node:
    return [line for key, child in node.items() for line in _leaves(child, f"{name}.{key}")]
  return [f"{name} = {node!r}"]
