"""Prompts of GenEval's grammar (Ghosh et al. 2023, arXiv 2310.11513) that its test file does not have.

  rows = generate(500, seed=1, held_out=read("evaluation_metadata.jsonl"))
  save("prompts.jsonl", rows)                  # --config.prompts.file=prompts.jsonl of alignment reads it

Held out is what a picture would show, not the sentence: "an apple and a dog" also holds out "a dog and an apple", and
"a cup left of a book" every sentence that puts those two side by side. A filter by sentence alone lets them through.
"""

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}
# The 80 classes of COCO in its order, three of them under the clearer names that GenEval gives them.
CLASSES = tuple(
  """
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,
skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,
wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,
chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,
cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush
""".replace("\n", "").split(",")
)
_COLORED = CLASSES[1:]  # the evaluator does not judge the colour of persons
Row = dict[str, Any]


def _article(name: str) -> str:
  return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _plural(name: str) -> str:
  return f"{name}es" if name.endswith("s") else f"{name}s"


def _pair(number: int, names: Sequence[str]) -> tuple[str, str]:
  """Ordered pair of different names, by number."""
  first, second = divmod(number, len(names) - 1)
  return names[first], names[second + (second >= first)]


def _single(number: int) -> Row:
  name = CLASSES[number]
  return _row("single_object", [{"class": name, "count": 1}], _article(name))


def _two(number: int) -> Row:
  names = _pair(number, CLASSES)
  return _row("two_object", [{"class": name, "count": 1} for name in names], " and ".join(map(_article, names)))


def _counting(number: int) -> Row:
  which, kind = divmod(number, len(CLASSES))
  count, name = list(COUNTS)[which], CLASSES[kind]
  row = _row("counting", [{"class": name, "count": count}], f"{COUNTS[count]} {_plural(name)}")
  # In the place where the original writes it.
  return {"tag": row["tag"], "include": row["include"], "exclude": [{"class": name, "count": count + 1}]} | row


def _colors(number: int) -> Row:
  which, kind = divmod(number, len(_COLORED))
  color, name = COLORS[which], _COLORED[kind]
  return _row("colors", [{"class": name, "count": 1, "color": color}], f"{_article(color)} {name}")


def _position(number: int) -> Row:
  which, pair = divmod(number, len(CLASSES) * (len(CLASSES) - 1))
  relation, (subject, reference) = RELATIONS[which], _pair(pair, CLASSES)
  include = [{"class": reference, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]}]
  return _row("position", include, f"{_article(subject)} {relation} {_article(reference)}")


def _color_attr(number: int) -> Row:
  which, pair = divmod(number, len(_COLORED) * (len(_COLORED) - 1))
  names, colors = _pair(pair, _COLORED), _pair(which, COLORS)
  include = [{"class": name, "count": 1, "color": color} for name, color in zip(names, colors, strict=True)]
  return _row("color_attr", include, " and ".join(f"{_article(c)} {n}" for n, c in zip(names, colors, strict=True)))


def _row(tag: str, include: list[dict[str, Any]], what: str) -> Row:
  return {"tag": tag, "include": include, "prompt": f"a photo of {what}"}


_GRAMMAR: dict[str, tuple[int, Callable[[int], Row]]] = {
  "single_object": (80, _single),
  "two_object": (80 * 79, _two),
  "counting": (3 * 80, _counting),
  "colors": (10 * 79, _colors),
  "position": (4 * 80 * 79, _position),
  "color_attr": (10 * 9 * 79 * 78, _color_attr),
}


def content(row: Mapping[str, Any]) -> Hashable:
  """What a prompt asks for, the order of its words aside; for positions the two objects and the axis.

  Raises:
    ValueError: the row has not the fields of GenEval's metadata.
  """
  try:
    objects = frozenset((o["class"], o.get("count", 1), o.get("color", "")) for o in row["include"])
    relations = {o["position"][0] for o in row["include"] if "position" in o}
  except (AttributeError, KeyError, TypeError) as e:
    raise ValueError(f"GenEval metadata: expected a list 'include' of objects with 'class', got {row!r:.120}") from e
  axis = "".join("sideways" if r in RELATIONS[:2] else "upright" for r in relations)
  return row["tag"], objects, axis


def generate(per_task: int, seed: int, held_out: Iterable[Mapping[str, Any]] = ()) -> list[Row]:
  """Different prompts, up to `per_task` of each task; fewer where the grammar has no more (240 of counting, say).

  Args:
    per_task: at least 1.
    seed: 0 or more.
    held_out: metadata rows, as in evaluation_metadata.jsonl, whose content no prompt may have.

  Returns:
    Rows of GenEval's metadata in the order of TAGS: "tag", "include", "prompt", for counting also "exclude". A task
    that is wholly held out, as the original test file does with single_object, has none.

  Raises:
    ValueError: an argument out of range, or held-out rows without the fields of metadata.
  """
  if per_task < 1:
    raise ValueError(f"per_task: expected at least 1, got {per_task}")
  if seed < 0:
    raise ValueError(f"seed: expected 0 or more, got {seed}")
  barred = {content(row) for row in held_out}
  rows = []
  for number, (size, make) in enumerate(_GRAMMAR.values()):
    rng, found = np.random.default_rng([seed, number]), 0
    for index in rng.permutation(size):
      row = make(int(index))
      if content(row) not in barred:
        rows.append(row)
        found += 1
        if found == per_task:
          break
  return rows


def read(path: str | os.PathLike) -> list[Row]:
  """Metadata rows of a file of JSON lines.

  Raises:
    ValueError: naming the line that is empty or no JSON object with a prompt and objects.
  """
  rows = []
  with open(path, encoding="utf-8") as f:
    for number, line in enumerate(f.read().splitlines(), start=1):
      where = f"prompts: {os.fspath(path)}:{number}"
      try:
        row = json.loads(line)
      except ValueError:
        raise ValueError(f"{where}: expected a JSON object, got {line!r:.80}; remove the line") from None
      if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f"{where}: expected an object with a field 'prompt', got {line!r:.80}")
      if not isinstance(row.get("tag"), str):
        raise ValueError(f"{where}: expected a field 'tag' like one of {', '.join(TAGS)}, got {line!r:.80}")
      try:
        content(row)
      except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
      rows.append(row)
  return rows


def save(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes JSON lines."""
  with open(path, "w", encoding="utf-8") as f:
    f.writelines(json.dumps(row) + "\n" for row in rows)
