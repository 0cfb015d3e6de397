"""Times the training step along flex-max, flex-lite and both together (UWCO), on whatever JAX finds: CPU, GPU or TPU.

  python benchmarks/train_step.py                              # CPU: 4 blocks of size S, 256 tokens; else L, 1024
  python benchmarks/train_step.py --size=L --pixels=1024 --batch=8 --dtype=bfloat16 --remat=full
  python benchmarks/train_step.py --rho=0.8416                 # sparse routes as well
  pip install "elasticdit_jax[torch]"                          # adds the same step of diffusers' SD3 transformer

A step is that of the uwco task: noise, losses, gradients, clipping, AdamW, EMA, with float32 parameters; --vae adds an
encoder (a preset such as tdvae2), which is left out otherwise, as it is in torch's step. One process, with huge pages
where Linux gives them (GLIBC_TUNABLES=glibc.malloc.hugetlb=0 keeps it from asking); all candidates take turns, and the
least time counts. On a CPU it is that of all threads (user and system), which stays meaningful while other programs
run; wall time stands beside it, and is what counts on an accelerator.

MFU is 2 * multiply-accumulates of the model, forward and backward, without what is computed twice to save memory, over
the peak of the chip; on a CPU over the rate of a large float32 matrix product measured in between. "of ideal" is the
time over that of flex-max, divided by the share of blocks that run (for two routes: by the sum). MiB is the compiler's
account of the program: arguments, results and temporaries.
"""

import argparse
import dataclasses
import datetime
import functools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence

import accelerators
import jax
import jax.numpy as jnp
import numpy as np
import torch_dit

from elasticdit_jax import elastic, huge_pages
from elasticdit_jax.evals.flops import count_flops
from elasticdit_jax.models import dit, tdvae
from elasticdit_jax.models.codec import Codec
from elasticdit_jax.train import optim, state, step
from elasticdit_jax.types import Batch, Text

