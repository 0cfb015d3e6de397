"""Prints what the autoencoders cost: compute beside Table 5 of the paper, parameters, and time of the decoders.

  python benchmarks/vae.py                          # the table: counted, nothing runs, a minute
  python benchmarks/vae.py --time --size=512        # adds decoding on whatever JAX finds, some minutes on two cores
  pip install "elasticdit_jax[torch]"               # adds torch's Flux decoder (diffusers, channels_last)

Compute is of one encoding and one decoding at 1024 px, 2 FLOPs per multiply-add, counted in the jaxpr. The paper's
count leaves out the products of attention and all element-wise work; "true" has the products. "fused" runs nearest
upsampling and its convolution as four convolutions at the low resolution, which is the default and exact.

Times are of random weights in float32, one picture, one process; all decoders take turns and the fastest turn counts.
CPU ms are user and system time of all threads, wall ms what a clock shows; ratios are those of CPU time on a CPU, which
other programs disturb less, and of wall time elsewhere.
"""

import argparse
import datetime
import math
import os
import platform
import time
from collections.abc import Callable

# Threads of OpenMP that spin while they wait would count as work, torch's and that of whoever runs next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from elasticdit_jax.evals.flops import count_flops  # noqa: E402
from elasticdit_jax.interop import diffusers_vae  # noqa: E402
from elasticdit_jax.models import autoencoder_kl, tdvae  # noqa: E402
from elasticdit_jax.models.autoencoder_kl import KL_PRESETS, AutoencoderKL  # noqa: E402

# Name here -> (name in the paper, TFLOPs in the paper).
PAPER = {
  "flux": ("Flux / SD3", 14.34),
  "sd": ("SD", 14.33),
  "ostris-f8-d16": ("Ostris", 7.35),
  "tdvae1-f8": ("T-DVAE1", 3.37),
  "tdvae2-f8": ("T-DVAE2", 1.81),
}
OTHERS = ("tdvae1-f16", "tdvae2-f16", "tdvae2-dense-f8", "nano-f8", "nano-f16", "pico-f8")
TIMED = ("flux", "tdvae1-f8", "tdvae2-f8", "tdvae1-f16", "tdvae2-f16", "nano-f8")
SIZE = 1024


def network(name: str, fused: bool = True) -> tuple[tdvae.TDVAE | AutoencoderKL, dict]:
  """(module, shapes of its parameters)."""
  if name in KL_PRESETS:
    return AutoencoderKL(KL_PRESETS[name], fused), autoencoder_kl.init_shapes(KL_PRESETS[name])
  return tdvae.TDVAE(tdvae.PRESETS[name], fused), tdvae.init_shapes(tdvae.PRESETS[name])


def teraflops(name: str, *, fused: bool, attention: bool) -> float:
  """Of one encoding and one decoding at 1024 px."""
  module, shapes = network(name, fused)
  image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  return count_flops(lambda p, x: module.apply({"params": p}, x), shapes, image, attention=attention) / 1e12


def table() -> list[str]:
  """The lines of the table of compute and parameters, in Markdown."""
  lines = [
    "| | paper, TFLOPs | ours | ours / paper | true | true, fused | encoder, M | decoder, M |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
  ]
  for name in (*PAPER, *OTHERS):
    title, published = PAPER.get(name, (name, math.nan))
    counted = teraflops(name, fused=False, attention=False)
    true, fused = (teraflops(name, fused=f, attention=True) for f in (False, True))
    shapes = network(name)[1]
    sizes = {side: sum(leaf.size for leaf in jax.tree.leaves(shapes[side])) / 1e6 for side in ("encoder", "decoder")}
    paper = (
      f"– | {counted:.3f} | –"
      if math.isnan(published)
      else (f"{published:.2f} | {counted:.3f} | {counted / published:.4f}")
    )
    lines.append(f"| {title} | {paper} | {true:.3f} | {fused:.3f} | {sizes['encoder']:.2f} | {sizes['decoder']:.2f} |")
  return lines


