"""Task `vae`: trains one T-DVAE as an autoencoder, from nothing.

    image --encoder--> z --(+ noise)--> decoder --> reconstruction        loss = L2 + l1 * L1 + energy * mean(z^2)

Noise and energy penalty together make a rate-distortion trade: an amplitude is worth its energy only as far as it lifts
a component of the image above the noise. Latents come out with energies that say what they mean to the picture.

The result is WORKDIR/vae_f8.safetensors or vae_f16.safetensors, with the latent statistics in its metadata.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from elasticdit_jax.data import pipeline
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import codec as codec_lib
from elasticdit_jax.models import tdvae
from elasticdit_jax.train import loop, optim, state
from elasticdit_jax.train.checkpoint import Checkpointer, check_space
from elasticdit_jax.train.ranges import check_ranges
from elasticdit_jax.train.workdir import check_workdir, claim_workdir
from elasticdit_jax.train.writer import Writer
from elasticdit_jax.types import Batch, to_float

# May differ between two starts of one run.
NEUTRAL = ("train.log_every", "train.save_every", "data.max_bad_fraction")
_STATISTICS_BATCHES = 16


def make_step(
  cfg: tdvae.VAEConfig, tx: optax.GradientTransformation, loss: Any, ema_decay: float
) -> Callable[..., tuple[state.TrainState, dict[str, jax.Array]]]:
  """The jitted update (state, batch) -> (state, metrics); the state is donated.

  Args:
    cfg: shape of the VAE.
    tx: optimiser.
    loss: object with `l1`, `noise` (standard deviation added to the latents) and `energy` (weight of mean(z^2)).
    ema_decay: of the exported weights.
  """
  vae = tdvae.TDVAE(cfg)

  def loss_fn(params, image, key):
    z = vae.apply({"params": params}, image, method="encode")
    noisy = z + loss.noise * jax.random.normal(key, z.shape)
    error = vae.apply({"params": params}, noisy, image.shape[1:3], method="decode") - image
    mse, energy = jnp.mean(jnp.square(error)), jnp.mean(jnp.square(z))
    total = mse + loss.l1 * jnp.mean(jnp.abs(error)) + loss.energy * energy
    return total, {"loss": total, "psnr": 10 * jnp.log10(4.0 / mse), "latent_energy": energy}

  def update(current: state.TrainState, batch: Batch):
    key = jax.random.fold_in(current.key, current.step)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(current.params, to_float(batch.image), key)
    updates, opt_state = tx.update(grads, current.opt_state, current.params)
    params = optax.apply_updates(current.params, updates)
    ema = optim.ema_update(current.ema, params, current.step, ema_decay)
    metrics["grad_norm"] = optax.tree.norm(grads)
    return state.TrainState(current.step + 1, params, opt_state, ema, current.key), metrics

  return jax.jit(update, donate_argnums=0)


def make_codec(cfg: tdvae.VAEConfig, params: Any, batches: list[Batch]) -> codec_lib.Codec:
  """A codec whose latent statistics are measured on these batches."""
  encode = jax.jit(lambda p, x: tdvae.TDVAE(cfg).apply({"params": p}, to_float(x), method="encode"))
  latents = jnp.concatenate([encode(params, batch.image) for batch in batches])
  return codec_lib.Codec(cfg, params, *codec_lib.fit_statistics(latents))


def reconstruct(codec: codec_lib.Codec, image: np.ndarray) -> np.ndarray:
  """uint8 [B, H, W, 3] through the codec and back, uint8."""
  return np.asarray(_round_trip(codec, image))


@jax.jit
def _round_trip(codec: codec_lib.Codec, image: jax.Array) -> jax.Array:
  return codec_lib.to_uint8(codec.decode(codec.encode(to_float(image)), image.shape[1:3]))


def run(config: Any, workdir: str) -> None:
  """Trains (or resumes) in `workdir` and writes the weight file.

  Raises:
    ValueError: for a config or a workdir that does not fit; nothing has been written then.
  """
  check_workdir(workdir, config, NEUTRAL)
  check_ranges(config)
  cfg = tdvae.NANO.get(config.factor)
  if cfg is None:
    raise ValueError(f"config.factor: expected 8 or 16, got {config.factor}")
  source, validation, encoder = pipeline.source_from_config(config.data)
  tx = optim.make(config.optimizer, tdvae.init_shapes(cfg), optim.schedule(config.optimizer, config.train.steps))
  current = state.create(tdvae.init(cfg, jax.random.key(config.seed)), tx, config.seed)
  step = make_step(cfg, tx, config.loss, config.train.ema_decay)
  settings = loop.Settings(
    stop=config.train.steps,
    log_every=config.train.log_every,
    save_every=config.train.save_every,
    batch_size=config.data.batch_size,
    resume_command=f"the same command with --workdir={workdir}",
    phase=lambda _: f"vae f{config.factor}",
  )
  check_space(workdir, current)
  claim_workdir(workdir, config, NEUTRAL)
  with Checkpointer(workdir) as checkpoint:
    restored = checkpoint.restore_latest(current)
    start = 0
    if restored:
      current, start = restored[0], int(restored[0].step)
    with Writer(workdir, start) as writer:
      current = loop.run(
        current,
        lambda first: pipeline.make_batches(
          source, encoder, batch_size=config.data.batch_size, seed=config.seed, start_step=first, caption_dropout=0.0
        ),
        lambda s, batch, _: step(s, batch),
        settings,
        start=start,
        checkpoint=checkpoint,
        writer=writer,
      )
      batches = pipeline.validation_batch(validation, encoder, config.data.batch_size, _STATISTICS_BATCHES)
      codec = make_codec(cfg, current.ema, batches)
      _report(workdir, codec, batches, writer, config.train.steps)


def _report(workdir: str, codec: codec_lib.Codec, batches: list[Batch], writer: Writer, step: int) -> None:
  model_dir.save_codecs(workdir, {codec.factor: codec})
  images = np.concatenate([b.image for b in batches])
  back = np.concatenate([reconstruct(codec, b.image) for b in batches])
  mse = np.square((images.astype(np.float64) - back) / 255.0).mean((1, 2, 3))
  psnr = float(np.mean(-10 * np.log10(mse)))
  pairs = np.concatenate([np.concatenate(list(images[:8]), 1), np.concatenate(list(back[:8]), 1)])
  writer.scalars(step, {"validation/psnr": psnr})
  writer.image(step, "validation/pairs", pairs)
  logging.info(
    "vae f%d: validation PSNR %.2f dB; wrote %s", codec.factor, psnr, os.path.join(workdir, "vae_*.safetensors")
  )
