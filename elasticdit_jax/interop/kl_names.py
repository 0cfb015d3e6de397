"""Names and layouts of AutoencoderKL tensors: this library's tree, files of diffusers, files in the older LDM naming.

decoder/up_blocks_0/resnets_1/conv1/kernel      this library, HWIO
decoder.up_blocks.0.resnets.1.conv1.weight      diffusers, OIHW
decoder.up.3.block.1.conv1.weight               LDM: FLUX.1's ae.safetensors, SD and SD3 checkpoints (levels reversed)
"""

import re
from collections.abc import Iterable

import numpy as np

# Of the autoencoder in files that hold a whole model.
PREFIXES = ("first_stage_model.", "vae.")
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LDM_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def to_diffusers(name: str) -> str:
  """`decoder/up_blocks_0/norm1/scale` -> `decoder.up_blocks.0.norm1.weight`."""
  *path, leaf = name.split("/")
  return ".".join([*(re.sub(r"_(\d+)$", r".\1", part) for part in path), _LEAVES[leaf]])


def strip_prefix(names: Iterable[str]) -> dict[str, str]:
  """{name of the autoencoder's tensor: name in the file}; of a whole model's file only the autoencoder is kept."""
  names = list(names)
  for prefix in PREFIXES:
    inside = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    if inside:
      return inside
  return {name: name for name in names}


def canonical(name: str, levels: int) -> str:
  """A name in any of the known namings -> the present one of diffusers; unknown names come back as they are.

  Args:
    name: without prefix.
    levels: of the autoencoder; LDM counts those of the decoder from the image down, diffusers from the latents up.
  """
  name = re.sub(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_ATTENTION[m[2]]}.", name)
  name = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
  name = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
  up = re.fullmatch(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", name)
  if up:
    part = "resnets." if up[2] == "block" else "upsamplers.0."
    name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{part}{up[3]}"
  name = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
  name = re.sub(
    r"\.mid\.attn_1\.(norm|q|k|v|proj_out)\.", lambda m: f".mid_block.attentions.0.{_LDM_ATTENTION[m[1]]}.", name
  )
  name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
  return name.replace(".nin_shortcut.", ".conv_shortcut.")


def file_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of a kernel in a file: HWIO -> OIHW, [in, out] -> [out, in]."""
  return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def fits(in_file: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
  """Whether a tensor can be read as `wanted`, both in file layout; LDM stores projections as 1x1 convolutions."""
  return in_file == wanted or (len(wanted) == 2 and in_file == (*wanted, 1, 1))


def from_file(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of a file in the layout and shape of this library, float32."""
  array = np.asarray(array, np.float32)
  if len(shape) == 4:
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
  return np.ascontiguousarray(array.reshape(file_shape(shape)).T)


def to_file(array: np.ndarray) -> np.ndarray:
  """The inverse of `from_file`."""
  array = np.asarray(array, np.float32)
  return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)
