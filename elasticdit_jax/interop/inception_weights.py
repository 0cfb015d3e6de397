"""Inception-v3 weights of the user for FID: a safetensors file with the names of PyTorch's port -> `models.inception`.

    Mixed_5b.branch1x1.conv.weight, Mixed_5b.branch1x1.bn.{weight,bias,running_mean,running_var}, ...

The classifier (fc, AuxLogits) and counters of batches may be there and are not read. torchvision's own weights have the
same names and give other numbers, which must not be called FID.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.interop import weights
from elasticdit_jax.models import inception

HOW_TO = (
  "download pt_inception-2015-12-05-6726825d.pth from the releases of github.com/mseitzer/pytorch-fid and convert it"
  ' once, where torch is installed: python -c "import torch; from safetensors.torch import save_file;'
  " t = torch.load('pt_inception-2015-12-05-6726825d.pth', weights_only=True);"
  " save_file({k: x.contiguous() for k, x in t.items()}, 'inception.safetensors')\""
)
_EPSILON = 1e-3  # of its batch normalisation
_NORM = ("weight", "bias", "running_mean", "running_var")


def load(path: str | os.PathLike) -> dict:
  """Reads the file, batch normalisation folded into the convolutions.

  Raises:
    ValueError: where the file is missing (with how to make it), is a pickle, or its tensors do not fit: differences are
      named and nothing is loaded.
  """
  path = os.fspath(path)
  if path.lower().endswith((".pth", ".pt", ".bin", ".ckpt")):
    raise ValueError(f"inception weights: {path} is a pickle, which runs code when it is read; {HOW_TO}")
  if not os.path.isfile(path):
    raise ValueError(f"inception weights: no file {path!r}; {HOW_TO}")
  flat = weights.flatten(weights.load_tree(path))
  read = {name: array for name, array in flat.items() if not _unused(name)}
  shapes = inception.init_shapes()
  weights.check_tree(weights.unflatten(_wanted(shapes)), weights.unflatten(read), f"inception weights: {path}")
  return jax.tree.map(jnp.asarray, weights.unflatten(_fold(read)))


def _unused(name: str) -> bool:
  return name.startswith(("fc.", "AuxLogits.")) or name.endswith(".num_batches_tracked")


def _wanted(shapes: dict) -> dict[str, jax.ShapeDtypeStruct]:
  """Names and shapes in the file."""
  wanted = {}
  for name, leaf in weights.flatten(shapes).items():
    conv, _, kind = name.replace("/", ".").rpartition(".")
    if kind == "kernel":
      rows, columns, inputs, width = leaf.shape
      wanted[f"{conv}.conv.weight"] = jax.ShapeDtypeStruct((width, inputs, rows, columns), leaf.dtype)
    else:
      wanted |= {f"{conv}.bn.{part}": leaf for part in _NORM}
  return wanted


def _fold(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """kernel * g and bias - mean * g with g = weight / sqrt(variance + epsilon), in float64."""
  folded = {}
  for name in tensors:
    if not name.endswith(".conv.weight"):
      continue
    conv = name.removesuffix(".conv.weight")
    scale, bias, mean, variance = (tensors[f"{conv}.bn.{part}"].astype(np.float64) for part in _NORM)
    gain = scale / np.sqrt(variance + _EPSILON)
    key = conv.replace(".", "/")
    folded[f"{key}/kernel"] = (tensors[name].transpose(2, 3, 1, 0) * gain).astype(np.float32)
    folded[f"{key}/bias"] = (bias - mean * gain).astype(np.float32)
  return folded
