"""CLIP from the files of others: a directory as the Hugging Face hub lays it out.

    config.json                       sizes ("model_type": "clip")
    model.safetensors                 or several, with model.safetensors.index.json
    tokenizer.json                    or vocab.json and merges.txt; see interop.clip_tokenizer

Tensors may have the names of transformers' CLIPModel or those of open_clip, in which HPSv2.1 is published. Files of
pickles (.bin, .pt) are not read: reading one runs what it holds. docs/rewards.md says how to convert them.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.interop import weights
from elasticdit_jax.models import clip

# What transformers assumes where config.json is silent.
_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_TEXT = _TOWER | {
  "hidden_size": 512,
  "num_attention_heads": 8,
  "intermediate_size": 2048,
  "vocab_size": 49408,
  "max_position_embeddings": 77,
  "eos_token_id": 49407,
}
_VISION = _TOWER | {
  "hidden_size": 768,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "image_size": 224,
  "patch_size": 32,
}
_OLD_END = 2  # written by old versions, whatever the vocabulary; transformers then takes the largest id
_DENSE = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj"}
_DENSE |= {"up": "mlp.fc1", "down": "mlp.fc2"}
_NORMS = {"norm1": "layer_norm1", "norm2": "layer_norm2"}
# open_clip -> transformers; the joint q, k, v matrix is split first.
_OPEN_CLIP = (
  (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
  (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
  (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
  (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
  (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
  (r"^visual\.proj$", "visual_projection.weight"),
  (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
  (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
  (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
  (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
  (r"^ln_final\.", "text_model.final_layer_norm."),
  (r"^text_projection$", "text_projection.weight"),
  (r"\.attn\.", ".self_attn."),
  (r"\.ln_1\.", ".layer_norm1."),
  (r"\.ln_2\.", ".layer_norm2."),
  (r"\.mlp\.c_fc\.", ".mlp.fc1."),
  (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_BUFFERS = re.compile(r"(^|\.)(position_ids|attn_mask)$")


def load(directory: str | os.PathLike) -> tuple[clip.CLIPConfig, dict]:
  """Reads both towers.

  Args:
    directory: with config.json and safetensors.

  Returns:
    The configuration and the parameters (float32) of models.clip.CLIP.

  Raises:
    ValueError: in one line: files are missing or damaged, or tensors are missing, unexpected or of another shape.
  """
  cfg = read_config(directory)
  tensors = _as_transformers(_read_tensors(directory))
  tree, names = clip.init_shapes(cfg), _names(cfg)
  weights.check_tree(
    {name: _foreign_shape(path, shape) for (path, shape), name in _pair(tree, names)},
    tensors,
    f"CLIP weights in {os.fspath(directory)}",
  )
  flat = {path: jnp.asarray(_ours(path, tensors[name])) for path, name in names.items()}
  return cfg, weights.unflatten(flat)


def read_config(directory: str | os.PathLike) -> clip.CLIPConfig:
  """The sizes in config.json; raises ValueError where it is missing or describes no CLIP."""
  path = os.path.join(directory, "config.json")
  if not os.path.isfile(path):
    raise ValueError(f"CLIP: no {path}; give a directory as the Hugging Face hub has it, with config.json")
  try:
    with open(path) as f:
      table = json.load(f)
    text, vision = _section(table, "text", _TEXT), _section(table, "vision", _VISION)
    return clip.CLIPConfig(
      _tower(text),
      _tower(vision),
      vocabulary=text["vocab_size"],
      length=text["max_position_embeddings"],
      end=None if text["eos_token_id"] == _OLD_END else text["eos_token_id"],
      size=vision["image_size"],
      patch=vision["patch_size"],
      projection=table.get("projection_dim", 512),
    )
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(f"CLIP: {path} does not describe a CLIP model ({type(e).__name__}: {e})") from e


def _section(table: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
  """text_config or vision_config; where the older text_config_dict is there too, transformers lets it rule."""
  if table.get("model_type", "clip") != "clip":
    raise ValueError(f"model_type is {table['model_type']!r}, expected 'clip'")
  old = table.get(f"{name}_config_dict")
  return dict(defaults) | dict(table.get(f"{name}_config") or {}) | (dict(defaults) | old if old else {})


def _tower(section: Mapping[str, Any]) -> clip.TowerConfig:
  return clip.TowerConfig(
    width=section["hidden_size"],
    layers=section["num_hidden_layers"],
    heads=section["num_attention_heads"],
    hidden=section["intermediate_size"],
    activation=section["hidden_act"],
    eps=section["layer_norm_eps"],
  )


def _read_tensors(directory: str | os.PathLike) -> dict[str, np.ndarray]:
  names = os.listdir(directory)
  files = sorted(name for name in names if name.endswith(".safetensors"))
  index = os.path.join(directory, "model.safetensors.index.json")
  if os.path.isfile(index):
    with open(index) as f:
      files = sorted(set(json.load(f)["weight_map"].values()))
  elif "model.safetensors" in files:
    files = ["model.safetensors"]
  if not files:
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    hint = f"; {pickles[0]} is a pickle, convert it as docs/rewards.md says" if pickles else ""
    raise ValueError(f"CLIP: no .safetensors file in {os.fspath(directory)}{hint}")
  tensors: dict[str, np.ndarray] = {}
  for file in files:
    tensors |= weights.flatten(weights.load_tree(os.path.join(directory, file)))
  return tensors


def _as_transformers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors under the names of CLIPModel, constants that some versions store left out."""
  tensors = {name: tensor for name, tensor in tensors.items() if not _BUFFERS.search(name)}
  if "visual.conv1.weight" not in tensors:
    return tensors
  named: dict[str, np.ndarray] = {}
  for name, tensor in tensors.items():
    if name in ("visual.proj", "text_projection"):
      tensor = tensor.T
    joint = re.fullmatch(r"(.*\.attn\.)in_proj_(weight|bias)", name)
    parts = {name: tensor}
    if joint and len(tensor) % 3 == 0:
      parts = {f"{joint[1]}{n}_proj.{joint[2]}": part for n, part in zip("qkv", np.split(tensor, 3), strict=True)}
    for part, value in parts.items():
      for pattern, replacement in _OPEN_CLIP:
        part = re.sub(pattern, replacement, part)
      named[part] = value
  return named


