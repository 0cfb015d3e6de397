"""AutoencoderKL weights from and to the files of diffusers.

Read are safetensors files, in the naming of diffusers or of LDM (FLUX.1's ae.safetensors, whole SD and SD3
checkpoints). Pickles are refused: reading one runs what is in it. interop/convert_vae.py is the command.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from elasticdit_jax.interop import kl_names, weights
from elasticdit_jax.models import autoencoder_kl
from elasticdit_jax.models.autoencoder_kl import KL_PRESETS, KLConfig
from elasticdit_jax.models.codec import Codec

FILE = "diffusion_pytorch_model.safetensors"
_PICKLES = (".bin", ".ckpt", ".pth", ".pt", ".pkl")
# What diffusers assumes where config.json is silent.
_DEFAULTS = {
  "block_out_channels": (64,),
  "layers_per_block": 1,
  "latent_channels": 4,
  "norm_num_groups": 32,
  "mid_block_add_attention": True,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "in_channels": 3,
  "out_channels": 3,
  "scaling_factor": 0.18215,
  "shift_factor": None,
}


def is_folder(path: str | os.PathLike) -> bool:
  """Whether `path` is a folder of diffusers with an autoencoder: config.json in it or in its vae/."""
  return _config_folder(os.fspath(path)) is not None


def load(path: str | os.PathLike, shape: str | KLConfig | None = None) -> Codec:
  """Reads an AutoencoderKL.

  Args:
    path: folder of diffusers (the VAE's own or a whole pipeline's), or one .safetensors file.
    shape: for a file without config.json beside it: one of KL_PRESETS, the path of a config.json, or a KLConfig.

  Returns:
    A codec whose shift and scale are the factors of the configuration.

  Raises:
    ValueError: for pickles, a configuration that this class does not cover, and tensors that are missing, unexpected,
      of another shape or not finite: they are listed and nothing is loaded.
  """
  path = os.fspath(path)
  _refuse_pickle(path)
  folder = _config_folder(path)
  if folder is None and os.path.isdir(path):
    raise ValueError(f"vae: {path} is no folder of diffusers: no config.json with a _class_name; give the folder `vae`")
  if folder is None and not os.path.isfile(path):
    raise ValueError(f"vae: no file or folder {path}; check the path")
  file = _weight_file(folder) if folder else path
  cfg = _config(shape, folder, file)
  params = _read(file, cfg)
  shift = jnp.full((cfg.latent_channels,), cfg.shift_factor, jnp.float32)
  return Codec(cfg, params, shift, jnp.float32(cfg.scaling_factor))


def save(path: str | os.PathLike, codec: Codec) -> None:
  """Writes a folder that diffusers.AutoencoderKL.from_pretrained reads; an older one is replaced when it is complete.

  Raises:
    ValueError: for a codec of another class, shifts that differ between channels (config.json has one number for all),
      values that are not finite, or a path that holds something else.
  """
  path = os.fspath(path).rstrip("/")
  cfg = codec.cfg
  if not isinstance(cfg, KLConfig):
    raise ValueError("diffusers: only an AutoencoderKL can be written for diffusers; this is a T-DVAE")
  shift = np.unique(np.asarray(codec.shift))
  if shift.size != 1:
    raise ValueError(
      "diffusers: config.json holds one shift_factor, this codec has one per channel; give it equal ones"
    )
  if os.path.lexists(path) and not _ours(path):
    raise ValueError(f"diffusers: {path} exists and holds something else; give another path")
  expected = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in _shapes(cfg).items()}
  weights.check_tree(weights.unflatten(expected), codec.params, "diffusers")
  tensors = {kl_names.to_diffusers(k): kl_names.to_file(v) for k, v in weights.flatten(codec.params).items()}
  _check_finite(tensors, path)
  described = dataclasses.replace(
    cfg,
    shift_factor=_decimal(cfg.shift_factor, shift[0]),
    scaling_factor=_decimal(cfg.scaling_factor, codec.scale),
  )
  partial = f"{path}.partial"
  shutil.rmtree(partial, ignore_errors=True)
  os.makedirs(partial)
  # diffusers asks for this entry: which framework's layout the tensors have.
  safetensors_numpy.save_file(tensors, f"{partial}/{FILE}", metadata={"format": "pt"})
  with open(f"{partial}/config.json", "w") as f:
    json.dump(to_json(described), f, indent=1)
  shutil.rmtree(path, ignore_errors=True)
  os.replace(partial, path)


def _decimal(written: float, value: Any) -> float:
  """The number as the configuration writes it, where the float32 in use is that number; else the float32."""
  return written if np.float32(written) == np.float32(value) else float(value)


def to_json(cfg: KLConfig) -> dict[str, Any]:
  """The config.json of diffusers."""
  levels = len(cfg.block_out_channels)
  return {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "latents_mean": None,
    "latents_std": None,
    **dataclasses.asdict(cfg),
  }


def from_json(described: Mapping[str, Any], source: str = "config.json") -> KLConfig:
  """A configuration of diffusers; raises ValueError, naming the field, for what AutoencoderKL here does not cover."""
  fixed = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
  }
  for field, allowed in fixed.items():
    if field in described and described[field] not in allowed:
      raise ValueError(
        f"{source}: {field}: expected {allowed[0]}, got {described[field]!r}; this VAE is of another kind"
      )
  for field, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
    other = [name for name in described.get(field) or () if name != kind]
    if other:
      raise ValueError(f"{source}: {field}: expected {kind} alone, got {other[0]!r}; this VAE is of another kind")
  fields = {name: described.get(name, default) for name, default in _DEFAULTS.items()}
  fields["shift_factor"] = fields["shift_factor"] or 0.0
  try:
    return KLConfig(**fields)
  except ValueError as e:
    raise ValueError(f"{source}: {e}") from None


def _config(shape: str | KLConfig | None, folder: str | None, file: str) -> KLConfig:
  if isinstance(shape, KLConfig):
    return shape
  if shape in KL_PRESETS:
    return KL_PRESETS[shape]
  beside = os.path.join(folder or os.path.dirname(file) or ".", "config.json")
  source = shape or beside
  if not os.path.isfile(source):
    what = (
      f"--shape={shape} is neither a known shape nor a config.json" if shape else f"{file} has no config.json beside it"
    )
    raise ValueError(f"vae: {what}; give one of {', '.join(KL_PRESETS)}, or the path of its config.json")
  try:
    with open(source) as f:
      described = json.load(f)
  except ValueError as e:
    raise ValueError(f"vae: {source} is not valid JSON ({e}); download it again") from None
  if not isinstance(described, dict):
    raise ValueError(f"vae: {source} holds no object; expected the config.json of an AutoencoderKL")
  return from_json(described, source)


def _config_folder(path: str) -> str | None:
  """The folder with the VAE's config.json: `path` or its vae/, as in a folder of a whole pipeline."""
  for folder in (path, os.path.join(path, "vae")):
    file = os.path.join(folder, "config.json")
    # Training runs keep a config.json as well; those of diffusers name a class.
    if os.path.isfile(file):
      with open(file, errors="replace") as f:
        if '"_class_name"' in f.read():
          return folder
  return None


