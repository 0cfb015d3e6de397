"""Task `vae` in two stages: a T-DVAE distilled from a teacher (ElasticDiT section 2.3.2).

  step 0 ... stage1.steps              encoder to the teacher's latents                              (Eq. 4)
       ... + stage2.gan_start          decoder: L2 + L1 + perceptual, encoder frozen bit for bit
       ... + stage2.steps              the same + PatchGAN                                           (Eq. 5)

One run, one checkpoint format: an interruption anywhere resumes bit-exactly. At the boundary the encoder becomes its
own moving average, and the decoder learns from exactly the latents that are exported.

The result is WORKDIR/vae_f8.safetensors or vae_f16.safetensors. A student of a teacher with the same factor keeps the
teacher's latent space: backbones trained on the teacher's latents decode through it as they are (plug and play).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from elasticdit_jax.data import pipeline
from elasticdit_jax.evals import perceptual as perceptual_lib
from elasticdit_jax.interop import lpips_weights
from elasticdit_jax.models import codec as codec_lib
from elasticdit_jax.models import discriminator, lpips, tdvae
from elasticdit_jax.train import loop, optim, vae_report, vae_steps, vae_teacher
from elasticdit_jax.train.checkpoint import Checkpointer, check_space
from elasticdit_jax.train.ranges import check_ranges
from elasticdit_jax.train.state import copy
from elasticdit_jax.train.workdir import check_workdir, claim_workdir
from elasticdit_jax.train.writer import Writer
from elasticdit_jax.types import Batch, to_float

PERCEPTUAL = ("wavelet", "lpips", "none")


@dataclasses.dataclass(frozen=True)
class Job:
  """Everything fixed over a run.

  Attributes:
    config: the task's config.
    cfg, critic: shapes of the VAE and of the critic.
    teacher: what stage 1 aligns with; None where it reconstructs.
    txs: the optimisers.
    perceptual: (parameters, a, b) -> distance [B], or None; and its parameters.
    held_out: batches that measure statistics and quality.
    batches: first step -> training batches from it on.
  """

  config: Any
  cfg: tdvae.VAEConfig
  critic: discriminator.DiscriminatorConfig
  teacher: vae_teacher.Teacher | None
  txs: vae_steps.Optimizers
  perceptual: Callable[[Any, jax.Array, jax.Array], jax.Array] | None
  perceptual_params: Any
  held_out: list[Batch]
  batches: Callable[[int], Any]

  @property
  def boundary(self) -> int:
    """Steps of stage 1."""
    return self.config.stage1.steps

  @property
  def stop(self) -> int:
    """Steps of both stages."""
    return self.config.stage1.steps + self.config.stage2.steps

  def adversarial(self, step: int) -> bool:
    """Whether the critic takes part in a step."""
    stage = self.config.stage2
    return bool(stage.gan) and step >= self.boundary + stage.gan_start

  def phase(self, step: int) -> str:
    """Name of what a step does."""
    name = "2-decoder+gan" if self.adversarial(step) else "2-decoder"
    return f"vae f{self.cfg.factor}/{'1-encoder' if step < self.boundary else name}"


def prepare(config: Any, codecs: Mapping[int, codec_lib.Codec] | None = None) -> Job:
  """Reads data, teacher and weights and checks that they fit; writes nothing.

  Args:
    config: the task's config.
    codecs: teachers by factor; None for those of config.teacher.

  Raises:
    ValueError: naming the field that does not fit.
  """
  check_ranges(config)
  cfg = vae_report.shape(config)
  if not isinstance(cfg, tdvae.VAEConfig):
    raise ValueError(f"config.model: a student is a T-DVAE, got {config.model!r}; train it with configs/vae.py:teacher")
  critic = discriminator.DiscriminatorConfig(config.critic.width, config.critic.layers)
  size = config.data.size
  if config.stage2.gan and size < critic.least_size:
    raise ValueError(
      f"config.data.size: {size} pixels are too few for a critic of {critic.layers} layers, expected at least"
      f" {critic.least_size}; lower config.critic.layers, or set config.stage2.gan to 0"
    )
  teacher = vae_teacher.load(config, cfg.latent_channels, codecs)
  distance, params = perceptual(config.perceptual, size)
  train, validation, encoder = pipeline.source_from_config(config.data)
  if size % cfg.factor:
    raise ValueError(f"config.data.size: expected a multiple of the VAE factor {cfg.factor}, got {size}")
  count = config.data.batch_size
  return Job(
    config=config,
    cfg=cfg,
    critic=critic,
    teacher=teacher,
    txs=optimizers(config, cfg, critic),
    perceptual=distance,
    perceptual_params=params,
    held_out=pipeline.validation_batch(validation, encoder, count, vae_report.STATISTICS_BATCHES),
    batches=lambda first: pipeline.make_batches(
      train, encoder, batch_size=count, seed=config.seed, start_step=first, caption_dropout=0.0
    ),
  )


def perceptual(config: Any, size: int) -> tuple[Callable[[Any, jax.Array, jax.Array], jax.Array] | None, Any]:
  """(distance, its parameters) of config.perceptual: `kind`, one of PERCEPTUAL, and `weights`, the file for "lpips".

  Raises:
    ValueError: for an unknown kind, a missing file, or pictures of `size` pixels that are too small.
  """
  if config.kind not in PERCEPTUAL:
    raise ValueError(f"config.perceptual.kind: expected one of {', '.join(PERCEPTUAL)}, got {config.kind!r}")
  if config.kind == "none":
    return None, {}
  if config.kind == "wavelet":
    return lambda params, a, b: perceptual_lib.distance(a, b), {}
  if size < lpips.LEAST_SIZE:
    raise ValueError(f"config.data.size: lpips needs at least {lpips.LEAST_SIZE} pixels, got {size}")
  try:
    return lpips.distance, lpips_weights.load(config.weights)
  except ValueError as e:
    raise ValueError(f"config.perceptual.weights: {e}") from None


def optimizers(config: Any, cfg: tdvae.VAEConfig, critic: discriminator.DiscriminatorConfig) -> vae_steps.Optimizers:
  """The three optimisers of a config; each stage has the whole schedule to itself."""
  parts = ("encoder", "decoder") if config.stage1.target == "reconstruction" else ("encoder",)
  shapes, steps = tdvae.init_shapes(cfg), {name: max(1, config[name].steps) for name in ("stage1", "stage2")}
  of_critic = config.optimizer.copy_and_resolve_references()
  with of_critic.unlocked():
    of_critic.update({"name": "adamw", "learning_rate": config.critic.learning_rate, "b1": config.critic.b1})

  def make(options, params, total):
    return optim.make(options, params, optim.schedule(options, total))

  return vae_steps.Optimizers(
    make(config.optimizer, {part: shapes[part] for part in parts}, steps["stage1"]),
    make(config.optimizer, shapes["decoder"], steps["stage2"]),
    make(of_critic, discriminator.init_shapes(critic), steps["stage2"]),
    parts,
  )


def initial_state(job: Job) -> vae_steps.State:
  """Random weights at step 0; the student's latents are the teacher's normalised ones: shift 0, scale 1."""
  seed = job.config.seed
  params = tdvae.init(job.cfg, jax.random.key(seed))
  if job.teacher is not None and job.cfg.shortcut:
    # Its output is multiplied by 2^levels, made for latents that an energy penalty keeps small; these have variance 1.
    shortcut = params["decoder"]["shortcut"]
    shortcut["kernel"] = shortcut["kernel"] * 0.5**job.cfg.levels
  critic = discriminator.init(job.critic, jax.random.fold_in(jax.random.key(seed), 1))
  return vae_steps.State(
    step=jnp.int32(0),
    params=params,
    ema=copy(params),
    critic=critic,
    opt_state=job.txs.init(params, critic),
    shift=jnp.zeros(job.cfg.latent_channels),
    scale=jnp.float32(1.0),
    key=jax.random.key(seed),
  )


def begin_stage2(job: Job, state: vae_steps.State) -> vae_steps.State:
  """The boundary: the averaged encoder is frozen, and the statistics of its latents are fixed.

  Latents aligned with a teacher of the same factor keep its normalisation; others are measured on the held-out
  pictures.
  """
  params = state.ema if job.teacher is None else {"encoder": state.ema["encoder"], "decoder": state.params["decoder"]}
  shift, scale = state.shift, state.scale
  if job.teacher is None or job.teacher.pool > 1:
    measured = vae_report.make_codec(job.cfg, params, job.held_out)
    shift, scale = measured.shift, measured.scale
  return dataclasses.replace(state, params=params, ema=copy(params), shift=shift, scale=scale)


def train(job: Job, state: vae_steps.State, **options: Any) -> vae_steps.State:
  """Both stages from state.step on; options go to `loop.run`."""
  config = job.config
  stage1 = vae_steps.make_stage1(job.cfg, job.txs, config.stage1, config.train.ema_decay)
  stage2 = vae_steps.make_stage2(
    job.cfg,
    job.critic,
    job.txs,
    config.stage2,
    job.perceptual,
    start=job.boundary,
    ema_decay=config.train.ema_decay,
  )

  def step(state, batch, number):
    if number < job.boundary:
      return stage1(state, job.teacher, batch)
    return stage2(state, job.perceptual_params, batch, job.adversarial(number))

  settings = loop.Settings(
    stop=job.stop,
    log_every=config.train.log_every,
    save_every=config.train.save_every,
    batch_size=config.data.batch_size,
    resume_command="the same command with the same --workdir",
    phase=job.phase,
  )
  hooks = {job.boundary: lambda state: begin_stage2(job, state)}
  return loop.run(state, job.batches, step, settings, start=int(state.step), hooks=hooks, **options)


def exported(job: Job, state: vae_steps.State) -> codec_lib.Codec:
  """What a finished run ships: averaged weights, branches merged."""
  cfg, params = tdvae.deploy(job.cfg, state.ema)
  return codec_lib.Codec(cfg, params, state.shift, state.scale)


def alignment(job: Job, codec: codec_lib.Codec) -> float:
  """Mean squared distance to the teacher's latents on the held-out pictures; their own variance is about 1."""

  @jax.jit
  def error(codec, teacher, image):
    z = codec.encode(to_float(image)) / codec.scale + codec.shift
    return jnp.mean(jnp.square(z - teacher.latents(to_float(image))))

  return float(np.mean([error(codec, job.teacher, batch.image) for batch in job.held_out]))


def run(config: Any, workdir: str, codecs: Mapping[int, codec_lib.Codec] | None = None) -> None:
  """Trains (or resumes) in `workdir` and writes the weight file.

  Args:
    config: the task's config.
    workdir: where the run lives.
    codecs: teachers by factor; None for those of config.teacher.

  Raises:
    ValueError: for a config or a workdir that does not fit; nothing has been written then.
  """
  check_workdir(workdir, config, vae_report.NEUTRAL)
  job = prepare(config, codecs)
  state = initial_state(job)
  check_space(workdir, state)
  claim_workdir(workdir, config, vae_report.NEUTRAL)
  with Checkpointer(workdir) as checkpoint:
    restored = checkpoint.restore_latest(state)
    state = restored[0] if restored else state
    with Writer(workdir, int(state.step)) as writer:
      state = train(job, state, checkpoint=checkpoint, writer=writer)
      codec = exported(job, state)
      if job.teacher is not None:
        error = alignment(job, codec)
        writer.scalars(job.stop, {"validation/latent_error": error})
        logging.info("vae f%d: mean squared distance to the teacher's latents %.4f", codec.factor, error)
      vae_report.write(workdir, codec, job.held_out, writer, job.stop)
