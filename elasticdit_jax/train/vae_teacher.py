"""What stage 1 aligns an encoder with: the latents of a teacher, as they are or averaged 2x2 for f16."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from elasticdit_jax.interop import vaes
from elasticdit_jax.models.codec import Codec

TARGETS = ("teacher", "average", "reconstruction")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codec",), meta_fields=("pool",))
@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen VAE; a pytree, so that it enters jitted functions as an argument.

  Attributes:
    codec: encodes images to normalised latents (unit overall variance), the space that backbones are trained in.
    pool: latent cells per side that are averaged into one: 1, or 2 where an f16 student learns from an f8 teacher.
  """

  codec: Codec
  pool: int = 1

  def latents(self, image: jax.Array) -> jax.Array:
    """[B, H, W, 3] in [-1, 1], H and W multiples of the student's factor -> targets [B, h, w, C]."""
    z = self.codec.encode(image)
    batch, h, w, channels = z.shape
    return z.reshape(batch, h // self.pool, self.pool, w // self.pool, self.pool, channels).mean((2, 4))


def load(config: Any, latent_channels: int, codecs: Mapping[int, Codec] | None = None) -> Teacher | None:
  """The teacher that config.teacher and config.stage1.target ask for; None where the target is the reconstruction.

  Args:
    config: fields factor (of the student), teacher ("shipped", a model directory or workdir with vae_f*.safetensors, or
      the folder of a diffusers AutoencoderKL) and stage1.target, one of TARGETS.
    latent_channels: of the student.
    codecs: by factor, where config.teacher only names what is at hand already.

  Raises:
    ValueError: where it is not there or does not fit the student.
  """
  target = config.stage1.target
  if target not in TARGETS:
    raise ValueError(f"config.stage1.target: expected one of {', '.join(TARGETS)}, got {target!r}")
  if target == "reconstruction":
    return None
  if target == "average" and config.factor != 16:
    raise ValueError(
      f"config.stage1.target: 'average' halves the grid of an f8 teacher for an f16 student, here is f{config.factor};"
      " use 'teacher'"
    )
  if not config.teacher:
    raise ValueError(
      "config.teacher: stage 1 needs a teacher, got ''; give 'shipped', a model directory or the folder of a diffusers"
      " AutoencoderKL, or set --config.stage1.target=reconstruction"
    )
  factor = 8 if target == "average" else config.factor
  codecs = vaes.load(config.teacher) if codecs is None else codecs
  if factor not in codecs:
    hint = "set --config.stage1.target=average to learn from its f8 latents" if factor == 16 else "choose another one"
    raise ValueError(f"config.teacher: {config.teacher} has no f{factor} VAE; {hint}")
  channels = codecs[factor].cfg.latent_channels
  if channels != latent_channels:
    raise ValueError(
      f"config.teacher: its latents have {channels} channels, those of the student {latent_channels}; choose a teacher"
      f" of {latent_channels}"
    )
  return Teacher(codecs[factor], config.factor // factor)
