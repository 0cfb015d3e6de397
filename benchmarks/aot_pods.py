"""Compiles the UWCO training step for TPU pods with no TPU attached: does it fit, what is sent, how long might it take.

  pip install "elasticdit_jax[aot]"                       # libtpu, the compiler; several hundred MB
  python benchmarks/aot_pods.py                           # size L, 1024 px, 4 images a chip, four pods
  python benchmarks/aot_pods.py --sizes=S,B,L --pixels=512,1024 --table=docs/pods.md    # its table: hours
  python benchmarks/aot_pods.py --topologies=v5e-256 --per_chip=8 --remat=full

A case is step.make_step as configs/uwco.py:paper runs it in phases 2 and 4: encoder, flex-max and flex-lite on one
batch, both sparse, block by block recomputation, bfloat16 over float32 parameters, optimiser and EMA; state and batch
laid out by train/sharding.py. The exit code is 1 where a program does not fit its chips. With --table the lines of the
cases just compiled take the place of older ones in a Markdown file, between two comments that say aot_pods.

The compiler's level is O1 (JAX_OPTIMIZATION_LEVEL, which training honours as well): L takes minutes and 3 GB of the
host's memory; at the usual level it had not ended after 16 minutes of CPU time, with 18 GB.

Printed for one chip: HBM (arguments, results, temporaries, code) beside what the chip has, FLOPs counted in the jaxpr
(recomputation included; "model" leaves it out), collectives by kind with the bytes that go over the wires by ring
algorithms, and a roofline: what compute, HBM and links would each take at their makers' peak rates. That is an estimate
from counts, not a measurement: nothing here has run on a TPU.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import accelerators
import case_process
import hlo_collectives
import pods_table

from elasticdit_jax import config_file

# Name -> (what the compiler calls it, slices). Names as Cloud TPU sells them: those of v5p count cores, two a chip.
TOPOLOGIES = {
  "v5e-256": ("v5e:16x16", 1),
  "v6e-256": ("v6e:16x16", 1),
  "v5p-512": ("v5p:4x8x8", 1),
  "v5e-256x2": ("v5e:16x16", 2),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One program; see the options of the command line."""

  topology: str
  size: str
  pixels: int
  per_chip: int
  fsdp: int
  tensor: int
  rho: float
  remat: str
  vae: str
  optimizer: str
  level: str

  @property
  def name(self) -> str:
    return f"{self.size}, {self.pixels} px, {self.topology}, {self.per_chip} images a chip"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
  parser.add_argument("--sizes", default="L")
  parser.add_argument("--pixels", default="1024")
  parser.add_argument("--per_chip", type=int, default=4, help="images a chip; at 512 px four times as many")
  parser.add_argument("--fsdp", type=int, default=16, help="chips that share one copy of the state")
  parser.add_argument("--tensor", type=int, default=1)
  parser.add_argument("--rho", type=float, default=0.8416, help="share of key blocks dropped; 0 for dense attention")
  parser.add_argument("--remat", default=_config().model.remat)
  parser.add_argument("--vae", default="tdvae2", help="preset of the encoder")
  parser.add_argument("--optimizer", default=_config().optimizer.name, choices=("adamw", "muon"))
  parser.add_argument("--level", default="O1", choices=("UNKNOWN", "O0", "O1", "O2", "O3"), help="of optimisation")
  parser.add_argument("--timeout", type=int, default=7200, help="seconds for one compilation")
  parser.add_argument("--table", help="Markdown file whose table gets these lines")
  parser.add_argument("--case", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case:
    print(json.dumps(compile_case(Case(**json.loads(args.case)))))
    return
  fitted = True
  for case in cases(args):
    result = case_process.run(__file__, dataclasses.asdict(case), args.timeout)
    fitted &= result.get("fits", False)
    print("\n".join(report(case, result)), flush=True)
    if args.table:
      path = pathlib.Path(args.table)
      path.write_text(pods_table.merge(path.read_text(), dataclasses.asdict(case), result))
  sys.exit(not fitted)


def _config():
  """The pod-scale job."""
  return config_file.load("configs/uwco.py:paper")


def cases(args: argparse.Namespace) -> list[Case]:
  """Those that the command line asks for."""
  fields = {name: getattr(args, name) for name in ("fsdp", "tensor", "rho", "remat", "vae", "optimizer", "level")}
  return [
    Case(topology, size, pixels, args.per_chip * (4 if pixels == 512 else 1), **fields)
    for size in args.sizes.split(",")
    for pixels in map(int, args.pixels.split(","))
    for topology in args.topologies.split(",")
  ]


def compile_case(case: Case) -> dict:
  """Compiles here; bytes, FLOPs, seconds for one chip."""
  _set_environment(case.level)
  import jax
  from jax.experimental import topologies
  from jax.extend import core

  from elasticdit_jax.evals.flops import count_flops
  from elasticdit_jax.train import sharding

  target, slices = TOPOLOGIES[case.topology]
  devices = topologies.get_topology_desc(platform="tpu", topology_name=target, num_slices=slices).devices
  layout = sharding.make(devices, fsdp=case.fsdp, tensor=case.tensor, slices=slices)
  begin = time.time()
  with layout.active():
    update, args, static = _step(case, layout)
    traced = update.trace(*args, **static)
    flops = count_flops(core.jaxpr_as_fun(traced.jaxpr), *traced.jaxpr.in_avals)
    model = _model_flops(case, layout, args, static["group"])
    lowered = traced.lower()
    seconds = {"trace_s": time.time() - begin}
    begin = time.time()
    compiled = lowered.compile()
    seconds["compile_s"] = time.time() - begin
  chip = accelerators.CHIPS[devices[0].device_kind]
  memory, chips = compiled.memory_analysis(), len(devices)
  hbm = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "generated_code")}
  total = sum(hbm.values()) - memory.alias_size_in_bytes
  found = hlo_collectives.count(compiled.as_text(), chips, slices)
  result = {"chips": chips, "chip": devices[0].device_kind, "layout": layout.describe(), **seconds, "hbm": hbm}
  result |= {"total": total, "fits": total <= chip.hbm, "batch": case.per_chip * chips}
  result |= {"flops": flops / chips, "model_flops": model / chips, "collectives": found}
  result["hbm_traffic"] = compiled.cost_analysis()["bytes accessed"]
  return result | {"roofline": roofline(result, chip), "jax": jax.__version__}


