"""Times Shift Sparse Block Attention beside dense attention, on whatever JAX finds: CPU, GPU or TPU.

  python benchmarks/sparse_attention.py                    # everything: an hour of two cores
  python benchmarks/sparse_attention.py --tokens=4096 --rho=0.75 --dtypes=float32 --passes=forward
  pip install "elasticdit_jax[torch]"                      # adds torch SDPA and FlexAttention

One process; all candidates of a case take turns, and the minimum over the turns counts. Times are CPU ms / wall ms:
user and system time of all threads, and what a clock shows. On a CPU the ratios are those of CPU time, which stays
meaningful while other programs run (wall time does not); on an accelerator those of wall time. "forward+backward" is
the value and the gradients of q, k and v. FlexAttention is compiled by a C++ compiler, a minute or more per case.

The ideal is the ratio of multiply-adds, text counted: all pairs of tokens over the pairs of the sparse form, in which
text queries read every key. "of ideal" is the ratio to the fastest dense JAX attention over that. MiB are temporaries
by memory_analysis(), inputs and outputs excluded. Lists are random and shared by the heads; making them is not timed.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import time
from collections.abc import Callable
from functools import partial

import attention_baselines
import jax
import jax.numpy as jnp
import numpy as np
import torch_baselines
from jax.sharding import PartitionSpec

from elasticdit_jax.ops import gating
from elasticdit_jax.ops.sparse_attention import sparse_attention

BLOCK = 64
HEADS = {1024: 16, 4096: 8, 16384: 2}
IDLE = 0.3
COLUMNS = "tokens, rho, kept, heads, dtype, pass, ours, {dense}x dense, ideal, of ideal, MiB, MiB dense"


@dataclasses.dataclass(frozen=True)
class Case:
  """One line of the table."""

  tokens: int
  rho: float
  dtype: str
  backward: bool
  heads: int
  head_dim: int = 64
  text: int = 128

  @property
  def kept(self) -> int:
    return gating.num_kept(self.tokens // BLOCK, self.rho)

  @property
  def ideal(self) -> float:
    """How many times fewer multiply-adds than dense attention."""
    pairs = self.tokens * (self.text + BLOCK * self.kept) + self.text * (self.text + self.tokens)
    return (self.tokens + self.text) ** 2 / pairs


@dataclasses.dataclass
class Candidate:
  """Something to time: a call that returns when it is done; temporaries in MiB; why there is no time."""

  call: Callable[[], None] | None
  temporaries: float = float("nan")
  missing: str = ""
  cpu: float = float("inf")
  wall: float = float("inf")

  def cell(self) -> str:
    return self.missing or f"{1e3 * self.cpu:.1f} / {1e3 * self.wall:.1f}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", default="1024,4096,16384", help="image tokens, without the text")
  parser.add_argument("--rho", default="0.75,0.8416,0.875")
  parser.add_argument("--dtypes", default="float32,bfloat16")
  parser.add_argument("--passes", default="forward,forward+backward")
  parser.add_argument("--heads", type=int, help="16, 8 and 2 for 1024, 4096 and 16384 tokens where not given")
  parser.add_argument("--head_dim", type=int, default=64)
  parser.add_argument("--text", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--calls", type=int, help="calls in one turn; 1 on CPU, 10 elsewhere where not given")
  parser.add_argument("--baselines", default="", help="names, or parts of names; empty for all there are")
  parser.add_argument("--max_mib", type=float, default=6000, help="a candidate with more temporaries is left out")
  parser.add_argument("--devices", type=int, default=1, help="split heads over devices; on CPU it makes them")
  args = parser.parse_args()
  if args.devices > 1:
    jax.config.update("jax_num_cpu_devices", args.devices)
  print(*machine(), sep="\n", end="\n\n")
  header = True
  for dtype in args.dtypes.split(","):
    for tokens in map(int, args.tokens.split(",")):
      for name in args.passes.split(","):
        heads = args.heads or HEADS.get(tokens, 2)
        backward = {"forward": False, "forward+backward": True}[name]
        rhos = map(float, args.rho.split(","))
        cases = [Case(tokens, rho, dtype, backward, heads, args.head_dim, args.text) for rho in rhos]
        print(*run(cases, args, header), sep="\n", flush=True)
        header = False
  print("", *warnings(), sep="\n")


def machine() -> list[str]:
  """What the numbers belong to."""
  device = jax.devices()[0]
  torch = f", torch {torch_baselines.version()}" if torch_baselines.installed() else ""
  return [
    f"{datetime.date.today()}, {len(jax.devices())} x {device.device_kind} ({device.platform}), {_processor()}, "
    f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}{torch}",
    *warnings(),
  ]


def warnings() -> list[str]:
  """A line where other programs run, by the load before the first case or, after the last one, beyond our own."""
  load, own = os.getloadavg()[0], 0.0 if time.process_time() < 30 else os.cpu_count()
  if load <= own + IDLE:
    return []
  return [f"WARNING: load average {load:.1f}, the machine is not idle: wall times mean nothing, CPU times run high."]


def _processor() -> str:
  try:
    with open("/proc/cpuinfo") as lines:
      return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def run(cases: list[Case], args: argparse.Namespace, header: bool) -> list[str]:
  """Markdown lines of cases that differ in rho alone: dense attention is timed once for all of them."""
  case, rng = cases[0], np.random.default_rng(0)
  shape = (case.heads, case.text + case.tokens, case.head_dim)
  arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(3)]
  wanted = [part for part in args.baselines.split(",") if part]
  measure_jax = partial(_jax_candidate, arrays, backward=case.backward, args=args, dtype=case.dtype)

  dense = {}
  for name, attend in attention_baselines.dense_jax().items():
    chosen = not wanted or any(part in name for part in wanted)
    chosen &= not (name.endswith("float32") and case.dtype == "float32")  # the same as without
    dense[name] = measure_jax(attend) if chosen else Candidate(None, missing="–")
  lists = [_random_lists(rng, case) for case in cases]
  ours = [measure_jax(partial(_ours, kept=kept, text=case.text)) for kept in lists]
  torch_dense, torch_flex = _torch_candidates(arrays, case, lists, wanted)
  candidates = [*dense.values(), *ours, torch_dense, *torch_flex]
  measure(candidates, args.repeats, args.calls or (1 if jax.default_backend() == "cpu" else 10))

  lines = []
  if header:
    names = COLUMNS.format(dense="".join(f"{name}, " for name in (*dense, "torch SDPA", "torch FlexAttention")))
    lines = ["| " + names.replace(", ", " | ") + " |", "|---" * (names.count(", ") + 1) + "|"]
  for case, own, flex in zip(cases, ours, torch_flex, strict=True):
    lines.append(_line(case, own, dense, torch_dense, flex))
  return lines


def _line(case: Case, ours: Candidate, dense: dict, torch_dense: Candidate, flex: Candidate) -> str:
  clock = "cpu" if jax.default_backend() == "cpu" else "wall"
  best = min(dense.values(), key=lambda candidate: getattr(candidate, clock))
  ratio = getattr(best, clock) / getattr(ours, clock)
  cells = [case.tokens, case.rho, case.kept, case.heads, case.dtype]
  cells += ["forward+backward" if case.backward else "forward", ours.cell()]
  cells += [candidate.cell() for candidate in (*dense.values(), torch_dense, flex)]
  cells += [f"{ratio:.2f}", f"{case.ideal:.2f}", f"{ratio / case.ideal:.0%}"]
  cells += [f"{ours.temporaries:.0f}", f"{best.temporaries:.0f}"]
  return "| " + " | ".join(map(str, cells)) + " |"


def measure(candidates: list[Candidate], repeats: int, calls: int) -> None:
  """Sets the minimum of CPU and wall seconds of a call over turns that the candidates take."""
  running = [candidate for candidate in candidates if candidate.call]
  for candidate in running:
    candidate.call()
  for _ in range(repeats):
    for candidate in running:
      wall, cpu = time.perf_counter(), time.process_time()
      for _ in range(calls):
        candidate.call()
      candidate.cpu = min(candidate.cpu, (time.process_time() - cpu) / calls)
      candidate.wall = min(candidate.wall, (time.perf_counter() - wall) / calls)


def _ours(q: jax.Array, k: jax.Array, v: jax.Array, *, kept: np.ndarray, text: int) -> jax.Array:
  return sparse_attention(q, k, v, jnp.asarray(kept)[None, None], text_len=text, block_size=BLOCK)


def _random_lists(rng: np.random.Generator, case: Case) -> np.ndarray:
  blocks = case.tokens // BLOCK
  return np.sort(np.argsort(rng.random((blocks, blocks)), axis=1)[:, : case.kept], axis=1).astype(np.int32)


def _jax_candidate(arrays, attend, *, backward: bool, args: argparse.Namespace, dtype: str) -> Candidate:
  """Compiles one attention of q, k, v, given as [heads, tokens, D] float32; heads are split over the devices."""
  mesh = jax.make_mesh((args.devices,), ("heads",))
  split = PartitionSpec(None, None, "heads")
  attend = jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)

  def with_gradients(*qkv):
    return jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32) ** 2), (0, 1, 2))(*qkv)

  sharding = jax.sharding.NamedSharding(mesh, split)
  qkv = [jax.device_put(jnp.asarray(x.swapaxes(0, 1)[None], dtype), sharding) for x in arrays]
  try:
    compiled = jax.jit(with_gradients if backward else attend).lower(*qkv).compile()
  except Exception as error:  # What is missing on this machine belongs into the table.
    return Candidate(None, missing=_reason(error))
  memory = compiled.memory_analysis()
  temporaries = memory.temp_size_in_bytes / 2**20 if memory else float("nan")
  if temporaries > args.max_mib:
    return Candidate(None, temporaries, f"{temporaries:.0f} MiB")
  return Candidate(lambda: jax.block_until_ready(compiled(*qkv)), temporaries)


def _torch_candidates(arrays, case: Case, lists, wanted: list[str]) -> tuple[Candidate, list[Candidate]]:
  absent = Candidate(None, missing="–")
  if not torch_baselines.installed():
    return absent, [absent] * len(lists)
  qkv = torch_baselines.inputs(arrays, case.dtype, case.backward, gpu=jax.default_backend() == "gpu")
  makers = {"torch SDPA": [partial(torch_baselines.sdpa, qkv)]}
  makers["torch FlexAttention"] = [
    partial(torch_baselines.flex, qkv, kept, case.text, BLOCK) if case.text % BLOCK == 0 else None for kept in lists
  ]
  found = []
  for name, calls in makers.items():
    chosen = not wanted or any(part in name for part in wanted)
    found.append([_torch_candidate(call, case.backward) if chosen and call else absent for call in calls])
  return found[0][0], found[1]


def _torch_candidate(make: Callable[[bool], Callable[[], None]], backward: bool) -> Candidate:
  try:
    call = make(backward)
    call()
  except Exception as error:  # FlexAttention has no backward pass on CPU, for one.
    return Candidate(None, missing=_reason(error))
  return Candidate(call)


def _reason(error: Exception) -> str:
  return type(error).__name__


if __name__ == "__main__":
  main()
