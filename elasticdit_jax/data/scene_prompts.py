"""Every caption of the embedded world, as one table, and which of them training never shows.

The world has 3 shapes, 6 colours, 2 size words, 4 relations and six tasks named as in GenEval
(Ghosh et al. 2023, arXiv 2310.11513). All of its captions are a finite table of about a thousand rows;
rendering draws rows of it, scoring looks captions up in it, and generalisation is measured on the rows
that `HELD_*` keep out of training:

* single_obj: (size word, shape); two_obj: ordered (shape, shape); counting: (count, shape);
  position: (shape, relation, shape); colors: (colour, shape);
* color_attr: captions that contain a held-out (colour, shape) or a held-out couple of colours.

A held-out (colour, shape) appears in no training image of any task, named or not; a held-out couple of
colours in no training caption. Unseen counting and position captions use trained colours only, so that
they measure the held-out factor alone.
"""

import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

TASKS = ("single_obj", "two_obj", "counting", "colors", "position", "color_attr")
SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("", "small", "big")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("two", "three", "four")
SPLITS = ("train", "unseen", "any")
MAX_OBJECTS = 4
MAX_WORDS = 8
VOCABULARY = (
  "a", "an", "and", "of", "left", "right", "above", "below", "small", "big",
  *COUNTS, *COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES),
)  # fmt: skip

HELD_COLOR_SHAPE = frozenset({("yellow", "circle"), ("purple", "square"), ("green", "triangle")})
HELD_COLOR_COUPLE = frozenset({frozenset({"red", "blue"}), frozenset({"orange", "green"})})
HELD_SIZE_SHAPE = frozenset({("small", "square"), ("big", "triangle")})
HELD_TWO = frozenset({("triangle", "circle")})
HELD_COUNT_SHAPE = frozenset({("two", "triangle"), ("three", "circle")})
HELD_POSITION = frozenset(
  {
    ("circle", "left of", "square"),
    ("triangle", "right of", "circle"),
    ("square", "above", "triangle"),
    ("triangle", "below", "square"),
  }
)


@dataclasses.dataclass(frozen=True)
class Object:
  """What a caption says of one object; an empty colour or size is free."""

  shape: str
  color: str = ""
  size: str = ""


