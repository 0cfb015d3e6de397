"""Where VAEs come from: one name, whatever it is that holds them."""

import importlib.resources
import os

from elasticdit_jax.interop import model_dir
from elasticdit_jax.models.codec import Codec

SHIPPED = "shipped"


def load(name: str) -> dict[int, Codec]:
  """VAE factor -> Codec.

  Args:
    name: "shipped" (those inside the package), a model directory or the workdir of a run with vae_f*.safetensors.

  Raises:
    ValueError: where there is none, or it is damaged.
  """
  if name == SHIPPED:
    return model_dir.load_codecs(str(importlib.resources.files("elasticdit_jax") / "weights" / "tiny"))
  return model_dir.load_codecs(os.path.expanduser(name))
