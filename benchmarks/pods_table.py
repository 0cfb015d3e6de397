"""The table of HBM in docs/pods.md: lines come from aot_pods.py one case at a time."""

import accelerators

BEGIN, END = "<!-- aot_pods: begin -->", "<!-- aot_pods: end -->"
HEADER = (
  "| size | pixels | pod | images a chip | global batch | GiB a chip | of | state, GiB | TFLOP a chip | ICI, GB |"
  " DCN, GB | estimate, ms | compiled in, s |"
)
_GIB = 2**30


def merge(text: str, case: dict, result: dict) -> str:
  """The file with the line of a case replaced or added; lines are sorted by size, pixels and pod.

  Raises:
    ValueError: where the comments that enclose the table are missing.
  """
  if BEGIN not in text or END not in text:
    raise ValueError(f"--table: the file needs the lines {BEGIN} and {END}")
  before, rest = text.split(BEGIN, 1)
  inside, after = rest.split(END, 1)
  lines = {_key(line): line for line in inside.strip().splitlines()[2:]}
  line = row(case, result)
  lines[_key(line)] = line
  rule = "|---|---:|---|" + "---:|" * (HEADER.count("|") - 4)
  table = "\n".join([HEADER, rule, *(lines[key] for key in sorted(lines, key=_order))])
  return f"{before}{BEGIN}\n{table}\n{END}{after}"


def row(case: dict, result: dict) -> str:
  """A line of the table."""
  cells = [case["size"], str(case["pixels"]), case["topology"], str(case["per_chip"])]
  if "error" in result:
    return f"| {' | '.join([*cells, 'does not compile: ' + result['error'][:80], *['–'] * 8])} |"
  chip = accelerators.CHIPS[result["chip"]]
  sent = {where: sum(kind[where] for kind in result["collectives"].values()) / 1e9 for where in ("ici", "dcn")}
  seconds = result["roofline"].values()
  cells += [str(result["batch"]), f"{result['total'] / _GIB:.1f}" + ("" if result["fits"] else " **too much**")]
  cells += [f"{chip.hbm / _GIB:.1f}", f"{result['hbm']['argument'] / _GIB:.2f}", f"{result['flops'] / 1e12:.1f}"]
  cells += [f"{sent['ici']:.1f}", f"{sent['dcn']:.2f}" if sent["dcn"] else "–"]
  cells += [f"{1000 * max(seconds):.0f}–{1000 * sum(seconds):.0f}", f"{result['compile_s']:.0f}"]
  return f"| {' | '.join(cells)} |"


def _key(line: str) -> tuple[str, ...]:
  return tuple(cell.strip() for cell in line.strip("|").split("|"))[:4]


def _order(key: tuple[str, ...]) -> tuple:
  size, pixels, pod, images = key
  return "SBL".find(size), int(pixels), pod, int(images)
