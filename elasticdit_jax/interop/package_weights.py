"""Collects finished runs into one model directory, for example the one inside the package.

    python -m elasticdit_jax.interop.package_weights --out=elasticdit_jax/weights/tiny --dtype=float16 \\
        --vae=runs/vae-f8 --vae=runs/vae-f16 [--model=runs/pretrain]

With VAEs alone the directory serves `config.vae`; with a backbone as well it is what generate.Pipeline loads.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence

from absl import app, flags, logging

from elasticdit_jax.interop import model_dir
from elasticdit_jax.models.codec import Codec

FLAGS = flags.FLAGS
flags.DEFINE_string("out", None, "The model directory to write.", required=True)
flags.DEFINE_multi_string("vae", [], "Workdir of a finished vae run; repeat the flag.")
flags.DEFINE_string("model", "", "Workdir of a finished pretrain or uwco run.")
flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Of the stored weights.")


def package(out: str, vaes: Sequence[str], model: str = "", dtype: str = "float32") -> int:
  """Writes `out` and returns its size in bytes.

  Args:
    out: the model directory.
    vaes: directories with vae_f8.safetensors or vae_f16.safetensors; they take the place of the model's own. Those in
      training form, with several branches per convolution, are merged: the package holds the deployed form.
    model: model directory or workdir; "" for VAEs alone.
    dtype: of the stored weights.

  Raises:
    ValueError: where there is nothing to write, a run is not finished, or `out` holds something else.
  """
  codecs = {factor: codec for path in vaes for factor, codec in model_dir.load_codecs(path).items()}
  if model:
    loaded = model_dir.load(model)
    model_dir.save(out, dataclasses.replace(loaded, codecs=_deployed(dict(loaded.codecs) | codecs)), dtype)
  elif codecs:
    model_dir.check_replaceable(out)
    model_dir.save_codecs(out, _deployed(codecs), dtype)
  else:
    raise ValueError("--vae, --model: nothing to write; name at least one finished run")
  return sum(os.path.getsize(os.path.join(out, name)) for name in os.listdir(out))


def _deployed(codecs: Mapping[int, Codec]) -> dict[int, Codec]:
  return {factor: codec.deploy() for factor, codec in codecs.items()}


def _main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  try:
    size = package(FLAGS.out, FLAGS.vae, FLAGS.model, FLAGS.dtype)
  except (ValueError, OSError) as e:
    sys.exit(f"error: {e}")
  logging.info("%s: %.2f MiB", FLAGS.out, size / 2**20)


if __name__ == "__main__":
  app.run(_main)
