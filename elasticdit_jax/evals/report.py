"""The report of a run: report.json for programs, report.md for people, and pictures. Data in, files out.

report.json (numbers that do not exist are null):

    format, title, created        1, text, UTC time
    environment                   device, device_count, cores, load, jax, python, version
    routes.NAME.profile           the fields of evals.profile.Profile, or null
    routes.NAME.active_blocks     blocks that run
    routes.NAME.loss              validation flow-matching loss, mean over the time bins
    routes.NAME.loss_by_time      the same per bin, from the bin next to the data to the one next to noise
    routes.NAME.score             split -> {strict, partial, extra: {task: share, overall: mean}, prompts}, or null
    snapshots[]                   {step, label, routes: {NAME: {active_blocks, loss, loss_by_time, score}}}: the same
                                  numbers over the run; the last one is what `routes` holds
    importance                    {skipped, base, alone, order, curve} of the layer importance analysis, or null
    prompts, pictures             captions of the pictures; their files, relative to the report
    config                        of the run
    notes                         what to know before quoting a number
"""

import dataclasses
import datetime
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from elasticdit_jax import __version__
from elasticdit_jax.evals import pictures, report_text
from elasticdit_jax.evals.profile import Profile

FORMAT = 1
_CLOSE = 0.05  # strict score that flex-lite may lose to flex-max
Drawn = Mapping[str, np.ndarray]


def write(
  workdir: str | os.PathLike,
  *,
  title: str,
  snapshots: Sequence[Mapping[str, Any]],
  profiles: Mapping[str, Profile] | None = None,
  prompts: Sequence[str] = (),
  drawn: Mapping[str, Drawn] | None = None,
  config: Mapping[str, Any] | None = None,
  notes: Sequence[str] = (),
) -> dict[str, Any]:
  """Writes report.json, report.md, images/routes.png and, where there are several snapshots, images/uwco.png.

  Args:
    workdir: is created.
    title: heading of the report.
    snapshots: in the order of time, each {"step": int, "label": str, "routes": {name: {"active_blocks": int, "loss":
      float, "loss_by_time": [float], "score": see scene_eval.evaluate_routes}}}, everything in a route optional, and
      "importance" in the one that an importance analysis preceded.
    profiles: by route.
    prompts: captions of the pictures.
    drawn: label -> route -> uint8 [len(prompts), H, W, 3]; the last label is the final state.
    config: of the run, as JSON values.
    notes: sentences to add.

  Returns:
    What report.json holds.

  Raises:
    ValueError: where there is no snapshot, or pictures do not match the prompts.
  """
  if not snapshots:
    raise ValueError("report: expected at least one snapshot, got none")
  os.makedirs(os.path.join(workdir, "images"), exist_ok=True)
  report = plain(_assemble(title, snapshots, profiles or {}, prompts, config or {}))
  report["pictures"] = _draw(workdir, prompts, drawn or {})
  report["notes"] = [*notes, *_notes(report)]
  write_text(os.path.join(workdir, "report.json"), json.dumps(report, indent=1, allow_nan=False) + "\n")
  write_text(os.path.join(workdir, "report.md"), report_text.render(report))
  return report


