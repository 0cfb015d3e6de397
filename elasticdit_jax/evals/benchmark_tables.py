"""Results of the official evaluators, read from their own files, as the tables of the ElasticDiT paper.

    WORKDIR/results/<route>/geneval.jsonl      written by evaluate_images.py
    WORKDIR/results/<route>/hpsv2.txt          what hpsv2.evaluate prints
    WORKDIR/results/<route>/dpg.txt            written by compute_dpg_bench.py
    WORKDIR/results/<route>/hps_v2.json        and its like, written by evals.benchmark_scores
    WORKDIR/<route>/<category>/...             written by the evaluators of T2I-CompBench

Table 1 of the paper has HPSv2.1 and GenEval side by side, Table 2 also the sparsity. Overall of GenEval is the mean of
the six tasks, not of the pictures.
"""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from elasticdit_jax.evals import layouts, preference

# Columns of the paper -> names in the evaluators' files.
_HPS = {"Photo": "photo", "Animation": "anime", "Concept": "concept-art", "Paint": "paintings"}
_GENEVAL = {
  "two_obj": "two_object",
  "position": "position",
  "single_obj": "single_object",
  "counting": "counting",
  "color_attr": "color_attr",
  "colors": "colors",
}
_T2I_FILES = {
  "color": ("annotation_blip",),
  "shape": ("annotation_blip",),
  "texture": ("annotation_blip",),
  "spatial": ("labels/annotation_obj_detection_2d", "labels/annotation_obj_detection"),
  "3d_spatial": ("labels/annotation_obj_detection_3d",),
  "numeracy": ("annotation_num",),
  "non_spatial": ("annotation_clip",),
  "complex": ("annotation_3_in_1",),
}
_NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?|nan)"
_NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class Result:
  """One line of the tables.

  Attributes:
    model: name of the route, with its run where several have it.
    size: of the pictures in pixels.
    sparsity: mean over the layers that run, in [0, 1).
    hpsv2: style -> score x 100, and "average".
    geneval: task -> share of right pictures, and "overall".
    dpg: category -> score in percent, and "overall".
    t2i_compbench: category -> score in [0, 1].
    preference: "benchmark kind" -> mean score, computed here.
  """

  model: str
  size: int
  sparsity: float
  hpsv2: Mapping[str, float] = dataclasses.field(default_factory=dict)
  geneval: Mapping[str, float] = dataclasses.field(default_factory=dict)
  dpg: Mapping[str, float] = dataclasses.field(default_factory=dict)
  t2i_compbench: Mapping[str, float] = dataclasses.field(default_factory=dict)
  preference: Mapping[str, float] = dataclasses.field(default_factory=dict)


def read_geneval(path: str | os.PathLike) -> dict[str, float]:
  """Share of right pictures of each task, and "overall", the mean of the tasks, of evaluate_images.py's outfile.

  Raises:
    ValueError: a line is no record of the evaluator, or there are none.
  """
  right = collections.defaultdict(list)
  with open(path, encoding="utf-8") as f:
    for number, line in enumerate(f, start=1):
      try:
        record = json.loads(line)
        right[str(record["tag"])].append({True: 1.0, False: 0.0}[record["correct"]])
      except (KeyError, TypeError, ValueError) as e:
        raise ValueError(
          f"{os.fspath(path)}:{number}: expected a record of evaluate_images.py with 'tag', 'correct', got {line!r:.80}"
        ) from e
  if not right:
    raise ValueError(f"{os.fspath(path)}: holds no records; evaluate the pictures again")
  scores = {tag: float(np.mean(values)) for tag, values in right.items()}
  return scores | {"overall": float(np.mean(list(scores.values())))}


def read_hpsv2(path: str | os.PathLike) -> dict[str, float]:
  """Score of each style and their "average", x 100, of what hpsv2.evaluate prints; lines of several roots are averaged.

  Versions print 0.3302, 33.02 or (a slip of one of them) 3302.00 for the same score.

  Raises:
    ValueError: no line has the form that the evaluator prints.
  """
  found = collections.defaultdict(list)
  with open(path, encoding="utf-8") as f:
    for line in f:
      match = re.fullmatch(rf"\S+\s+(\S+)\s+{_NUMBER}\s+{_NUMBER}\s*", line)
      if match:
        found[match[1]].append(float(match[2]))
  if not found:
    raise ValueError(f"{os.fspath(path)}: expected lines of hpsv2.evaluate like 'root  photo  31.78  0.11', found none")
  scores = {style: _percent(float(np.mean(values))) for style, values in found.items()}
  return scores | {"average": float(np.mean(list(scores.values())))}