@dataclasses.dataclass(frozen=True)
class Spec:
  """One caption and the scene it asks for.

  Attributes:
    task: one of TASKS.
    caption: at most MAX_WORDS words of VOCABULARY.
    objects: exactly the objects of its pictures, 1 to MAX_OBJECTS.
    relation: one of RELATIONS, read "objects[0] relation objects[1]", or "".
    group: the combination that `split` is decided on.
    split: "train", "unseen", or "" for captions that are in neither (a held-out colour inside another
      task).
  """

  task: str
  caption: str
  objects: tuple[Object, ...]
  relation: str
  group: tuple[str, ...]
  split: str


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One evaluation prompt: its task and its caption."""

  task: str
  caption: str


def _one(obj: Object) -> str:
  article = "an" if obj.color == "orange" else "a"
  return " ".join(word for word in (article, obj.size, obj.color, obj.shape) if word)


def _split(held: bool, objects: tuple[Object, ...]) -> str:
  """The split of a caption whose task-specific combination is held out or not."""
  if any((o.color, o.shape) in HELD_COLOR_SHAPE for o in objects):
    return ""
  if len({o.color for o in objects}) == 2 and frozenset(o.color for o in objects) in HELD_COLOR_COUPLE:
    return ""
  return "unseen" if held else "train"


def _spec(task, caption, objects, group, held, relation="") -> Spec:
  split = _split(held, objects)
  if task in ("colors", "color_attr"):
    split = split or "unseen"
  return Spec(task, caption, objects, relation, group, split)


def _single():
  for size, shape in itertools.product(SIZES, SHAPES):
    obj = Object(shape, size=size)
    yield _spec("single_obj", _one(obj), (obj,), (size, shape), (size, shape) in HELD_SIZE_SHAPE)


def _counting():
  for (number, count), shape in itertools.product(enumerate(COUNTS, 2), SHAPES):
    for color in ("", *COLORS):
      caption = " ".join(word for word in (count, color, f"{shape}s") if word)
      group = (count, shape)
      yield _spec("counting", caption, (Object(shape, color),) * number, group, group in HELD_COUNT_SHAPE)


def _colors():
  for color, shape in itertools.product(COLORS, SHAPES):
    obj = Object(shape, color)
    yield _spec("colors", _one(obj), (obj,), (color, shape), False)


def _pairs():
  """two_obj, position and color_attr: two different shapes, of two different colours if any."""
  couples = [("", ""), *itertools.permutations(COLORS, 2)]
  for shapes, colors in itertools.product(itertools.permutations(SHAPES, 2), couples):
    objects = (Object(shapes[0], colors[0]), Object(shapes[1], colors[1]))
    names = [_one(obj) for obj in objects]
    if colors[0]:
      yield _spec("color_attr", " and ".join(names), objects, (*colors, *shapes), False)
    else:
      yield _spec("two_obj", " and ".join(names), objects, shapes, shapes in HELD_TWO)
    for relation in RELATIONS:
      group = (shapes[0], relation, shapes[1])
      held = group in HELD_POSITION
      yield _spec("position", f"{names[0]} {relation} {names[1]}", objects, group, held, relation)


@functools.cache
def specs() -> tuple[Spec, ...]:
  """Every caption of the world with its scene, in a fixed order."""
  return tuple(itertools.chain(_single(), _counting(), _colors(), _pairs()))


@functools.cache
def _by_caption() -> dict[str, Spec]:
  return {spec.caption: spec for spec in specs()}


def parse(caption: str) -> Spec:
  """The scene a caption asks for.

  Raises:
    ValueError: `caption` is none of the world's; the message offers the closest one.
  """
  spec = _by_caption().get(" ".join(caption.lower().split()))
  if spec is None:
    close = difflib.get_close_matches(caption, _by_caption(), n=1, cutoff=0.0)[0]
    raise ValueError(f"caption: {caption!r} is not a caption of the embedded world, the closest one is {close!r}")
  return spec


def check_split(split: str, known: tuple[str, ...] = SPLITS) -> None:
  """Raises ValueError unless `split` is one of `known`."""
  if split not in known:
    raise ValueError(f"split: got {split!r}, expected one of {', '.join(known)}")


def color_shape_allowed(split: str) -> np.ndarray:
  """bool [shapes, colours]: the pairs that objects of unnamed colour may take in `split`."""
  free = split == "any"
  return np.array([[free or (c, s) not in HELD_COLOR_SHAPE for c in COLORS] for s in SHAPES])


def _visits(rows: list[Spec], count: int, first: int, rng: np.random.Generator) -> list[Spec]:
  """`count` rows of one group: 7 of 10 coloured where both kinds exist, each kind cycled in random order.

  `first` staggers the uncoloured ones between groups, so that few visits keep the ratio too.
  """
  kinds = [[row for row in rows if bool(row.objects[0].color) == colored] for colored in (True, False)]
  kinds = [[kind[i] for i in rng.permutation(len(kind))] for kind in kinds]
  taken = [0, 0]
  chosen = []
  for visit in range(count):
    kind = int((7 * visit + 3 * first) % 10 >= 7)
    kind = kind if kinds[kind] else 1 - kind
    chosen.append(kinds[kind][taken[kind] % len(kinds[kind])])
    taken[kind] += 1
  return chosen


def eval_prompts(per_task: int, split: str, seed: int = 0) -> list[Prompt]:
  """Evaluation prompts, `per_task` for each of TASKS, cycling evenly over the combinations of `split`.

  Args:
    per_task: prompts per task, at least 1.
    split: "seen" (combinations of training) or "unseen" (held out from it).
    seed: chooses the order of combinations and the free colours.

  Raises:
    ValueError: `per_task` or `split` is out of range.
  """
  check_split(split, ("seen", "unseen"))
  if per_task < 1:
    raise ValueError(f"per_task: got {per_task}, expected at least 1 prompt per task")
  wanted = "train" if split == "seen" else "unseen"
  prompts = []
  for number, task in enumerate(TASKS):
    rng = np.random.default_rng([seed, number])
    groups: dict[tuple[str, ...], list[Spec]] = {}
    for spec in specs():
      if spec.task == task and spec.split == wanted:
        groups.setdefault(spec.group, []).append(spec)
    order = [list(groups)[i] for i in rng.permutation(len(groups))]
    rounds = -(-per_task // len(order))
    cycles = [_visits(groups[group], rounds, first, rng) for first, group in enumerate(order)]
    rows = [cycles[i % len(order)][i // len(order)] for i in range(per_task)]
    prompts += [Prompt(task, row.caption) for row in rows]
  return prompts


def parse_weights(text: str, known: Sequence[str], field: str) -> dict[str, float]:
  """Reads "counting=7,position=5": relative frequency of tasks; those not named have none.

  Raises:
    ValueError: naming `field`, for a task that is not one of `known`, twice the same, or no weight above 0.
  """
  weights = {}
  for item in text.split(","):
    tag, _, value = (part.strip() for part in item.partition("="))
    if tag not in known or tag in weights:
      raise ValueError(f"{field}: expected each task once, of {', '.join(known)}, got {item!r} in {text!r}")
    try:
      weights[tag] = float(value)
    except ValueError:
      weights[tag] = -1.0
    if not 0 <= weights[tag] < math.inf:
      raise ValueError(f"{field}: {tag}: expected a weight of at least 0 like {tag}=1, got {value!r}")
  weights = {tag: weight for tag, weight in weights.items() if weight}
  if not weights:
    raise ValueError(f"{field}: expected a weight above 0, got {text!r}")
  return weights