def _weight_file(folder: str) -> str:
  names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
  if FILE in names or len(names) == 1:
    return os.path.join(folder, FILE if FILE in names else names[0])
  if names:
    raise ValueError(f"vae: {folder} holds {', '.join(names)}; give the path of one of them")
  for name in sorted(os.listdir(folder)):
    _refuse_pickle(os.path.join(folder, name))
  raise ValueError(f"vae: no .safetensors file in {folder}; download {FILE}")


def _refuse_pickle(path: str) -> None:
  if not path.lower().endswith(_PICKLES) or os.path.isdir(path):
    return
  target = f"{os.path.splitext(path)[0]}.safetensors"
  raise ValueError(
    f"vae: {path} is a pickle, and reading one runs the code in it; where you trust its origin convert it once: python"
    f' -c "import torch; from safetensors.torch import save_file; d = torch.load({path!r}, weights_only=True);'
    " d = d.get('state_dict', d); save_file({k: v.contiguous() for k, v in d.items() if hasattr(v, 'contiguous')},"
    f' {target!r})"'
  )


@functools.lru_cache(maxsize=8)
def _shapes(cfg: KLConfig) -> Mapping[str, tuple[int, ...]]:
  """Name here -> shape of every parameter; found by tracing, hence kept."""
  return {name: leaf.shape for name, leaf in weights.flatten(autoencoder_kl.init_shapes(cfg)).items()}


def _read(file: str, cfg: KLConfig) -> dict[str, Any]:
  """Names and shapes are compared before the first tensor is read."""
  shapes = _shapes(cfg)
  wanted = {kl_names.to_diffusers(name): kl_names.file_shape(shape) for name, shape in shapes.items()}
  levels = len(cfg.block_out_channels)
  with weights.open_file(file) as f:
    inside = {kl_names.canonical(name, levels): in_file for name, in_file in kl_names.strip_prefix(f.keys()).items()}
    found = {name: tuple(f.get_slice(in_file).get_shape()) for name, in_file in inside.items()}
    _compare(file, wanted, found)
    tensors = {name: f.get_tensor(in_file) for name, in_file in inside.items()}
  _check_finite(tensors, file)
  flat = {name: kl_names.from_file(tensors[kl_names.to_diffusers(name)], shape) for name, shape in shapes.items()}
  return jax.tree.map(jnp.asarray, weights.unflatten(flat))


def _compare(file: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
  differences = {
    "missing": [name for name in wanted if name not in found],
    "unexpected": [name for name in found if name not in wanted],
    "of another shape": [
      f"{name} {list(found[name])} where the model has {list(shape)}"
      for name, shape in wanted.items()
      if name in found and not kl_names.fits(found[name], shape)
    ],
  }
  told = [f"{len(names)} {what}: {_first(names)}" for what, names in differences.items() if names]
  if told:
    raise ValueError(
      f"vae: {file} does not fit its configuration, nothing was loaded; of {len(wanted)} tensors {'; '.join(told)};"
      " check that config.json or --shape belongs to this file"
    )


def _first(names: list[str], count: int = 6) -> str:
  return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _check_finite(tensors: Mapping[str, np.ndarray], source: str) -> None:
  broken = [name for name, array in tensors.items() if not np.isfinite(np.asarray(array, np.float32)).all()]
  if broken:
    raise ValueError(f"vae: {source}: values that are not finite in {_first(broken)}; copy or convert the file again")


def _ours(path: str) -> bool:
  return os.path.isdir(path) and set(os.listdir(path)) <= {FILE, "config.json"}