def _percent(score: float) -> float:
  """x 100 where the score is a cosine, / 100 where it was multiplied twice."""
  return score * 100 if score < 1 else score / 100 if score > 100 else score


def read_dpg(path: str | os.PathLike) -> dict[str, float]:
  """Scores of the broad categories and "overall", percent, of compute_dpg_bench.py's results.

  Raises:
    ValueError: the line of the overall score is missing: the evaluation did not end.
  """
  with open(path, encoding="utf-8") as f:
    text = f.read()
  overall = re.findall(rf"^DPG-Bench score: {_NUMBER}\s*$", text, re.MULTILINE)
  if not overall:
    raise ValueError(f"{os.fspath(path)}: no line 'DPG-Bench score: ...'; the evaluation has not ended")
  broad = text.rpartition("L1 category scores:")[2].partition("L2 category scores:")[0]
  scores = {name: float(value) for name, value in re.findall(rf"^\t(.+?): {_NUMBER}\s*$", broad, re.MULTILINE)}
  return scores | {"overall": float(overall[-1])}


def read_t2i_compbench(root: str | os.PathLike) -> dict[str, float]:
  """Mean score of every category below `root` whose evaluator has run; {} where none has.

  Raises:
    ValueError: a result file is no list of answers.
  """
  scores = {}
  for category, places in _T2I_FILES.items():
    files = [os.path.join(root, category, place, "vqa_result.json") for place in places]
    path = next(filter(os.path.isfile, files), None)
    if path is None:
      continue
    try:
      with open(path, encoding="utf-8") as f:
        answers = [float(row["answer"]) for row in json.load(f)]
      scores[category] = float(np.mean(answers or [float("nan")]))
    except (KeyError, TypeError, ValueError) as e:
      raise ValueError(f"{path}: expected a list of objects with 'answer' ({type(e).__name__}: {e})") from e
  return scores


def collect(workdirs: Sequence[str | os.PathLike]) -> list[Result]:
  """Reads every result below some workdirs; those of one route, size and set of weights become one line.

  Raises:
    ValueError: a directory holds no benchmark, or a result file is not what its evaluator writes.
  """
  merged: dict[tuple, dict[str, Any]] = {}
  for workdir in workdirs:
    path = os.path.join(workdir, "benchmark.json")
    if not os.path.isfile(path):
      raise ValueError(f"config.runs: no {path}; expected workdirs of benchmarks, separated by commas")
    with open(path) as f:
      described = json.load(f)
    for route, facts in described["routes"].items():
      key = (described["weights"], route, described["settings"]["size"])
      line = merged.setdefault(key, {"sparsity": facts["sparsity"]})
      line |= _results(os.fspath(workdir), route)
      line["preference"] = line.get("preference", {}) | _preferences(os.fspath(workdir), route, described["benchmark"])
  models = [route for _, route, _ in merged]
  return [
    Result(route if models.count(route) == 1 else f"{route} ({key[:6]})", size, **line)
    for (key, route, size), line in merged.items()
  ]


def _results(workdir: str, route: str) -> dict[str, dict[str, float]]:
  readers = {
    "geneval": (read_geneval, "geneval.jsonl"),
    "hpsv2": (read_hpsv2, "hpsv2.txt"),
    "dpg": (read_dpg, "dpg.txt"),
  }
  found = {}
  for name, (read, file) in readers.items():
    path = os.path.join(workdir, "results", route, file)
    if os.path.isfile(path):
      found[name] = read(path)
  scores = read_t2i_compbench(os.path.join(workdir, route))
  return found | ({"t2i_compbench": scores} if scores else {})


def _preferences(workdir: str, route: str, benchmark: str) -> dict[str, float]:
  """Means that evals.benchmark_scores wrote; on HPSv2's own prompts also the styles."""
  found = {}
  for kind in preference.KINDS:
    path = os.path.join(workdir, "results", route, f"{kind}.json")
    if os.path.isfile(path):
      with open(path) as f:
        scores = json.load(f)
      if benchmark == "hpsv2":
        found |= {f"{benchmark} {kind} {style}": value for style, value in scores["folders"].items()}
      found[f"{benchmark} {kind}"] = scores["mean"]
  return found


