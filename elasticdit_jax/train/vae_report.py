"""What the VAE tasks share around their steps: the shape a config names, latent statistics, the file, its figures."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from elasticdit_jax.evals import image_metrics
from elasticdit_jax.evals.reconstruction import reconstruct
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import codec as codec_lib
from elasticdit_jax.models import tdvae
from elasticdit_jax.models.autoencoder_kl import KLConfig
from elasticdit_jax.train.writer import Writer
from elasticdit_jax.types import Batch, to_float

# May differ between two starts of one run.
NEUTRAL = ("train.log_every", "train.save_every", "data.max_bad_fraction")
STATISTICS_BATCHES = 16
# The layout of FLUX.1's VAE, with a level of width for every one of its own, for CPUs.
TEACHER = KLConfig((16, 32, 48, 64), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0, shift_factor=0.0)


def init(cfg: codec_lib.Config, key: jax.Array) -> dict:
  """Random parameters of a T-DVAE or an AutoencoderKL, float32."""
  image = jnp.zeros((1, 2 * cfg.factor, 2 * cfg.factor, 3))
  return jax.jit(lambda k: codec_lib.network(cfg).init(k, image)["params"])(key)


def make_codec(cfg: codec_lib.Config, params: Any, batches: list[Batch]) -> codec_lib.Codec:
  """A codec whose latent statistics are measured on these batches.

  An AutoencoderKL gets one shift for all channels, as in the config.json of diffusers.
  """
  encode = jax.jit(lambda p, x: codec_lib.network(cfg).apply({"params": p}, to_float(x), method="encode"))
  latents = jnp.concatenate([encode(params, batch.image) for batch in batches])
  shift, scale = codec_lib.fit_statistics(latents)
  if isinstance(cfg, KLConfig):
    shift = jnp.full_like(shift, latents.mean())
    scale = 1.0 / jnp.sqrt(jnp.square(latents - shift).mean())
  return codec_lib.Codec(cfg, params, shift, scale)


def write(workdir: str, codec: codec_lib.Codec, batches: list[Batch], writer: Writer, step: int) -> None:
  """Writes the weight file, and PSNR, SSIM and pairs of pictures to TensorBoard."""
  model_dir.save_codecs(workdir, {codec.factor: codec})
  images = np.concatenate([b.image for b in batches])
  back = np.concatenate([reconstruct(codec, b.image) for b in batches])
  psnr, ssim = (float(jnp.mean(metric(images, back))) for metric in (image_metrics.psnr, image_metrics.ssim))
  pairs = np.concatenate([np.concatenate(list(images[:8]), 1), np.concatenate(list(back[:8]), 1)])
  writer.scalars(step, {"validation/psnr": psnr, "validation/ssim": ssim})
  writer.image(step, "validation/pairs", pairs)
  file = os.path.join(workdir, f"vae_f{codec.factor}.safetensors")
  logging.info("vae f%d: validation PSNR %.2f dB, SSIM %.4f; wrote %s", codec.factor, psnr, ssim, file)


def shape(config: Any) -> codec_lib.Config:
  """The VAE that a config names by `factor` and, where it has them, `model` and `branches`.

  Raises:
    ValueError: for a name or factor that there is not.
  """
  if config.factor not in (8, 16):
    raise ValueError(f"config.factor: expected 8 or 16, got {config.factor}")
  model = config.get("model", "nano")
  if model == "teacher" and config.factor == 8:
    return TEACHER
  name = f"{model}-f{config.factor}"
  if name not in tdvae.PRESETS:
    known = sorted({preset.rpartition("-")[0] for preset in tdvae.PRESETS if preset.endswith(f"-f{config.factor}")})
    raise ValueError(f"config.model: expected one of {', '.join(known)} for f{config.factor}, got {model!r}")
  cfg = tdvae.NANO[config.factor] if model == "nano" else tdvae.PRESETS[name]
  return dataclasses.replace(cfg, branches=config.get("branches", False))
