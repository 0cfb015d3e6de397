"""VGG16 and LPIPS weights of the user: one safetensors file with PyTorch's names -> the tree of `models.lpips`.

    features.0.weight ... features.28.bias    convolutions of torchvision's vgg16, required
    lin0.model.1.weight ... lin4.model.1.weight    the 1x1 weights of the package `lpips`, vgg version; optional

The convolutions must be the ones LPIPS was fitted to, torchvision's IMAGENET1K_V1.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.interop import weights
from elasticdit_jax.models import lpips

HOW_TO = (
  'make the file once, where torch, torchvision and lpips are installed: python -c "import torchvision, lpips;'
  " from safetensors.torch import save_file; v = torchvision.models.vgg16(weights='IMAGENET1K_V1').state_dict();"
  " t = {k: x for k, x in v.items() if k.startswith('features.')};"
  " t |= {k: x for k, x in lpips.LPIPS(net='vgg').state_dict().items() if k.startswith('lin') and k[3].isdigit()};"
  " save_file({k: x.contiguous() for k, x in t.items()}, 'lpips_vgg.safetensors')\""
)
_POOL = 1  # torchvision numbers ReLU and pooling layers too


def load(path: str | os.PathLike) -> dict:
  """Reads the file into the tree that `models.lpips.distance` takes; "heads" is absent where the file has none.

  Raises:
    ValueError: where the file is missing (with how to make it), is a pickle, or its tensors do not fit; all differences
      are named and nothing is half loaded.
  """
  path = os.fspath(path)
  if not path or not os.path.isfile(path):
    raise ValueError(f"lpips weights: no file {path!r}; {HOW_TO}")
  if path.lower().endswith((".pth", ".pt", ".bin", ".ckpt")):
    raise ValueError(f"lpips weights: {path} is a pickle, which runs code when it is read; {HOW_TO}")
  flat = weights.flatten(weights.load_tree(path))
  shapes = lpips.init_shapes()
  tree = weights.unflatten({_OUR_NAMES.get(name, name): _convert(name, array) for name, array in flat.items()})
  if "heads" not in tree:
    del shapes["heads"]
  weights.check_tree(shapes, tree, f"lpips weights: {path}")
  return jax.tree.map(jnp.asarray, tree)


def save(path: str | os.PathLike, params: dict) -> None:
  """Writes the tree under PyTorch's names, the inverse of `load`."""
  ours = weights.flatten(params)
  theirs = {name: np.asarray(ours[our]) for name, our in _OUR_NAMES.items() if our in ours}
  for name, array in theirs.items():
    if array.ndim == 4:
      theirs[name] = np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    elif name.startswith("lin"):
      theirs[name] = array.reshape(1, -1, 1, 1)
  weights.save_tree(path, theirs)


def _convert(name: str, array: np.ndarray) -> np.ndarray:
  if name.startswith("lin"):
    return array.reshape(-1)
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array  # OIHW -> HWIO


def _names() -> dict[str, str]:
  """PyTorch's name -> ours."""
  names, layer = {}, 0
  for group, widths in enumerate(lpips.GROUPS):
    layer += _POOL if group else 0
    for i in range(len(widths)):
      names[f"features.{layer}.weight"] = f"vgg/conv_{group}_{i}/kernel"
      names[f"features.{layer}.bias"] = f"vgg/conv_{group}_{i}/bias"
      layer += 2
    names[f"lin{group}.model.1.weight"] = f"heads/head_{group}"
  return names


_OUR_NAMES = _names()
