"""Folders that the evaluators of four benchmarks read: which files, which prompt in each, what lies beside them.

  geneval       <root>/00000/metadata.jsonl, <root>/00000/samples/00000.png ... 00003.png
  hpsv2         <root>/<style>/00000.jpg                         one picture each; more: <root>/0/<style>/... and so on
  dpg           <root>/<name of the prompt's file>.png           four pictures as a 2 x 2 grid, nothing else in <root>
  t2i_compbench <root>/<category>/samples/<prompt>_000000.png    ten pictures each, numbered through the category

Read off the evaluators themselves: GenEval (github.com/djghosh13/geneval), HPSv2 (tgxs002/HPSv2), DPG-Bench
(TencentQQGYLab/ELLA), T2I-CompBench (Karine-Huang/T2I-CompBench). Prompts are the users' own copies of the originals.
"""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from elasticdit_jax.data import geneval_prompts, scene_prompts

STYLES = ("anime", "concept-art", "paintings", "photo")
CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
SCENES = "scenes"  # instead of a path: captions of the embedded world, to try a layout
_LONGEST = 255  # bytes of a file name


@dataclasses.dataclass(frozen=True)
class Row:
  """One prompt of a benchmark.

  Attributes:
    prompt: what the model reads.
    group: style or category, or "".
    name: of its file where prompts are files, or "".
    metadata: what the evaluator wants to know.
    where: "file:line", for messages.
  """

  prompt: str
  group: str = ""
  name: str = ""
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  where: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
  """One file with pictures.

  Attributes:
    file: its path below the root.
    prompt: of all its pictures.
    numbers: one for each of its pictures, side by side in rows of two where there are four. Together with the prompt a
      number decides the noise.
    beside: path below the root -> text of a file that must be there before this one.
  """

  file: str
  prompt: str
  numbers: tuple[int, ...]
  beside: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """How one benchmark is sampled.

  Attributes:
    count: pictures per prompt that its authors ask for.
    counts: numbers of pictures per prompt it can take; () for any.
    read: path -> prompts.
    prompts: what that path is, for messages and documentation.
    official: number of prompts.
    command: what evaluates a finished root; {root}, {size} and {results} are filled in.
  """

  count: int
  counts: tuple[int, ...]
  read: Callable[[str], list[Row]]
  prompts: str
  official: int
  command: str


