"""Unified Weight Co-Optimization on the embedded default: one weight set, four routes, pictures from all of them.

    python -m elasticdit_jax.main --config=configs/uwco.py

Starts from the backbone inside the package, so phase 1 is done: importance analysis, hybrid warm-up, flex-lite
specialisation, unified recovery, report. Open runs/uwco/report.md and runs/uwco/images.

Takes 11 minutes and 3 GB on two idle CPU cores. Strict score to expect in its report, seen / unseen combinations, +- 4:
max-f8 83 / 82, lite-f8 84 / 83, max-f16 84 / 86, lite-f16 84 / 78 (with configs/evaluate.py and 60 prompts per task,
+- 2: 87 / 85, 86 / 83, 87 / 83, 86 / 79); before phase 2 lite-f8 79 / 68 and lite-f16 84 / 73, because the weights
inside the package were trained with stochastic depth (docs/routes.md).

    :debug     64 pixels, a few steps of every phase, under 90 s with compilation
    :scratch   phase 1 from random weights as well, 23 minutes; unseen, +- 4: max-f8 62, lite-f8 55, max-f16 59,
               lite-f16 54
    :paper     the pod-scale job: size L, 1024 pixels, bfloat16; needs --config.data.path=DIR (captioned pictures) and
               --config.vae=DIR (vae_f8.safetensors and vae_f16.safetensors for photographs)
"""

from ml_collections import ConfigDict

from elasticdit_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, debug=False, scratch=False, paper=False)
  if args.debug + args.scratch + args.paper > 1:
    raise ValueError(f"one of debug, scratch and paper at a time, got {arg!r}")
  config = common.tiny_elastic(batch_size=32)
  config.task = "uwco"
  config.init = "shipped"
  pair_8, pair_16 = "max-f8+lite-f8", "max-f16+lite-f16"
  config.phases = ConfigDict(
    {
      "coarse": {"steps": 0, "routes": "max-f16"},
      "init": {"steps": 0, "routes": "max-f8,drop-f8,max-f8,drop-f8,max-f16"},
      "warmup": {"steps": 140, "routes": f"{pair_8},{pair_8},{pair_16}"},
      "specialise": {"steps": 580, "routes": "lite-f8,lite-f8,lite-f16"},
      "recover": {"steps": 460, "routes": f"{pair_8},{pair_8},{pair_16}"},
    }
  )
  config.optimizer.update({"learning_rate": 2e-3, "decay_fraction": 0.5})
  # Hundreds of steps, not thousands: a longer average would still hold the weights of the phase before.
  config.train.ema_decay = 0.99
  # Mostly the velocity of the given weights: a target without noise.
  config.train.distill = 4.0
  config.report.per_task = 16  # four snapshots are a sixth of the time
  if args.scratch:
    config.init = ""
    config.phases.coarse.steps, config.phases.init.steps = 1500, 1200
    config.optimizer.update({"learning_rate": 3e-3, "decay_fraction": 0.3})
    config.train.update({"ema_decay": 0.995, "distill": 4.0})
  if args.paper:
    _paper(config)
  if args.debug:
    common.shrink(config)
    # One program for each kind of step: compilation is most of the time.
    config.phases.warmup.routes = config.phases.recover.routes = pair_8
    config.phases.specialise.routes = "lite-f16"
  return config.lock()


def _paper(config: ConfigDict) -> None:
  """Sizes of the pod-scale job. The 20k steps of phase 3 are the paper's; it gives no others."""
  config.init, config.vae = "", ""
  config.model.update({"size": "L", "dtype": "bfloat16", "remat": "full"})
  config.data.update(
    {"source": "folder", "size": 1024, "batch_size": 1024, "text_length": 128, "text_dim": 2048, "max_words": 200_000}
  )
  config.flow.update({"std": 1.0, "shift": 3.0, "tokens": 4096})
  config.lite.skip = 6
  config.phases.init.routes = "max-f8,max-f8,max-f16"  # as published, without stochastic depth
  for phase, steps in (("init", 500_000), ("warmup", 20_000), ("specialise", 20_000), ("recover", 20_000)):
    config.phases[phase].steps = steps
  config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 2000, "decay_fraction": 0.1})
  config.train.update(
    {"ema_decay": 0.9999, "distill": 0.0, "log_every": 100, "save_every": 2000, "validation_batches": 1}
  )
