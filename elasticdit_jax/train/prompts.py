"""The prompts that alignment draws: captions of the embedded world, or a file.

A share of them is held out: never drawn in training, they tell learning from memorising while the run goes on. They are
combinations that pre-training has seen; what it has never seen stays untouched for the final report.

File: one prompt a line, or JSON lines {"prompt": ..., "tag": ...} as GenEval writes them, every field of which reaches
the rewards as metadata.
"""

import dataclasses
import functools
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elasticdit_jax.data import scene_prompts
from elasticdit_jax.data.text import split_words

_FIELD = "config.prompts.tasks"
# What the weights inside the package find hard comes often.
_SCENES = "counting=6,position=4,color_attr=3,colors=2,two_obj=2,single_obj=4"
_NO_TAG = "all"


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One prompt.

  Attributes:
    text: what the model reads.
    tag: its task, by which rewards are reported and prompts are weighted.
    metadata: what the rewards read beside the text.
  """

  text: str
  tag: str
  metadata: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Prompts of a run.

  Attributes:
    training: tag -> prompts.
    weights: tag -> relative frequency in training, positive.
    held_out: prompts that training does not draw, the tags in turn.
  """

  training: Mapping[str, Sequence[Prompt]]
  weights: Mapping[str, float]
  held_out: Sequence[Prompt]

  @functools.cached_property
  def checksum(self) -> int:
    """Of every prompt, its tag and its metadata, in order."""
    rows = [dataclasses.astuple(row) for of_tag in self.training.values() for row in of_tag]
    told = [rows, [dataclasses.astuple(row) for row in self.held_out]]
    return zlib.crc32(json.dumps(told, sort_keys=True).encode())

  def draw(self, count: int, seed: int, epoch: int) -> list[Prompt]:
    """The prompts of an epoch, a pure function of (seed, epoch); each at most once while its tag has enough."""
    rng = np.random.default_rng([seed, epoch])
    tags = list(self.weights)
    share = np.array([self.weights[tag] for tag in tags]) * count / sum(self.weights.values())
    # Whole numbers that add up, the remainders by chance: every epoch has nearly the same mixture.
    number = np.floor(share).astype(int)
    rest = share - number
    missing = count - number.sum()
    if missing:
      number[rng.choice(len(tags), missing, replace=False, p=rest / rest.sum())] += 1
    drawn = []
    for tag, want in zip(tags, number, strict=True):
      rows = self.training[tag]
      order = np.concatenate([rng.permutation(len(rows)) for _ in range(math.ceil(want / len(rows)))] or [[]])
      drawn += [rows[int(i)] for i in order[:want]]
    return drawn


def scenes(weights: str, held_out: float) -> Prompts:
  """Captions of the embedded world that training pictures may have.

  Args:
    weights: "counting=7,position=5": relative frequency of tasks; a task that is not named is never drawn. "" for a
      mixture in which hard tasks come often.
    held_out: share of each task's captions to hold out.

  Raises:
    ValueError: for an unknown task, a bad weight or share.
  """
  parsed = scene_prompts.parse_weights(weights or _SCENES, scene_prompts.TASKS, _FIELD)
  rows = [
    Prompt(spec.caption, spec.task, {"tag": spec.task, "prompt": spec.caption})
    for spec in scene_prompts.specs()
    if spec.split == "train" and spec.task in parsed
  ]
  return _split(rows, parsed, held_out)


def from_file(path: str, weights: str, held_out: float) -> Prompts:
  """Prompts of a file; see the module docstring.

  Args:
    path: the file.
    weights: "" for tags as frequent as in the file, or as in `scenes`.
    held_out: share of each tag's prompts to hold out.

  Raises:
    ValueError: naming the line that is empty, given twice or no prompt.
  """
  rows, seen = [], {}
  with open(path, encoding="utf-8") as f:
    for number, line in enumerate(f.read().splitlines(), start=1):
      prompt = _parse_line(line.strip(), f"config.prompts.file: {path}:{number}")
      key = " ".join(split_words(prompt.text))
      if key in seen:
        raise ValueError(f"config.prompts.file: {path}:{number}: the prompt of line {seen[key]} again; remove one")
      seen[key] = number
      rows.append(prompt)
  if not rows:
    raise ValueError(f"config.prompts.file: {path} is empty; expected one prompt a line")
  tags = {row.tag: 0.0 for row in rows}
  for row in rows:
    tags[row.tag] += 1.0
  parsed = scene_prompts.parse_weights(weights, tuple(tags), _FIELD) if weights else tags
  return _split([row for row in rows if row.tag in parsed], parsed, held_out)


def _parse_line(line: str, where: str) -> Prompt:
  if line.startswith("{"):
    try:
      fields = json.loads(line, parse_constant=_no_number)
    except ValueError as e:
      raise ValueError(f"{where}: no JSON ({e})") from None
    text = fields.get("prompt")
  else:
    text, fields = line, {"prompt": line}
  if not isinstance(text, str) or not split_words(text):
    raise ValueError(f"{where}: expected a prompt, or JSON with a field 'prompt', got {line!r:.80}; remove the line")
  return Prompt(text, str(fields.get("tag", _NO_TAG)), fields)


def _no_number(name: str) -> None:
  raise ValueError(f"{name} is no number of JSON")


def _split(rows: Sequence[Prompt], weights: Mapping[str, float], share: float) -> Prompts:
  """Holds out a share of every tag, chosen by a hash of the text: the same in every run."""
  if not 0 < share < 1:
    raise ValueError(f"config.prompts.held_out: expected a share above 0 and below 1, got {share}")
  training, held = {}, []
  for tag in weights:
    of_tag = sorted((row for row in rows if row.tag == tag), key=lambda row: _hash(row.text))
    count = math.ceil(share * len(of_tag))
    if count >= len(of_tag):
      raise ValueError(
        f"config.prompts: {len(of_tag)} prompts of {tag!r} are too few to hold {share} out; give at least two"
      )
    training[tag] = of_tag[count:]
    held.append(of_tag[:count])
  longest = max(map(len, held))
  return Prompts(training, dict(weights), [row[i] for i in range(longest) for row in held if i < len(row)])


def _hash(text: str) -> bytes:
  return hashlib.blake2b(text.encode(), digest_size=8).digest()
