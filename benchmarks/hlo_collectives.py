"""Collectives in a compiled program's text: how many, how large, and whether they leave a slice."""

import math
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_LINE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}")


def count(program: str, devices: int, slices: int = 1) -> dict[str, dict[str, float]]:
  """Per kind: `count`, `bytes` (of results), and what one device sends over `ici` and `dcn` by ring algorithms.

  Args:
    program: text of the optimised module, one partition; a collective inside a loop counts once.
    devices: partitions; consecutive ones share a slice.
    slices: of equal size. Traffic of a group that spans slices counts under `dcn` for the part that must cross, once
      per member, and under `ici` for the rest.
  """
  found: dict[str, dict[str, float]] = {}
  for line in program.splitlines():
    match = _LINE.match(line)
    if not match:
      continue
    shapes, kind, start = match.groups()
    size, groups = _size(shapes, kind, bool(start)), _groups(line, devices)
    entry = found.setdefault(kind, {"count": 0, "bytes": 0, "ici": 0.0, "dcn": 0.0})
    entry["count"] += 1
    entry["bytes"] += size
    ici, dcn = _traffic(kind, size, groups, devices // slices)
    entry["ici"] += ici
    entry["dcn"] += dcn
  return dict(sorted(found.items()))


def _size(shapes: str, kind: str, asynchronous: bool) -> int:
  """Bytes of the result. The start of an asynchronous one has (operands, results, handles ...) as its shape."""
  if asynchronous and kind != "all-reduce":
    shapes = _elements(shapes)[1]
  return sum(_BYTES.get(t, 4) * math.prod(int(n) for n in dims.split(",") if n) for t, dims in _SHAPE.findall(shapes))


def _elements(shapes: str) -> list[str]:
  """Of a tuple's text, the outermost ones."""
  found, depth = [""], 0
  for letter in shapes[1:-1]:
    depth += (letter in "({[") - (letter in ")}]")
    if letter == "," and not depth:
      found.append("")
    else:
      found[-1] += letter
  return found


def _groups(line: str, devices: int) -> np.ndarray:
  """[groups, members] of partitions."""
  iota = _IOTA.search(line)
  if iota:
    shape, dims, order = (tuple(map(int, s.split(","))) if s else None for s in iota.groups())
    members = np.arange(math.prod(dims)).reshape(dims)
    return (members if order is None else members.transpose(order)).reshape(shape)
  listed = _LISTED.search(line)
  if listed:
    return np.array([[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,\s]+)\}", listed[1])])
  return np.arange(devices)[None]


def _traffic(kind: str, size: int, groups: np.ndarray, per_slice: int) -> tuple[float, float]:
  """Bytes that a device sends inside its slice and out of it."""
  members = groups.shape[1]
  if kind == "collective-permute":
    crossing = float(np.mean(groups[:, 0] // per_slice != groups[:, 1] // per_slice))
    return size * (1 - crossing), size * crossing
  if members == 1:
    return 0.0, 0.0
  whole = size * members if kind == "reduce-scatter" else size
  rounds = 2 if kind == "all-reduce" else 1
  here = int(np.max([len(set(g // per_slice)) for g in groups]))  # slices that one group spans
  local = members // here
  # Hierarchical: reduce (or gather) within the slice, then what is left, a share per member, between slices.
  ici = rounds * whole * (local - 1) / local
  dcn = rounds * whole / local * (here - 1) / here
  return ici, dcn