def now() -> str:
  """UTC time, to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
  """Where the numbers of a report come from."""
  device = jax.devices()[0]
  name = device.device_kind
  return {
    "device": name if device.platform != "cpu" else f"CPU {platform.machine()}",
    "device_count": jax.device_count(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "load": os.getloadavg()[0],
    "jax": jax.__version__,
    "python": platform.python_version(),
    "version": __version__,
  }


def _assemble(title, snapshots, profiles, prompts, config) -> dict[str, Any]:
  final = snapshots[-1]["routes"]
  importance = [s["importance"] for s in snapshots if s.get("importance")]
  routes = {
    name: {
      "profile": dataclasses.asdict(profiles[name]) if name in profiles else None,
      **{key: final.get(name, {}).get(key) for key in ("active_blocks", "loss", "loss_by_time", "score")},
    }
    for name in dict.fromkeys([*final, *profiles])
  }
  return {
    "format": FORMAT,
    "title": title,
    "created": now(),
    "environment": environment(),
    "routes": routes,
    "snapshots": [{key: s[key] for key in ("step", "label", "routes")} for s in snapshots],
    "importance": importance[-1] if importance else None,
    "prompts": list(prompts),
    "config": dict(config),
  }


def _draw(workdir: str | os.PathLike, prompts: Sequence[str], drawn: Mapping[str, Drawn]) -> list[str]:
  """Writes the grids there is material for; returns their files."""
  grids = {}
  if drawn:
    final = list(drawn.values())[-1]
    grids["images/routes.png"] = final
    lite = [name for name in final if name.startswith("lite")]
    if lite and len(drawn) > 1:
      grids["images/uwco.png"] = _story(lite, drawn)
  for file, rows in grids.items():
    pictures.save_png(os.path.join(workdir, file), pictures.grid(prompts, rows), prompt="; ".join(prompts))
  return list(grids)


def _story(lite: Sequence[str], drawn: Mapping[str, Drawn]) -> Drawn:
  """Rows: each lite route over the labels, below it the final pictures of the max route with its VAE."""
  final_label, final = list(drawn.items())[-1]
  rows = {}
  for name in lite:
    rows |= {f"{name} {label}": images[name] for label, images in drawn.items() if name in images}
    full = _full(name)
    if full in final:
      rows[f"{full} {final_label}"] = final[full]
  return rows


def _full(lite: str) -> str:
  """The max route that a lite route is compared with."""
  return lite.replace("lite", "max", 1)


def _notes(report: Mapping[str, Any]) -> list[str]:
  notes = []
  scored = {name: r["score"] for name, r in report["routes"].items() if r["score"]}
  if scored:
    table = next(iter(next(iter(scored.values())).values()))
    notes.append(
      f"Scores: {table['prompts']} prompts per split, one picture each; ± is one standard error. The detector of the"
      " embedded scenes judges; it misreads a few pictures after a VAE, so the ceiling is below 100 %."
    )
    notes += _gaps(scored)
  else:
    notes.append("No scores: the detector reads the embedded scenes only.")
  profiles = [r["profile"] for r in report["routes"].values() if r["profile"]]
  if profiles:
    where = report["environment"]
    notes.append(
      f"Times: runs in turns, pictures at a time: {profiles[0]['batch']}, guidance and decoder included; load average"
      f" {where['load']:.1f} on {where['cores']} cores. On a busy machine only their ratios mean anything. Compiling is"
      " short where the compilation cache already held the program."
    )
    notes.append("FLOPs: 2 per multiply-accumulate, attention included.")
    if not any(p["realised_sparsity"] for p in profiles):
      notes.append("Every route here is dense: realised sparsity is 0.")
  return notes


def _gaps(scored: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """How far each lite route stays behind the max route of its VAE."""
  notes = []
  for name, table in scored.items():
    full = scored.get(_full(name))
    if not name.startswith("lite") or full is None:
      continue
    gaps = {split: full[split]["strict"]["overall"] - table[split]["strict"]["overall"] for split in table}
    said = ", ".join(f"{-100 * gap:+.1f} points ({split})" for split, gap in gaps.items())
    verdict = "within" if max(gaps.values()) <= _CLOSE else "MISSED: not within"
    notes.append(f"{name} against {_full(name)}: {said}; {verdict} {100 * _CLOSE:.0f} points.")
  return notes


def plain(value: Any) -> Any:
  """JSON values: arrays to lists, what is not finite to None."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, np.ndarray | jax.Array):
    return plain(value.tolist())
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, np.generic):
    return plain(value.item())
  return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: str, text: str) -> None:
  """Writes a file that nobody sees half of."""
  with open(f"{path}.partial", "w", encoding="utf-8") as f:
    f.write(text)
  os.replace(f"{path}.partial", path)
