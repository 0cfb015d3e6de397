"""Random weights for LPIPS, and LPIPS in torch from a file with torchvision's names."""

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from elasticdit_jax.models import lpips


def random_params(seed: int = 0) -> dict:
  """Of the shape that lpips.GROUPS says; heads are positive, as the published ones."""
  rng = np.random.default_rng(seed)
  made = jax.tree.map(
    lambda s: rng.normal(0, np.sqrt(2 / max(1, s.size // s.shape[-1])), s.shape).astype(np.float32), lpips.init_shapes()
  )
  made["heads"] = {name: np.abs(head) for name, head in made["heads"].items()}
  return jax.tree.map(jnp.asarray, made)


def torch_lpips(torch, path: str, groups: tuple, a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a, b: [B, H, W, 3] -> [B]; layers are numbered as nn.Sequential numbers those of torchvision's vgg16."""
  files = {name: torch.from_numpy(array) for name, array in load_file(path).items()}
  scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
  shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)

  def features(image):
    h, taps, number = (torch.from_numpy(image).permute(0, 3, 1, 2) - shift) / scale, [], 0
    for group, widths in enumerate(groups):
      if group:
        h, number = torch.nn.functional.max_pool2d(h, 2), number + 1
      for _ in widths:
        h = torch.nn.functional.conv2d(h, files[f"features.{number}.weight"], files[f"features.{number}.bias"], 1, 1)
        h, number = torch.relu(h), number + 2
      taps.append(h / torch.sqrt((h**2).sum(1, keepdim=True) + 1e-10))
    return taps

  total = 0
  for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
    total = total + torch.nn.functional.conv2d((x - y) ** 2, files[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
  return total.numpy()
