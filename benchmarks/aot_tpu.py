"""Compiles Shift Sparse Block Attention for TPUs with no TPU attached, beside JAX's splash attention.

  pip install "elasticdit_jax[aot]"        # libtpu, the compiler; several hundred MB
  python benchmarks/aot_tpu.py             # everything: about half an hour of one core
  python benchmarks/aot_tpu.py --chips=v5e --tokens=4096 --rho=0.8416

Every case is the value and the gradients of one attention over 128 text tokens and the image tokens, bfloat16, under
jax.jit with batch and heads split over 2 x 2 chips. Printed are, for one chip: HBM of the whole program, the VMEM that
each kernel reserves, and the length of its static schedule in millions of bundles (VLIW instructions) per sample of 16
heads. A schedule knows nothing of waiting for memory. It is counted to the disadvantage of the sparse kernels: all of
their conditional code counts in every step, except text queries and the clearing and writing of dk and dv, which run
once per head; of the dense kernel only unconditional code and its longest conditional region do.

Splash attention is dense here, with the best of a few block sizes. One step of its grid is the same at any length, so
it is compiled once per chip and head_dim, for 4096 tokens, and its bundles are scaled by the square of the length,
((image + text) / 4096)^2, as if padding to its blocks cost nothing. The ideal ratio is that of multiply-adds: all pairs
of tokens over the pairs of the sparse form, in which text queries read every key.
"""

import argparse
import functools
import glob
import json
import os
import re
import tempfile
import time

import case_process
import tpu_schedule

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
TEXT = 128
BLOCK = 64
HEADS = 16  # on one chip
SPLASH_TOKENS = 4096
COLUMNS = (
  "chip tokens head_dim rho kernel compile_s hbm_mib fwd_vmem_mib bwd_vmem_mib fwd_mbundles bwd_mbundles fwd_ratio "
  "bwd_ratio ideal fwd_of_ideal bwd_of_ideal"
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chips", default="v5e,v6e,v5p")
  parser.add_argument("--tokens", default="1024,4096,16384")
  parser.add_argument("--head_dims", default="64,128")
  parser.add_argument("--rho", default="0.75,0.8416")
  parser.add_argument("--splash_blocks", default="1024,512", help="block sizes tried; empty to leave splash out")
  parser.add_argument("--timeout", type=int, default=900, help="seconds for one compilation")
  parser.add_argument("--case", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case:
    print(json.dumps(_compile_case(**json.loads(args.case))))
    return
  print(COLUMNS.replace(" ", ","), flush=True)
  for chip in args.chips.split(","):
    for head_dim in map(int, args.head_dims.split(",")):
      dense = _dense(chip, head_dim, args)
      for tokens in map(int, args.tokens.split(",")):
        for rho in map(float, args.rho.split(",")):
          _sparse_row({"chip": chip, "tokens": tokens, "head_dim": head_dim, "rho": rho}, dense, args)


def _dense(chip: str, head_dim: int, args) -> dict[str, float]:
  """Prints a row per block size of splash; the fewest bundles in each direction, per pair of tokens."""
  found = []
  for block in map(int, filter(None, args.splash_blocks.split(","))):
    case = {"chip": chip, "tokens": SPLASH_TOKENS, "head_dim": head_dim}
    result = case_process.run(__file__, {**case, "splash_block": block}, args.timeout)
    _row({**case, "rho": ""}, f"splash {block}", result)
    found += [] if "error" in result else [result]
  fewest = {key: min((result[key] for result in found), default=float("nan")) for key in ("forward", "backward")}
  return {key: bundles / SPLASH_TOKENS**2 for key, bundles in fewest.items()}


def _sparse_row(case: dict, dense: dict[str, float], args) -> None:
  tokens, result, figures = case["tokens"], case_process.run(__file__, case, args.timeout), []
  if "error" not in result:
    pairs = tokens * (TEXT + BLOCK * result["kept"]) + TEXT * (TEXT + tokens)
    ideal = (tokens + TEXT) ** 2 / pairs
    ratios = [dense[key] * (tokens + TEXT) ** 2 / result[key] for key in ("forward", "backward")]
    figures = [*ratios, ideal, *(ratio / ideal for ratio in ratios)]
  _row(case, "ours", result, figures)


def _row(case: dict, kernel: str, result: dict, figures=()) -> None:
  if "error" in result:
    values = [result["error"]]
  else:
    values = [f"{result['seconds']:.0f}"]
    values += [f"{result[key] / 2**20:.1f}" for key in ("hbm", "forward_vmem", "backward_vmem")]
    values += [f"{result[key]:.3f}" for key in ("forward", "backward")] + [f"{x:.2f}" for x in figures]
  print(",".join(map(str, (*case.values(), kernel, *values))), flush=True)


def _compile_case(chip: str, tokens: int, head_dim: int, rho: float = 0.0, splash_block: int = 0) -> dict:
  """Compiles one case here: bytes, and per direction millions of bundles per sample of HEADS heads."""
  dump = tempfile.mkdtemp()
  _set_environment(dump)
  import jax
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
  start = time.time()
  with jax.set_mesh(topologies.make_mesh(topology, (2, 2), ("data", "model"))):
    # So many samples that no input fits VMEM, where the compiler would keep it otherwise.
    batch = 2 * max(4, 2**16 // tokens)
    attend, args, measure = (
      _splash(batch, tokens, head_dim, splash_block) if splash_block else _sparse(batch, tokens, head_dim, rho)
    )
    compiled = jax.jit(_with_gradients(attend)).lower(*args).compile()
  memory = compiled.memory_analysis()
  result = {"seconds": time.time() - start, "kept": 0 if splash_block else args[3].shape[3]}
  result["hbm"] = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  for name, vmem in _kernels(compiled.as_text()).items():
    direction = "backward" if re.search("backward|dkv|transpose", name) else "forward"
    (path,) = glob.glob(f"{dump}/*-{name}-??-final_bundles.txt")
    with open(path, encoding="utf-8") as file:
      result[direction] = measure(tpu_schedule.read(file.read())) / 1e6
    result[f"{direction}_vmem"] = vmem
  return result


def _set_environment(dump: str) -> None:
  flags = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
  os.environ.update(JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} {flags}")
  # A second compiler beside this one is no harm: there is no TPU to fight over.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  # These three only keep the compiler from asking around for a TPU.
  quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
  for name, value in {**quiet, "TPU_WORKER_ID": "0"}.items():
    os.environ.setdefault(name, value)


def _with_gradients(attend):
  import jax
  import jax.numpy as jnp

  def run(q, k, v, *lists):
    return jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv, *lists).astype(jnp.float32) ** 2), (0, 1, 2))(q, k, v)

  return run


