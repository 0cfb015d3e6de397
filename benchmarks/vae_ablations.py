"""Ablations of T-DVAE on rendered scenes at 64 px: what the paper claims about its VAE, at a budget of minutes.

  python benchmarks/vae_ablations.py                  # everything: 22 minutes of a CPU core
  python benchmarks/vae_ablations.py --only=stages    # or bands, groups, plug
  python benchmarks/vae_ablations.py --only=plug --student=runs/vae-student    # of configs/vae.py:stages=two

  stages   one stage against two, the same number of updates; the two-stage one with and without perceptual loss and GAN
  bands    wavelet bands carried to the next level: LL, the paper's three, all four
  groups   dense against grouped convolutions of equal FLOPs
  plug     the backbone inside the package draws; its own decoder and a distilled one decode the same latents (Table 6)

Every VAE starts from random weights and sees the same pictures in the same order; metrics are means over 64 others.
One seed: read nothing into small differences. Prints Markdown.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from elasticdit_jax.configs import vae as vae_config
from elasticdit_jax.data import pipeline
from elasticdit_jax.evals import reconstruction, scene_eval
from elasticdit_jax.evals.flops import count_flops
from elasticdit_jax.generate import Pipeline
from elasticdit_jax.interop import vaes
from elasticdit_jax.models import tdvae
from elasticdit_jax.models.codec import Codec
from elasticdit_jax.train import optim, state, vae, vae_report, vae_stages

SIZE, BATCH, HELD_OUT = 64, 8, 64
NANO = tdvae.NANO[8]
GROUPED = dataclasses.replace(NANO, widths=(16, 64, 128), groups=(1, 4, 8), flow=32)
DENSE = dataclasses.replace(NANO, widths=(16, 44, 64), flow=24)
PICO = tdvae.PRESETS["pico-f8"]


def config(size: int = SIZE, **stages: int) -> ConfigDict:
  """The two-stage config at this size, with `stage1` and `stage2` steps."""
  made = vae_config.get_config("stages=two").unlock()
  made.data.update({"size": size, "batch_size": BATCH})
  made.optimizer.warmup_steps = 50
  made.train.update({"log_every": 200, "save_every": 10**9, "ema_decay": 0.99})
  for name, steps in stages.items():
    made[name].steps = steps
  return made


def one_stage(cfg: tdvae.VAEConfig, steps: int, **loss: float) -> Codec:
  """An autoencoder trained as a whole; without noise and energy it is free in how it codes."""
  options = config()
  losses = ConfigDict({"l1": 0.1, "noise": 0.0, "energy": 0.0} | loss)
  train, validation, encoder = pipeline.source_from_config(options.data)
  tx = optim.make(options.optimizer, tdvae.init_shapes(cfg), optim.schedule(options.optimizer, steps))
  current = state.create(tdvae.init(cfg, jax.random.key(0)), tx, 0)
  step = vae.make_step(cfg, tx, losses, options.train.ema_decay)
  with pipeline.make_batches(train, encoder, batch_size=BATCH, seed=0, caption_dropout=0.0) as batches:
    for _ in range(steps):
      current, _ = step(current, next(batches))
  held_out = pipeline.validation_batch(validation, encoder, BATCH, vae_report.STATISTICS_BATCHES)
  return vae_report.make_codec(cfg, current.ema, held_out)


def two_stages(cfg: tdvae.VAEConfig, options: ConfigDict) -> tuple[Codec, float]:
  """A student of the shipped f8 VAE, and its mean squared distance to the teacher's latents."""
  job = vae_stages.prepare(options)
  job = dataclasses.replace(job, cfg=cfg, txs=vae_stages.optimizers(options, cfg, job.critic))
  codec = vae_stages.exported(job, vae_stages.train(job, vae_stages.initial_state(job)))
  return codec, vae_stages.alignment(job, codec)


def quality(codec: Codec, size: int = SIZE) -> dict[str, float]:
  """PSNR, SSIM and the weight-free distance on held-out scenes."""
  pictures, _ = reconstruction.load_pictures("scenes", size, HELD_OUT)
  back = reconstruction.reconstruct(codec, np.stack([p.image for p in pictures]))
  return reconstruction.measure([p.image for p in pictures], list(back))


def megaflops(cfg: tdvae.VAEConfig) -> float:
  """Of encoding and decoding one picture of 64 px."""
  image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
  return count_flops(lambda p, x: tdvae.TDVAE(cfg).apply({"params": p}, x), tdvae.init_shapes(cfg), image) / 1e6


