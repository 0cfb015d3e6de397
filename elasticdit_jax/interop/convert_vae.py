"""Converts one VAE file: from diffusers, to diffusers, or from training form to deployed form.

    python -m elasticdit_jax.interop.convert_vae --vae=FLUX.1-dev/vae --out=vaes
    python -m elasticdit_jax.interop.convert_vae --vae=ae.safetensors --shape=flux --out=vaes
    python -m elasticdit_jax.interop.convert_vae --vae=vaes --out=folder --to=diffusers
    python -m elasticdit_jax.interop.convert_vae --vae=runs/vae-f8 --out=deployed

--to=model, the default, writes OUT/vae_f8.safetensors (or vae_f16), which `config.vae` and `config.teacher` take. The
branches that a T-DVAE may have in training are merged into one kernel per convolution; the metadata of the file says in
`config` whether it has branches.
"""

import os
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from elasticdit_jax.interop import diffusers_vae, model_dir

FLAGS = flags.FLAGS


def convert(vae: str, out: str, *, shape: str | None = None, to: str = "model", dtype: str = "float32") -> list[str]:
  """Reads a VAE, merges training branches, writes it; returns the files written.

  Args:
    vae: folder of diffusers, one .safetensors file of an AutoencoderKL, or a directory with vae_f*.safetensors.
    out: the directory.
    shape: of a lone file, see interop.diffusers_vae.load.
    to: "model" or "diffusers".
    dtype: of the weights of a model.

  Raises:
    ValueError: where `vae` cannot be read, or `out` cannot hold it; nothing is written then.
  """
  lone = not os.path.isdir(vae) or diffusers_vae.is_folder(vae)
  codecs = [diffusers_vae.load(vae, shape)] if lone else list(model_dir.load_codecs(vae).values())
  codecs = [codec.deploy() for codec in codecs]
  if to == "diffusers":
    if len(codecs) != 1:
      raise ValueError(f"--vae: {vae} holds {len(codecs)} VAEs, a folder of diffusers holds one; leave one file there")
    diffusers_vae.save(out, codecs[0])
  else:
    model_dir.check_replaceable(out)
    model_dir.save_codecs(out, {codec.factor: codec for codec in codecs}, dtype)
  return sorted(os.path.join(out, name) for name in os.listdir(out))


def _define_flags() -> None:
  """In a function, because other commands have flags of the same names and tests import them all."""
  flags.DEFINE_string(
    "vae", None, "Folder of diffusers, .safetensors file, or directory with vae_f*.safetensors.", required=True
  )
  flags.DEFINE_string("out", None, "The directory to write.", required=True)
  flags.DEFINE_string("shape", None, "Of a file without config.json: flux, sd3, sd, sdxl, ..., or the path of one.")
  flags.DEFINE_enum("to", "model", ["model", "diffusers"], "Format to write.")
  flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Of the weights; diffusers gets float32.")


def _main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  try:
    files = convert(FLAGS.vae, FLAGS.out, shape=FLAGS.shape, to=FLAGS.to, dtype=FLAGS.dtype)
  except (ValueError, OSError) as e:
    sys.exit(f"error: {e}")
  logging.info("wrote %s", ", ".join(files))


if __name__ == "__main__":
  _define_flags()
  app.run(_main)