COLUMNS = "step, images/s, CPU ms, wall ms, TFLOP, MFU, MiB, of ideal, torch / ours"
TORCH = "torch, SD3 transformer"
_OPTIMIZER = {"name": "adamw", "learning_rate": 1e-4, "warmup_steps": 0, "decay_fraction": 0.0}
_OPTIMIZER |= {"weight_decay": 0.01, "b1": 0.9, "b2": 0.99, "clip_norm": 1.0}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Averaged:
  """Stands in for a VAE: latents are means of pixels, in 16 channels."""

  factor: int

  def encode(self, image: jax.Array) -> jax.Array:
    """[B, H, W, 3] -> [B, H / f, W / f, 16]."""
    batch, height, width, _ = image.shape
    cells = image.reshape(batch, height // self.factor, self.factor, width // self.factor, self.factor, 3)
    return jnp.tile(cells.mean((2, 4)), 6)[..., :16]


@dataclasses.dataclass
class Timed:
  """A step to time.

  Attributes:
    name: in the table.
    call: runs it once.
    flops: of the model.
    bytes: memory it needs; None where unknown.
    full, share: the step it is compared with, and the share of that one's blocks that it runs; "" for neither.
    seconds: of each turn, (CPU, wall).
  """

  name: str
  call: Callable[[], None]
  flops: float
  bytes: Callable[[], int | None]
  full: str = ""
  share: float = 0.0
  seconds: list[tuple[float, float]] = dataclasses.field(default_factory=list)

  def least(self, cpu: bool) -> float:
    """Of the CPU seconds, or of the wall seconds."""
    return min(pair[0 if cpu else 1] for pair in self.seconds)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  small = jax.default_backend() == "cpu"
  parser.add_argument("--size", default="S" if small else "L", choices=dit.SIZES)
  parser.add_argument("--depth", type=int, default=4 if small else 0, help="blocks; 0 for those of the size")
  parser.add_argument("--skip", type=int, default=0, help="blocks that flex-lite skips; 0 for a fifth")
  parser.add_argument("--pixels", type=int, default=256 if small else 512)
  parser.add_argument("--vae_factors", default="8", help="8, 16 or 8,16")
  parser.add_argument("--vae", default="", help="preset of the encoder, say tdvae2; empty for none")
  parser.add_argument("--batch", type=int, default=4 if small else 16)
  parser.add_argument("--rho", type=float, default=0.0, help="share of key blocks that sparse routes drop")
  parser.add_argument("--text", type=int, default=64 if small else 128, help="tokens of a caption")
  parser.add_argument("--dtype", default="float32" if small else "bfloat16")
  parser.add_argument("--remat", default="none")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--no_torch", action="store_true")
  for line in run(parser.parse_args()):
    print(line, flush=True)


def run(options: argparse.Namespace) -> Iterator[str]:
  """Header, then a line of the table for every step."""
  device = jax.devices()[0]
  yield f"{datetime.date.today()}, jax {jax.__version__}, {device.device_kind}, {platform.machine()}, {_cores()} cores"
  yield _shape(options)
  yield "| " + COLUMNS.replace(", ", " | ") + " |"
  yield "|---" * len(COLUMNS.split(", ")) + "|"
  candidates = list(ours(options))
  if torch_dit.installed() and not options.no_torch:
    candidates += [_torch(options, candidates[0].flops)]
  peaks = take_turns(candidates, options.repeats)
  yield from table(candidates, options.batch, peaks)


def _cores() -> int:
  return len(os.sched_getaffinity(0))


def _shape(options: argparse.Namespace) -> str:
  cfg = config(options)
  torch = torch_dit.version() if torch_dit.installed() and not options.no_torch else "no torch"
  return (
    f"width {cfg.width}, {cfg.depth} blocks, {options.pixels} px, batch {options.batch}, {options.text} text tokens,"
    f" {options.dtype}, remat {options.remat}, VAE {options.vae or 'left out'}; {torch}"
  )


def config(options: argparse.Namespace) -> dit.DiTConfig:
  """The backbone."""
  cfg = dit.SIZES[options.size]
  changes = {"text_length": options.text, "dtype": options.dtype, "remat": options.remat}
  return dataclasses.replace(cfg, depth=options.depth or cfg.depth, **changes)


def ours(options: argparse.Namespace) -> Iterator[Timed]:
  """Our steps; all of them move one state."""
  cfg = config(options)
  flow = step.FlowConfig(0.0, 1.0, 3.0, 4096)
  tx = optim.make(_OPTIMIZER, dit.init_shapes(cfg), 1e-4)
  # The device holds one state, however many steps there are.
  held = {"state": state.create(dit.init(cfg, jax.random.key(0)), tx, 0)}
  routes = _routes(cfg, options)
  codecs = {factor: _codec(factor, options.vae) for factor in {r.vae for group in routes for r in group}}
  batch = jax.device_put(_batch(cfg, options))
  update = step.make_step(cfg, flow, tx, ema_decay=0.999)
  for group in routes:
    compiled = update.lower(held["state"], codecs, batch, group=group, trainable=group).compile()

    def call(compiled=compiled) -> None:
      held["state"], metrics = compiled(held["state"], codecs, batch)
      jax.block_until_ready((held["state"], metrics))

    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    used -= memory.alias_size_in_bytes
    flops = model_flops(dataclasses.replace(cfg, remat="none"), flow, held["state"].params, codecs, batch, group)
    # The first of a group runs all blocks; lite alone is compared with the same.
    full = group[0].name.replace("lite", "max")
    share = sum(len(route.active) for route in group) / cfg.depth
    yield Timed(" + ".join(r.name for r in group), call, flops, lambda used=used: used, full, share)


def _routes(cfg: dit.DiTConfig, options: argparse.Namespace) -> list[step.Group]:
  skip = options.skip or max(1, cfg.depth // 5)
  standard = elastic.standard_routes(cfg.depth, range(1, 1 + skip))
  groups = []
  for factor in map(int, options.vae_factors.split(",")):
    pair = tuple(standard[f"{name}-f{factor}"] for name in ("max", "lite"))
    groups += [(pair[0],), (pair[1],), pair]
    if options.rho:
      sparse = tuple(dataclasses.replace(r, name=f"sparse-{r.name}", sparsity=(options.rho,) * cfg.depth) for r in pair)
      groups += [(sparse[0],), (sparse[1],), sparse]
  return groups


def _codec(factor: int, preset: str) -> Codec | Averaged:
  if not preset:
    return Averaged(factor)
  cfg = tdvae.PRESETS[f"{preset}-f{factor}"]
  return Codec(cfg, tdvae.init(cfg, jax.random.key(factor)), jnp.zeros(cfg.latent_channels), jnp.float32(1))


def _batch(cfg: dit.DiTConfig, options: argparse.Namespace) -> Batch:
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (options.batch, options.pixels, options.pixels, 3), np.uint8)
  words = rng.normal(size=(options.batch, cfg.text_length, cfg.text_dim)).astype(np.float32)
  return Batch(image, Text(words, np.ones(words.shape[:2], bool)), np.zeros(options.batch, np.int32))


def model_flops(cfg, flow, params, codecs, batch: Batch, group: step.Group) -> int:
  """FLOPs of losses and gradients of one step, encoders left out."""
  size = batch.image.shape[1]
  latents = {
    factor: jax.ShapeDtypeStruct((len(batch.image), size // factor, size // factor, cfg.latent_channels), jnp.float32)
    for factor in codecs
  }
  loss = functools.partial(step.group_losses, cfg, flow, key=jax.random.key(0), group=group)
  return count_flops(jax.grad(lambda p, x, text: loss(p, x, text)[0]), params, latents, batch.text)


def _torch(options: argparse.Namespace, flops: float) -> Timed:
  cfg = config(options)
  latent = options.pixels // int(options.vae_factors.split(",")[0])
  call, peak = torch_dit.make_step(
    width=cfg.width,
    depth=cfg.depth,
    head_dim=cfg.head_dim,
    text=(options.text, cfg.text_dim),
    latent=latent,
    batch=options.batch,
    dtype=options.dtype,
    remat=options.remat != "none",
  )
  return Timed(TORCH, call, flops, peak)


def take_turns(candidates: Sequence[Timed], repeats: int) -> list[float]:
  """Fills in the seconds; returns the FLOP/s of a matrix product of float32 measured in every turn."""
  x = jnp.ones((2048, 2048))
  product = jax.jit(lambda a: a @ a)
  peaks = []
  for turn in range(repeats + 1):
    for candidate in candidates:
      cpu, wall = clock(candidate.call)
      if turn:  # the first one warms up
        candidate.seconds.append((cpu, wall))
    cpu, _ = clock(lambda: jax.block_until_ready(product(x)))
    peaks.append(2 * 2048**3 / max(cpu, 1e-9))
  return peaks


def clock(call: Callable[[], None]) -> tuple[float, float]:
  cpu, wall = time.process_time(), time.perf_counter()
  call()
  return time.process_time() - cpu, time.perf_counter() - wall


def table(candidates: Sequence[Timed], batch: int, peaks: Sequence[float]) -> Iterator[str]:
  """A line per candidate."""
  device = jax.devices()[0]
  cpu = device.platform == "cpu"
  chip = accelerators.CHIPS.get(device.device_kind)
  # CPU time is summed over threads, and so is the rate of the product: per second of one core.
  peak = max(peaks) if cpu else chip.flops if chip else None
  seconds = {c.name: c.least(cpu) for c in candidates}
  for number, c in enumerate(candidates):
    own, used = seconds[c.name], c.bytes()
    cells = [c.name, f"{batch / c.least(cpu=False):.2f}", *(f"{1000 * c.least(kind):.0f}" for kind in (True, False))]
    cells += [f"{c.flops / 1e12:.3f}", f"{c.flops / own / peak:.1%}" if peak else "–"]
    cells += [f"{used / 2**20:.0f}" if used else "–", f"{own / seconds[c.full] / c.share:.1%}" if c.full else "–"]
    cells += [f"{seconds[TORCH] / own:.2f}" if TORCH in seconds and not number else "–"]
    yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  huge_pages.restart_with_them()
  main()