def describe(cfg: tdvae.VAEConfig) -> dict[str, str]:
  parameters = sum(x.size for x in jax.tree.leaves(tdvae.init_shapes(cfg)))
  return {"MFLOPs": f"{megaflops(cfg):.0f}", "parameters": f"{parameters:,}"}


def row(codec: Codec, **more: Any) -> dict[str, str]:
  found = quality(codec)
  return {
    "PSNR": f"{found['psnr']:.2f}",
    "SSIM": f"{found['ssim']:.4f}",
    "weight-free distance": f"{found['distance']:.4f}",
    **more,
  }


def stages(steps: int) -> dict[str, dict[str, str]]:
  plain = config(stage1=steps // 2, stage2=steps - steps // 2)
  plain.stage2.update({"perceptual": 0.0, "gan": 0.0, "noise": 0.0})
  full = config(stage1=steps // 2, stage2=steps - steps // 2)
  full.stage2.update({"gan_start": steps // 4, "noise": 0.0})
  distilled, error = two_stages(NANO, plain)
  gan, gan_error = two_stages(NANO, full)
  return {
    "one stage, free": row(one_stage(NANO, steps)),
    "one stage, noise and energy (the package's)": row(one_stage(NANO, steps, noise=0.02, energy=0.025)),
    "two stages, L2 + L1": row(distilled, **{"distance to teacher": f"{error:.3f}"}),
    "two stages, + perceptual + GAN": row(gan, **{"distance to teacher": f"{gan_error:.3f}"}),
    "teacher (the shipped f8 VAE)": row(reconstruction.load_vaes("shipped")["shipped f8"]),
  }


def bands(steps: int) -> dict[str, dict[str, str]]:
  shapes = {
    name: dataclasses.replace(NANO, carried_bands=count)
    for name, count in (("{LL}", 1), ("{LL, HL, LH} (the paper's)", 3), ("all four", 4))
  }
  return {name: row(one_stage(cfg, steps), **describe(cfg)) for name, cfg in shapes.items()}


def groups(steps: int) -> dict[str, dict[str, str]]:
  shapes = {"dense, widths 16, 44, 64": DENSE, "grouped 1, 4, 8, widths 16, 64, 128": GROUPED}
  return {name: row(one_stage(cfg, steps), **describe(cfg)) for name, cfg in shapes.items()}


def plug(steps: int, trained: str = "") -> dict[str, dict[str, str]]:
  """At 128 px, the size that the backbone draws; half the updates of the other sections, or a trained student."""
  options = config(size=128, stage1=steps // 4, stage2=steps // 4)
  options.stage2.gan_start = steps // 6
  if trained:
    student = vaes.load(trained)[8]
    error = vae_stages.alignment(vae_stages.prepare(options), student)
  else:
    student, error = two_stages(PICO, options)
  pipeline_ = Pipeline.load()
  teacher = pipeline_.model.codecs[8]
  rows = {}
  for name, codec in {"the teacher's decoder": teacher, "T-DVAE student, no retraining": student}.items():
    model = dataclasses.replace(pipeline_.model, codecs={8: codec})
    scores = scene_eval.evaluate_routes(Pipeline(model), ["max-f8"], 20)["max-f8"]
    rows[name] = {
      **{split: f"{100 * table['strict']['overall']:.1f} %" for split, table in scores.items()},
      "PSNR at 128 px": f"{quality(codec, 128)['psnr']:.2f}",
      **describe(codec.cfg),
      "distance to teacher": f"{error:.3f}" if codec is student else "0",
    }
  return rows


SECTIONS: Mapping[str, Callable[[int], dict[str, dict[str, str]]]] = {
  "stages": stages,
  "bands": bands,
  "groups": groups,
  "plug": plug,
}


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
  columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
  lines = [["", *columns], ["---", *["---:"] * len(columns)]]
  lines += [[name, *(cells.get(column, "–") for column in columns)] for name, cells in rows.items()]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", choices=SECTIONS, help="one section")
  parser.add_argument("--steps", type=int, default=800, help="updates per VAE")
  parser.add_argument("--student", default="", help="for plug: directory of a trained f8 VAE with the shipped latents")
  options = parser.parse_args()
  sections = {**SECTIONS, "plug": functools.partial(plug, trained=options.student)}
  for name in [options.only] if options.only else sections:
    begin = time.process_time()
    rows = sections[name](options.steps)
    sys.stdout.write(f"## {name}, {options.steps} updates\n\n{table(rows)}\n\n")
    sys.stdout.write(f"{time.process_time() - begin:.0f} CPU seconds on {jax.devices()[0].device_kind}\n\n")
    sys.stdout.flush()


if __name__ == "__main__":
  main()