def noise_number(prompt: str, number: int) -> int:
  """Number of the noise of one picture, 31 bits: a function of the prompt and the picture's number alone."""
  digest = hashlib.blake2b(f"{number}\n{prompt}".encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little") >> 1


def rows(name: str, path: str) -> list[Row]:
  """Prompts of a benchmark.

  Args:
    name: one of BENCHMARKS.
    path: of the prompts, see Benchmark.prompts; SCENES for captions of the embedded world.

  Raises:
    ValueError: in one line, naming the file and line that is empty, given twice (GenEval) or cannot be a prompt.
  """
  benchmark = BENCHMARKS[name]
  if path == SCENES:
    return _scenes(name)
  if not path or not os.path.exists(path):
    raise ValueError(
      f"config.prompts: expected {benchmark.prompts}, got {path!r}; the evaluator's repository has it"
      f" ({SCENES!r} tries the layout with captions of the embedded world)"
    )
  found = benchmark.read(path)
  if not found:
    raise ValueError(f"config.prompts: {path} holds no prompts, expected {benchmark.prompts}")
  again = {}
  for row in found:
    if row.prompt in again and name == "geneval":
      raise ValueError(f"config.prompts: {row.where}: the prompt of {again[row.prompt]} again; remove one")
    if row.prompt in again:
      logging.warning("%s: the prompt of %s again; its pictures get noise of their own", row.where, again[row.prompt])
    again.setdefault(row.prompt, row.where)
  if len(found) != benchmark.official:
    logging.warning("%s: %d prompts; the published benchmark has %d", path, len(found), benchmark.official)
  return found


def cells(name: str, found: Sequence[Row], count: int) -> list[Cell]:
  """The files of a benchmark, in a fixed order.

  Args:
    name: one of BENCHMARKS.
    found: its prompts.
    count: pictures per prompt.

  Raises:
    ValueError: a number of pictures that the evaluator does not read.
  """
  allowed = BENCHMARKS[name].counts
  if count < 1 or (allowed and count not in allowed):
    expected = f"one of {', '.join(map(str, allowed))}" if allowed else "at least 1"
    raise ValueError(f"config.count: {name}: expected {expected} pictures per prompt, got {count}")
  seen, place, made = collections.Counter(), collections.Counter(), []
  for row in found:
    numbers = tuple(range(seen[row.prompt] * count, (seen[row.prompt] + 1) * count))
    made += _LAYOUTS[name](row, place[row.group], numbers)
    seen[row.prompt] += 1
    place[row.group] += 1
  return made


def roots(name: str, root: str, count: int) -> list[str]:
  """The folders that the evaluator gets, one after the other."""
  return [f"{root}/{k}" for k in range(count)] if name == "hpsv2" and count > 1 else [root]


def _geneval_cells(row: Row, index: int, numbers: tuple[int, ...]) -> list[Cell]:
  beside = {f"{index:05d}/metadata.jsonl": json.dumps(row.metadata)}
  return [Cell(f"{index:05d}/samples/{k:05d}.png", row.prompt, (n,), beside) for k, n in enumerate(numbers)]


def _hpsv2_cells(row: Row, index: int, numbers: tuple[int, ...]) -> list[Cell]:
  file = f"{row.group}/{index:05d}.jpg"
  if len(numbers) == 1:
    return [Cell(file, row.prompt, numbers)]
  return [Cell(f"{k}/{file}", row.prompt, (n,)) for k, n in enumerate(numbers)]


def _dpg_cells(row: Row, index: int, numbers: tuple[int, ...]) -> list[Cell]:
  del index
  return [Cell(f"{row.name}.png", row.prompt, numbers)]


def _t2i_cells(row: Row, index: int, numbers: tuple[int, ...]) -> list[Cell]:
  start, folder = index * len(numbers), f"{row.group}/samples"
  return [Cell(f"{folder}/{row.prompt}_{start + k:06d}.png", row.prompt, (n,)) for k, n in enumerate(numbers)]


def _read_geneval(path: str) -> list[Row]:
  found = geneval_prompts.read(path)
  return [Row(row["prompt"], metadata=row, where=f"{path}:{number}") for number, row in enumerate(found, start=1)]


def _read_hpsv2(path: str) -> list[Row]:
  names = sorted(name for name in os.listdir(path) if name.endswith(".json"))
  official = [f"{style}.json" for style in STYLES]
  found = []
  for name in official if set(official) <= set(names) else names:
    file = os.path.join(path, name)
    with open(file, encoding="utf-8") as f:
      try:
        texts = json.load(f)
      except ValueError as e:
        raise ValueError(f"config.prompts: {file} is no JSON ({e}); copy it again") from e
    if not isinstance(texts, list):
      raise ValueError(f"config.prompts: {file}: expected a list of prompts, got {texts!r:.80}")
    style = name.removesuffix(".json")
    found += [_row(text, f"{file}, entry {i}", group=style) for i, text in enumerate(texts)]
  return found


def _read_dpg(path: str) -> list[Row]:
  found = []
  for name in sorted(name for name in os.listdir(path) if name.endswith(".txt")):
    file, stem = os.path.join(path, name), name.removesuffix(".txt")
    if "." in stem:
      raise ValueError(f"config.prompts: {file}: the evaluator cuts names at the first dot; rename the file")
    with open(file, encoding="utf-8") as f:
      found.append(_row(" ".join(f.read().split()), file, name=stem))
  return found


def _read_t2i(path: str) -> list[Row]:
  found = []
  for category in CATEGORIES:
    file = os.path.join(path, f"{category}_val.txt")
    if not os.path.isfile(file):
      continue
    with open(file, encoding="utf-8") as f:
      lines = f.read().splitlines()
    for number, line in enumerate(lines, start=1):
      row = _row(line.split("\t")[0], f"{file}:{number}", group=category)
      # The prompt is part of the picture's name, from which the evaluator takes it up to the first "_".
      if "_" in row.prompt or "/" in row.prompt or len(f"{row.prompt}_000000.png".encode()) > _LONGEST:
        raise ValueError(
          f"config.prompts: {row.where}: a prompt is part of a file name there: expected no '_', no '/' and at most"
          f" {_LONGEST} bytes, got {row.prompt!r:.80}"
        )
      found.append(row)
  return found


def _row(text: Any, where: str, **fields: str) -> Row:
  if not isinstance(text, str) or not text.strip():
    raise ValueError(f"config.prompts: {where}: expected a prompt, got {text!r:.80}; remove it")
  return Row(text, where=where, **fields)


def _scenes(name: str) -> list[Row]:
  """Twelve captions of the embedded world, with metadata as GenEval has it."""
  found = []
  for index, prompt in enumerate(scene_prompts.eval_prompts(2, "seen")):
    spec = scene_prompts.parse(prompt.caption)
    group = {"hpsv2": STYLES[index % len(STYLES)], "t2i_compbench": CATEGORIES[index % len(CATEGORIES)]}.get(name, "")
    metadata = {"tag": spec.task, "include": _include(spec), "prompt": spec.caption}
    found.append(Row(spec.caption, group, f"scene{index:02d}", metadata, f"scenes, caption {index}"))
  return found


def _include(spec: scene_prompts.Spec) -> list[dict[str, Any]]:
  counts = collections.Counter((o.shape, o.color) for o in spec.objects)
  found = [{"class": s, "count": n} | ({"color": c} if c else {}) for (s, c), n in counts.items()]
  if spec.relation:
    return [found[1], found[0] | {"position": [spec.relation, 0]}]
  return found


_LAYOUTS = {"geneval": _geneval_cells, "hpsv2": _hpsv2_cells, "dpg": _dpg_cells, "t2i_compbench": _t2i_cells}
BENCHMARKS = {
  "geneval": Benchmark(
    count=4,
    counts=(),
    read=_read_geneval,
    prompts="the file evaluation_metadata.jsonl",
    official=553,
    command="python evaluation/evaluate_images.py {root} --outfile {results}/geneval.jsonl --model-path DETECTOR",
  ),
  "hpsv2": Benchmark(
    count=1,
    counts=(),
    read=_read_hpsv2,
    prompts="the directory with anime.json, concept-art.json, paintings.json and photo.json",
    official=3200,
    command="python -c \"import hpsv2; hpsv2.evaluate('{root}', hps_version='v2.1')\" | tee -a {results}/hpsv2.txt",
  ),
  "dpg": Benchmark(
    count=4,
    counts=(1, 4),
    read=_read_dpg,
    prompts="the directory dpg_bench/prompts of text files",
    official=1065,
    command=(
      "accelerate launch dpg_bench/compute_dpg_bench.py --image-root-path {root} --resolution {size} --pic-num {count}"
      " --vqa-model mplug --res-path {results}/dpg.txt"
    ),
  ),
  "t2i_compbench": Benchmark(
    count=10,
    counts=(),
    read=_read_t2i,
    prompts="the directory examples/dataset with color_val.txt and its like",
    official=2400,
    command="the evaluators of T2I-CompBench on {root}/CATEGORY, which keep their results there",
  ),
}
