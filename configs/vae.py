"""Trains one side of the embedded VAE pair (nano T-DVAE, 16 latent channels) on rendered scenes, from nothing.

    python -m elasticdit_jax.main --config=configs/vae.py:factor=8 --workdir=runs/vae-f8
    python -m elasticdit_jax.main --config=configs/vae.py:factor=16 --workdir=runs/vae-f16

These two commands made the VAEs inside the package; each takes 14 minutes on one CPU core, and they may run side by
side. PSNR to expect on new scenes: 40 dB (f8), 38 dB (f16); the detector reads every picture as before. The result
is WORKDIR/vae_f8.safetensors or vae_f16.safetensors.
"""

from ml_collections import ConfigDict

from elasticdit_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, factor=8, debug=False)
  config = ConfigDict()
  config.task = "vae"
  config.seed = 0
  config.factor = args.factor
  # The codec may see every combination of colours and shapes: it reads no captions.
  config.data = common.scenes_data(
    seed=7, size=64 if args.debug else 128, batch_size=4 if args.debug else 8, split="any"
  )
  config.loss = ConfigDict({"l1": 0.1, "noise": 0.02, "energy": 0.025})
  config.optimizer = common.adamw(learning_rate=2e-3, warmup_steps=100, decay_fraction=0.5, weight_decay=1e-4)
  config.train = ConfigDict(
    {"steps": 20 if args.debug else 2500, "ema_decay": 0.995, "log_every": 100, "save_every": 1000}
  )
  return config.lock()
