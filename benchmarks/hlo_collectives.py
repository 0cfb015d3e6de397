"""Collectives in a compiled program's text: how many, how large, and whether they leave a slice."""

import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_LINE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=")
_LISTED = re.compile(r"replica_groups=\{\{([\d,\s]+)\}")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}")  # 'axis_0'=2 ..., and the axes of a group
_BETWEEN_SLICES = re.compile(r"^\s*%?[\w.\-]+ = (.*?) send\(.*_xla_megascale_transfer_type=\"(\w+)\"")


def count(program: str, devices: int, slices: int = 1) -> dict[str, dict[str, float]]:
  """Per kind: `count`, `bytes` (of results), and what one device sends over `ici` and `dcn` by ring algorithms.

  Args:
    program: text of the optimised module, one partition; a collective inside a loop counts once. The compiler has
      already cut what crosses slices into collectives within a slice and sends to the runtime that joins slices.
    devices: partitions.
    slices: of equal size.
  """
  found: dict[str, dict[str, float]] = {}
  for line in program.splitlines():
    between, within = _BETWEEN_SLICES.match(line), _LINE.match(line)
    if between:
      kind = f"{between[2].lower().replace('_', '-')} between slices"
      size = _size(_elements(between[1])[0])
      sent = {"ici": 0.0, "dcn": _ring(kind, size, slices)}
    elif within:
      shapes, kind, start = within.groups()
      # The start of an asynchronous one has (operands, results, handles ...) as its shape.
      size = _size(_elements(shapes)[1] if start and kind != "all-reduce" else shapes)
      sent = {"ici": _ring(kind, size, _members(line, devices // slices)), "dcn": 0.0}
    else:
      continue
    entry = found.setdefault(kind, {"count": 0, "bytes": 0, "ici": 0.0, "dcn": 0.0})
    for key, value in {"count": 1, "bytes": size, **sent}.items():
      entry[key] += value
  return dict(sorted(found.items()))


def _size(shapes: str) -> int:
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


def _members(line: str, devices: int) -> int:
  """How many take part in each group."""
  iota, listed, named = (pattern.search(line) for pattern in (_IOTA, _LISTED, _NAMED))
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    # An axis, or a part of it as 'axis':(size of what is before it)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  if iota:
    return int(iota[1].split(",")[1])
  return len(listed[1].split(",")) if listed else devices


def _ring(kind: str, size: int, members: int) -> float:
  """Bytes that one device sends, for a result of `size` bytes."""
  if kind == "collective-permute":
    return float(size)
  rounds = {"all-reduce": 2, "reduce-scatter": members}.get(kind.split(" ")[0], 1)
  return rounds * size * (members - 1) / members
