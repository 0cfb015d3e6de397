"""Task `vae`: trains a VAE as an autoencoder, from nothing; `train.vae_stages` distils a T-DVAE from a teacher, and
`train.vae_family` trains several, students after their teachers.

    image --encoder--> z --(+ noise)--> decoder --> reconstruction        loss = L2 + l1 * L1 + energy * mean(z^2)

Noise and energy penalty together make a rate-distortion trade: an amplitude is worth its energy only as far as it lifts
a component of the image above the noise. Latents come out with energies that say what they mean to the picture.

The result is WORKDIR/vae_f8.safetensors or vae_f16.safetensors, with the latent statistics in its metadata.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from elasticdit_jax.data import pipeline
from elasticdit_jax.models import codec as codec_lib
from elasticdit_jax.train import loop, optim, state, vae_family, vae_report, vae_stages
from elasticdit_jax.train.checkpoint import Checkpointer, check_space
from elasticdit_jax.train.ranges import check_ranges
from elasticdit_jax.train.workdir import check_workdir, claim_workdir
from elasticdit_jax.train.writer import Writer
from elasticdit_jax.types import Batch, to_float


def make_step(
  cfg: codec_lib.Config, tx: optax.GradientTransformation, loss: Any, ema_decay: float
) -> Callable[..., tuple[state.TrainState, dict[str, jax.Array]]]:
  """The jitted update (state, batch) -> (state, metrics); the state is donated.

  Args:
    cfg: shape of the VAE.
    tx: optimiser.
    loss: object with `l1`, `noise` (standard deviation added to the latents) and `energy` (weight of mean(z^2)).
    ema_decay: of the exported weights.
  """
  vae = codec_lib.network(cfg)

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


def run(config: Any, workdir: str) -> None:
  """Trains (or resumes) in `workdir` and writes the weight files.

  Raises:
    ValueError: for a config or a workdir that does not fit; nothing has been written then.
  """
  if "runs" in config:
    vae_family.run(config, workdir, check, run_one)
  else:
    run_one(config, workdir)


def check(config: Any, codecs: Mapping[int, codec_lib.Codec] | None = None) -> codec_lib.Config:
  """The shape of the VAE that a config of one run trains, once everything it names has been found to fit.

  Args:
    config: of one run.
    codecs: its teachers by factor; None for those of config.teacher.

  Raises:
    ValueError: naming the field that does not fit.
  """
  return vae_stages.prepare(config, codecs).cfg if "stage1" in config else _prepare(config)[0]


def _prepare(config: Any) -> tuple[codec_lib.Config, tuple[Any, Any, Any], optax.GradientTransformation]:
  """Shape, (training source, validation source, encoder) and optimiser of a run in one stage; writes nothing."""
  check_ranges(config)
  cfg = vae_report.shape(config)
  schedule = optim.schedule(config.optimizer, config.train.steps)
  tx = optim.make(config.optimizer, codec_lib.init_shapes(cfg), schedule)
  return cfg, pipeline.source_from_config(config.data), tx


def run_one(config: Any, workdir: str, codecs: Mapping[int, codec_lib.Codec] | None = None) -> None:
  """`run` of a config without `runs`; arguments and errors as in `check`."""
  if "stage1" in config:
    vae_stages.run(config, workdir, codecs)
    return
  check_workdir(workdir, config, vae_report.NEUTRAL)
  cfg, (source, validation, encoder), tx = _prepare(config)
  current = state.create(vae_report.init(cfg, jax.random.key(config.seed)), tx, config.seed)
  step = make_step(cfg, tx, config.loss, config.train.ema_decay)
  settings = loop.Settings(
    stop=config.train.steps,
    log_every=config.train.log_every,
    save_every=config.train.save_every,
    batch_size=config.data.batch_size,
    resume_command="the same command with the same --workdir",
    phase=lambda _: f"vae f{config.factor}",
  )
  check_space(workdir, current)
  claim_workdir(workdir, config, vae_report.NEUTRAL)
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
      batches = pipeline.validation_batch(validation, encoder, config.data.batch_size, vae_report.STATISTICS_BATCHES)
      codec = vae_report.make_codec(cfg, current.ema, batches)
      vae_report.write(workdir, codec, batches, writer, config.train.steps)