def _sparse(batch: int, tokens: int, head_dim: int, rho: float):
  """The attention, its arguments, and bundles per sample from a schedule."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec

  from elasticdit_jax.ops import gating, pallas_tpu_plan, sparse_attention_pallas_tpu
  from elasticdit_jax.ops.sparse_attention import sparse_attention

  attend = functools.partial(
    sparse_attention, text_len=TEXT, implementation="pallas_tpu", batch_axes="data", head_axes="model"
  )
  kept = gating.num_kept(tokens // BLOCK, rho)
  spread = jax.NamedSharding(jax.sharding.get_mesh(), PartitionSpec("data", None, "model"))
  x = jax.ShapeDtypeStruct((batch, TEXT + tokens, 2 * HEADS, head_dim), jnp.bfloat16, sharding=spread)
  share = jax.NamedSharding(jax.sharding.get_mesh(), PartitionSpec("data"))
  lists = jax.ShapeDtypeStruct((batch, 1, tokens // BLOCK, kept), jnp.int32, sharding=share)
  plan = sparse_attention_pallas_tpu.plan_of(x, lists, TEXT, BLOCK)
  groups, trips = HEADS // plan.pack, plan.blocks // pallas_tpu_plan.TEXT_CHUNK

  def measure(schedule):
    return groups * (plan.tiles * schedule.every_step() + schedule.long_regions(trips))

  return attend, (x, x, x, lists), measure


def _splash(batch: int, tokens: int, head_dim: int, block: int):
  import jax
  import jax.numpy as jnp
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask
  from jax.sharding import PartitionSpec

  sizes = kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    use_fused_bwd_kernel=True,
  )
  full = mask.MultiHeadMask([mask.FullMask((tokens, tokens))] * HEADS)

  def attend(q, k, v):
    # Made inside the trace: it makes arrays, and the devices of this mesh cannot hold any.
    return jax.vmap(kernel.make_splash_mha_single_device(full, block_sizes=sizes))(q, k, v)

  spec = PartitionSpec("data", "model")
  x = jax.ShapeDtypeStruct(
    (batch, 2 * HEADS, tokens, head_dim), jnp.bfloat16, sharding=jax.NamedSharding(jax.sharding.get_mesh(), spec)
  )
  split = jax.shard_map(attend, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
  steps = HEADS * (tokens // block) ** 2
  return split, (x, x, x), lambda schedule: steps * schedule.main_path()


def _kernels(program: str) -> dict[str, int]:
  """Name of every kernel in the compiled program, and the VMEM it reserves."""
  kernels = {}
  for line in program.splitlines():
    name = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = .*custom_call_target=\"tpu_custom_call\"", line)
    if name:
      sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
      kernels[name.group(1)] = max(map(int, sizes), default=0)
  return kernels


if __name__ == "__main__":
  main()