def _names(cfg: clip.CLIPConfig) -> dict[str, str]:
  """Our path -> the name in transformers."""
  names = {
    "logit_scale": "logit_scale",
    "text/tokens/embedding": "text_model.embeddings.token_embedding.weight",
    "text/positions": "text_model.embeddings.position_embedding.weight",
    "text/projection/kernel": "text_projection.weight",
    "vision/class": "vision_model.embeddings.class_embedding",
    "vision/patches/kernel": "vision_model.embeddings.patch_embedding.weight",
    "vision/positions": "vision_model.embeddings.position_embedding.weight",
    "vision/projection/kernel": "visual_projection.weight",
  }
  norms = {
    "text/norm": "text_model.final_layer_norm",
    "vision/norm": "vision_model.post_layernorm",
    "vision/norm_before": "vision_model.pre_layrnorm",
  }
  denses: dict[str, str] = {}
  for tower, layers in (("text", cfg.text.layers), ("vision", cfg.vision.layers)):
    for i in range(layers):
      ours, theirs = f"{tower}/block_{i:02d}", f"{tower}_model.encoder.layers.{i}"
      denses |= {f"{ours}/{a}": f"{theirs}.{b}" for a, b in _DENSE.items()}
      norms |= {f"{ours}/{a}": f"{theirs}.{b}" for a, b in _NORMS.items()}
  names |= {f"{a}/scale": f"{b}.weight" for a, b in norms.items()}
  names |= {f"{a}/kernel": f"{b}.weight" for a, b in denses.items()}
  return names | {f"{a}/bias": f"{b}.bias" for a, b in (norms | denses).items()}


def _pair(tree: Mapping[str, Any], names: Mapping[str, str]) -> list:
  return [((path, leaf.shape), names[path]) for path, leaf in weights.flatten(tree).items()]


def _foreign_shape(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  if path.endswith("/kernel"):
    shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ours(path: str, tensor: np.ndarray) -> np.ndarray:
  tensor = tensor.astype(np.float32)
  if path.endswith("/kernel"):
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
  return tensor
