"""Trains the VAEs of the embedded default on rendered scenes, from nothing: a teacher, and what goes with it.

    python -m elasticdit_jax.main --config=configs/vae.py --workdir=runs/vae

makes, one after the other, the two VAEs inside the package (nano T-DVAE of 16 latent channels) and a student:

    runs/vae/f8        the teacher of the f8 side; an autoencoder
    runs/vae/f16       the f16 side; an autoencoder
    runs/vae/student   half the size of f8, distilled from it in two stages: what draws f8 latents also draws through it
    runs/vae           vae_f8.safetensors and vae_f16.safetensors of the first two, for --config.vae=runs/vae

52 minutes of CPU time; PSNR to expect on new scenes: 40 dB (f8), 38 dB (f16), 34 dB (student). Another processor rounds
otherwise and ends with other bits of the same quality.

One side alone, 14 minutes on one core; two of them may run side by side:

    python -m elasticdit_jax.main --config=configs/vae.py:factor=8 --workdir=runs/vae-f8
    python -m elasticdit_jax.main --config=configs/vae.py:factor=16 --workdir=runs/vae-f16

In two stages, from a teacher (ElasticDiT section 2.3.2): first the encoder learns the teacher's latents, then, with
the encoder frozen, the decoder learns to reconstruct with L2, a perceptual distance and PatchGAN.

    python -m elasticdit_jax.main --config=configs/vae.py:stages=two --workdir=runs/vae-student
    ... --config.teacher=DIR     a model directory, a workdir or a folder of diffusers; default: the VAEs in the package
    ... --config.model=pico      the shape of the student
    ... --config=configs/vae.py:stages=two,factor=16     targets are f8 latents averaged 2x2
    ... --config.stage1.target=reconstruction            no teacher: an autoencoder first, then its decoder alone
    ... --config.perceptual.kind=lpips --config.perceptual.weights=FILE     with your VGG16 weights as safetensors

Pictures of your own need no captions: --config.data.source=folder --config.data.path=DIR.

A teacher that is no T-DVAE, an AutoencoderKL in the layout of FLUX.1's, trained from nothing, for students of it:

    python -m elasticdit_jax.main --config=configs/vae.py:teacher --workdir=runs/vae-teacher
    ... --config=configs/vae.py:stages=two --config.teacher=runs/vae-teacher --workdir=runs/vae-of-kl

    :debug     every mode, 64 px and a few steps, under 90 s with compilation
"""

from typing import Any

from ml_collections import ConfigDict

from elasticdit_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, factor=0, stages="one", teacher=False, debug=False)
  if args.stages not in ("one", "two"):
    raise ValueError(f"argument 'stages={args.stages}' after the colon: expected stages=one or stages=two")
  if args.teacher and (args.stages, args.factor) not in (("one", 0), ("one", 8)):
    raise ValueError("argument 'teacher' after the colon: a teacher is f8 and trains in one stage; give it alone")
  config = ConfigDict()
  config.task = "vae"
  config.seed = 0
  # The codec may see every combination of colours and shapes: it reads no captions.
  config.data = common.scenes_data(seed=7, size=64 if args.debug else 128, batch_size=4 if args.debug else 8)
  config.data.split = "any"
  config.data.caption_field = ""
  config.optimizer = common.adamw(learning_rate=2e-3, warmup_steps=100, decay_fraction=0.5, weight_decay=1e-4)
  config.train = ConfigDict({"ema_decay": 0.995, "log_every": 100, "save_every": 1000})
  if args.teacher:
    config.update(_one_stage(8, args.debug))
    config.model = "teacher"
    config.data.size = 64
  elif args.stages == "two":
    config.update(_two_stages(args.factor or 8, args.debug))
  elif args.factor:
    config.update(_one_stage(args.factor, args.debug))
  else:
    config.runs = ConfigDict({f"f{factor}": _one_stage(factor, args.debug) for factor in (8, 16)})
    config.runs.student = {**_two_stages(8, args.debug), "teacher": "f8", "model": "pico"}
  return config.lock()


def _one_stage(factor: int, debug: bool) -> dict[str, Any]:
  return {
    "factor": factor,
    "loss": {"l1": 0.1, "noise": 0.02, "energy": 0.025},
    "train": {"steps": 20 if debug else 2500},
  }


def _two_stages(factor: int, debug: bool) -> dict[str, Any]:
  return {
    "factor": factor,
    "teacher": "shipped",
    "model": "nano",
    "branches": False,
    "stage1": {
      "steps": 10 if debug else 1000,
      "target": "average" if factor == 16 else "teacher",
      # Without a teacher only, as in the loss of the single stage.
      "l1": 0.1,
      "noise": 0.02,
      "energy": 0.025,
    },
    "stage2": {
      "steps": 10 if debug else 1500,
      "l2": 1.0,
      "l1": 0.1,
      "perceptual": 0.1,
      "gan": 0.1,
      "gan_start": 5 if debug else 1000,
      # Standard deviation on normalised latents: what a sampler draws is not exact either.
      "noise": 0.1,
    },
    "perceptual": {"kind": "wavelet", "weights": ""},
    "critic": {"width": 32, "layers": 2, "learning_rate": 2e-4, "b1": 0.5},
  }