def decoder(name: str, size: int, seed: int = 0) -> Callable[[], None]:
  """A call that decodes one picture with random weights and waits for it."""
  module, shapes = network(name)
  shapes = {part: tree for part, tree in shapes.items() if part in ("decoder", "post_quant_conv")}
  leaves, structure = jax.tree.flatten(shapes)
  rng = np.random.default_rng(seed)
  params = structure.unflatten([jnp.asarray(rng.normal(size=x.shape) * 0.05, jnp.float32) for x in leaves])
  side = size // module.cfg.factor
  z = jnp.asarray(rng.normal(size=(1, side, side, module.cfg.latent_channels)), jnp.float32)
  run = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode")).lower(params, z).compile()
  return lambda: jax.block_until_ready(run(params, z))


def torch_decoder(size: int) -> Callable[[], None] | None:
  """torch's Flux decoder, or None where torch or diffusers is not installed."""
  try:
    import torch
    from diffusers import AutoencoderKL as Theirs
  except ImportError:
    return None
  cfg = KL_PRESETS["flux"]
  fields = {k: v for k, v in diffusers_vae.to_json(cfg).items() if k != "_class_name"}
  gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
  device = "cuda" if gpu else "cpu"
  model = Theirs(**fields).eval().to(device).to(memory_format=torch.channels_last)
  side = size // cfg.factor
  z = torch.randn(1, cfg.latent_channels, side, side, device=device).to(memory_format=torch.channels_last)

  def run() -> None:
    with torch.inference_mode():
      model.decode(z)
    if gpu:
      torch.cuda.synchronize()

  return run


def measure(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
  """{name: (CPU seconds, wall seconds)}: the fastest of `repeats` turns, after one that is not counted."""
  best = dict.fromkeys(calls, (math.inf, math.inf))
  for turn in range(repeats + 1):
    for name, call in calls.items():
      wall, cpu = time.perf_counter(), time.process_time()
      call()
      spent = time.process_time() - cpu, time.perf_counter() - wall
      if turn:
        best[name] = tuple(map(min, zip(best[name], spent, strict=True)))
  return best


def timing_table(size: int, repeats: int, names: tuple[str, ...]) -> list[str]:
  """Times of the decoders at `size` pixels, in Markdown."""
  calls = {name: decoder(name, size) for name in names}
  theirs = torch_decoder(size)
  if theirs:
    calls["flux, torch"] = theirs
  times = measure(calls, repeats)
  clock = 0 if jax.default_backend() == "cpu" else 1
  unit = times["flux"][clock]
  lines = [f"| decoder at {size} px | CPU ms | wall ms | times faster than flux here |", "|---|---:|---:|---:|"]
  for name, (cpu, wall) in times.items():
    lines.append(f"| {name} | {1e3 * cpu:.0f} | {1e3 * wall:.0f} | {unit / (cpu, wall)[clock]:.2f} |")
  if not theirs:
    lines.append("| flux, torch | torch or diffusers is not installed | | |")
  return lines


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--time", action="store_true", help="also time the decoders")
  parser.add_argument("--size", type=int, default=512, help="pixels per side of the decoded picture")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--decoders", default=",".join(TIMED), help="which to time; flux is needed")
  args = parser.parse_args()
  names = tuple(args.decoders.split(","))
  unknown = [name for name in names if name not in KL_PRESETS and name not in tdvae.PRESETS]
  if unknown or "flux" not in names:
    parser.error(
      f"--decoders: expected flux and others of {', '.join((*KL_PRESETS, *tdvae.PRESETS))}, got {args.decoders}"
    )
  if args.size < 16 or args.size % 16 or args.repeats < 1:
    parser.error(f"--size: expected a multiple of 16, got {args.size}; --repeats: at least 1, got {args.repeats}")
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {datetime.date.today()}\n")
  print("\n".join(table()), flush=True)
  if args.time:
    print()
    print("\n".join(timing_table(args.size, args.repeats, names)))


if __name__ == "__main__":
  main()