def roofline(result: dict, chip: accelerators.Chip) -> dict[str, float]:
  """Seconds that each part would take alone at the maker's peak rate; links one way, all at once."""
  sent = {where: sum(kind[where] for kind in result["collectives"].values()) for where in ("ici", "dcn")}
  seconds = {"compute": result["flops"] / chip.flops, "hbm": result["hbm_traffic"] / chip.hbm_bandwidth}
  seconds["ici"] = sent["ici"] / (chip.ici / 2)
  seconds["dcn"] = sent["dcn"] / (chip.dcn / 2) if sent["dcn"] else 0.0
  return seconds


def _set_environment(level: str) -> None:
  os.environ.update(JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_OPTIMIZATION_LEVEL=level)
  # These only keep the compiler from asking around for a TPU.
  quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
  for name, value in {**quiet, "TPU_WORKER_ID": "0"}.items():
    os.environ.setdefault(name, value)


def _step(case: Case, layout):
  """The update, its arguments as shapes where they will lie, and its static arguments."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec

  from elasticdit_jax.models import dit, tdvae
  from elasticdit_jax.models.codec import Codec
  from elasticdit_jax.train import optim, sharding, state, step

  cfg = layout.bind(_backbone(case))
  config = _config()
  optimizer = {**config.optimizer, "name": case.optimizer}
  rate = optim.schedule(optimizer, config.phases.init.steps)
  tx = optim.make(optimizer, dit.init_shapes(cfg), rate, layout.places)
  shapes = jax.eval_shape(lambda params: state.create(params, tx, 0), dit.init_shapes(cfg))
  places = layout.of(shapes)
  everywhere = jax.NamedSharding(layout.mesh, PartitionSpec())
  spread = jax.NamedSharding(layout.mesh, PartitionSpec(sharding.BATCH_AXES))

  def put(tree, place):
    place = place if isinstance(place, type(places)) else jax.tree.map(lambda _: place, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, place)

  vae = tdvae.PRESETS[f"{case.vae}-f8"]
  shift, scale = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((vae.latent_channels,), ()))
  codecs = put({8: Codec(vae, tdvae.init_shapes(vae), shift, scale)}, everywhere)
  update = step.make_step(
    cfg,
    _flow(),
    tx,
    ema_decay=config.train.ema_decay,
    round_once=layout.slices > 1,
    out_shardings=(places, everywhere) if not layout.single else None,
  )
  group = _group(case, cfg.depth)
  args = (put(shapes, places), codecs, put(_batch(case, cfg, layout.mesh.size), spread))
  return update, args, {"group": group, "trainable": group}


def _backbone(case: Case):
  from elasticdit_jax.models import dit

  config = _config()
  changes = {"text_length": config.data.text_length, "text_dim": config.data.text_dim, "remat": case.remat}
  return dataclasses.replace(dit.SIZES[case.size], dtype=config.model.dtype, **changes)


def _flow():
  from elasticdit_jax.train import step

  return step.FlowConfig(**_config().flow)


def _group(case: Case, depth: int):
  """flex-max, and flex-lite without a fifth of the blocks; f8, both of the same sparsity."""
  from elasticdit_jax import elastic

  routes = elastic.standard_routes(depth, range(1, 1 + depth // 5))
  pair = (routes["max-f8"], routes["lite-f8"])
  return tuple(dataclasses.replace(r, name=f"{r.name}-sparse", sparsity=(case.rho,) * depth) for r in pair)


def _batch(case: Case, cfg, chips: int):
  import jax
  import jax.numpy as jnp

  from elasticdit_jax.types import Batch, Text

  rows = case.per_chip * chips
  shape = jax.ShapeDtypeStruct
  text = Text(shape((rows, cfg.text_length, cfg.text_dim), jnp.float32), shape((rows, cfg.text_length), jnp.bool_))
  return Batch(shape((rows, case.pixels, case.pixels, 3), jnp.uint8), text, shape((rows,), jnp.int32))


def _model_flops(case: Case, layout, args: Sequence, group) -> int:
  """Losses and gradients without recomputation and without the encoder, for all chips."""
  import jax
  import jax.numpy as jnp

  from elasticdit_jax.evals.flops import count_flops
  from elasticdit_jax.train import step

  current, _, batch = args
  cfg, side = layout.bind(dataclasses.replace(_backbone(case), remat="none")), case.pixels // 8
  latents = {8: jax.ShapeDtypeStruct((batch.bad.shape[0], side, side, cfg.latent_channels), jnp.float32)}

  def loss(params, latents, text, key):
    return step.group_losses(cfg, _flow(), params, latents, text, key, group)[0]

  return count_flops(jax.grad(loss), current.params, latents, batch.text, current.key)


def report(case: Case, result: dict) -> list[str]:
  """What is printed about a case."""
  lines = [f"== {case.name}"]
  if "error" in result:
    return [*lines, f"FAILED: {result['error']}"]
  chip, gib = accelerators.CHIPS[result["chip"]], 2**30
  parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in result["hbm"].items())
  verdict = "fits" if result["fits"] else "DOES NOT FIT"
  lines += [f"{result['layout']}; global batch {result['batch']}"]
  lines += [f"HBM {result['total'] / gib:.2f} GiB of {chip.hbm / gib:.2f}: {verdict} ({parts})"]
  lines += [f"TFLOP {result['flops'] / 1e12:.2f}, of the model {result['model_flops'] / 1e12:.2f}"]
  lines += [f"traced in {result['trace_s']:.0f} s, compiled in {result['compile_s']:.0f} s"]
  for kind, found in result["collectives"].items():
    wires = f"{found['ici'] / 1e9:.3f} GB over ICI" + (
      f", {found['dcn'] / 1e9:.3f} GB over DCN" if found["dcn"] else ""
    )
    lines += [f"{kind}: {found['count']} with {found['bytes'] / 1e9:.3f} GB, {wires}"]
  seconds = result["roofline"]
  alone = ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in seconds.items())
  low, high = max(seconds.values()), sum(seconds.values())
  lines += [f"roofline, an estimate: {alone}; {1000 * low:.0f} ms if all overlap, {1000 * high:.0f} ms if nothing does"]
  share = result["model_flops"] / chip.flops
  return [*lines, f"MFU by that estimate: {share / low:.0%} and {share / high:.0%}"]


if __name__ == "__main__":
  main()