def text(results: Sequence[Result]) -> str:
  """Markdown: HPSv2 and GenEval as in Tables 1 and 2 of the paper, then the others where there are results."""
  parts = []
  if any(r.hpsv2 or r.geneval for r in results):
    head = ["Model", "Sparsity", "Res.", *(f"HPSv2.1 {c}" for c in _HPS), "HPSv2.1 Averaged"]
    head += [*(f"GenEval {c}" for c in _GENEVAL), "GenEval Overall"]
    lines = [[*_about(r), *_hps_columns(r), *_geneval_columns(r)] for r in results]
    parts.append(_table(head, lines))
  broad = list(dict.fromkeys(name for r in results for name in r.dpg if name != "overall"))
  if any(r.dpg for r in results):
    head = ["Model", "Sparsity", "Res.", *(f"DPG-Bench {c}" for c in broad), "DPG-Bench Overall"]
    lines = [[*_about(r), *(_cell(r.dpg.get(c), "{:.2f}") for c in [*broad, "overall"])] for r in results]
    parts.append(_table(head, lines))
  if any(r.t2i_compbench for r in results):
    head = ["Model", "Sparsity", "Res.", *(f"T2I-CompBench {c}" for c in layouts.CATEGORIES)]
    columns = [[_cell(r.t2i_compbench.get(c), "{:.4f}") for c in layouts.CATEGORIES] for r in results]
    parts.append(_table(head, [[*_about(r), *c] for r, c in zip(results, columns, strict=True)]))
  kinds = list(dict.fromkeys(name for r in results for name in r.preference))
  if kinds:
    lines = [[*_about(r), *(_cell(r.preference.get(kind), "{:.4f}") for kind in kinds)] for r in results]
    parts.append("Computed here, not by the original code:\n\n" + _table(["Model", "Sparsity", "Res.", *kinds], lines))
  return "\n".join(parts)


def _about(result: Result) -> list[str]:
  return [result.model, f"{100 * result.sparsity:.2f}%", str(result.size)]


def _hps_columns(result: Result) -> list[str]:
  scores = result.hpsv2
  return [_cell(scores.get(name), "{:.2f}") for name in [*_HPS.values(), "average"]]


def _geneval_columns(result: Result) -> list[str]:
  return [_cell(result.geneval.get(name), "{:.2%}") for name in [*_GENEVAL.values(), "overall"]]


def _cell(value: float | None, form: str) -> str:
  return _NOTHING if value is None else form.format(value)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  rows = [head, ["---"] * len(head), *lines]
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(workdir: str | os.PathLike, runs: Sequence[str | os.PathLike]) -> bool:
  """Writes WORKDIR/tables.md and tables.json where at least one result is there; returns whether it did.

  Raises:
    ValueError: see `collect`.
  """
  results = [r for r in collect(runs) if r.hpsv2 or r.geneval or r.dpg or r.t2i_compbench or r.preference]
  if not results:
    logging.info("no results of evaluators yet; give the same command again when they are there")
    return False
  os.makedirs(workdir, exist_ok=True)
  with open(os.path.join(workdir, "tables.md"), "w", encoding="utf-8") as f:
    f.write(text(results))
  with open(os.path.join(workdir, "tables.json"), "w", encoding="utf-8") as f:
    json.dump([dataclasses.asdict(r) for r in results], f, indent=1)
  logging.info("tables of %d models: %s", len(results), os.path.join(workdir, "tables.md"))
  return True


def run(config: Any, workdir: str) -> None:
  """Task `evaluate` with runs: one table of several benchmarks.

  Args:
    config: field runs, workdirs of benchmarks separated by commas.
    workdir: is created.

  Raises:
    ValueError: a run holds no benchmark, or none has results.
  """
  runs = [path.strip() for path in config.runs.split(",") if path.strip()]
  if not runs:
    raise ValueError("config.runs: expected workdirs of benchmarks, separated by commas, got none")
  if not write(workdir, runs):
    raise ValueError(f"config.runs: no results of evaluators in {', '.join(runs)}; evaluate the pictures first")
