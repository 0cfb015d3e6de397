"""A model directory: everything that turns prompts into images, as safetensors and JSON.

    model.json         sizes, text encoder, flow shift, where it came from
    dit.safetensors    the one shared weight set (EMA)
    vae_f8.safetensors, vae_f16.safetensors   with the statistics of their latents
    routes.json        the ways through it

A training run keeps one as WORKDIR/model; the package ships one for its embedded default.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from elasticdit_jax import elastic
from elasticdit_jax.data.text import WordEncoder
from elasticdit_jax.elastic import VAE_FACTORS, Route
from elasticdit_jax.interop import diffusers_vae, weights
from elasticdit_jax.models import codec as codec_lib
from elasticdit_jax.models import dit
from elasticdit_jax.models.autoencoder_kl import KLConfig
from elasticdit_jax.models.codec import Codec
from elasticdit_jax.models.tdvae import VAEConfig

FORMAT = 1
# Named in the metadata of a VAE file; a file that names none is of the first.
_VAE_CLASSES = {"TDVAE": VAEConfig, "AutoencoderKL": KLConfig}


@dataclasses.dataclass(frozen=True)
class FlowShift:
  """Resolution-dependent time shift: `shift` is right for `tokens` image tokens (see flow.path.shift_for)."""

  shift: float
  tokens: int

  def __post_init__(self):
    if not isinstance(self.shift, int | float) or not 0 < self.shift < math.inf:
      raise ValueError(f"flow.shift: expected a positive number, got {self.shift!r}")
    if not isinstance(self.tokens, int) or self.tokens < 1:
      raise ValueError(f"flow.tokens: expected at least 1, got {self.tokens!r}")


@dataclasses.dataclass(frozen=True)
class Model:
  """What `load` returns and `save` takes.

  Attributes:
    cfg, params: the backbone and its parameters.
    codecs: VAE factor -> Codec.
    encoder: captions to Text.
    routes: by name.
    flow: the time shift used in training.
    size: side of the training images, pixels.
    provenance: free text fields (command, seed, date ...) for people.
  """

  cfg: dit.DiTConfig
  params: dict
  codecs: Mapping[int, Codec]
  encoder: WordEncoder
  routes: Mapping[str, Route]
  flow: FlowShift
  size: int
  provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)


def save(path: str | os.PathLike, model: Model, dtype: str = "float32") -> None:
  """Writes the directory; an older one at `path` is replaced only once the new one is complete.

  Args:
    path: the directory.
    model: what to write.
    dtype: of the stored weights, "float32" or "float16".

  Raises:
    ValueError: where `path` holds something else than a model directory, or values that `dtype` cannot.
  """
  path = os.fspath(path).rstrip("/")
  check_replaceable(path)
  partial, old = f"{path}.partial", f"{path}.old"
  shutil.rmtree(partial, ignore_errors=True)
  os.makedirs(partial)
  save_codecs(partial, model.codecs, dtype)
  weights.save_tree(f"{partial}/dit.safetensors", model.params, dtype=dtype)
  elastic.save_routes(f"{partial}/routes.json", model.routes)
  described = {
    "format": FORMAT,
    "dit": dataclasses.asdict(model.cfg),
    "text_encoder": model.encoder.to_json(),
    "flow": dataclasses.asdict(model.flow),
    "size": model.size,
    "provenance": dict(model.provenance),
  }
  _write_json(f"{partial}/model.json", described)
  # Renamed, not deleted: between the two renames the old model is still whole, beside the new one.
  shutil.rmtree(old, ignore_errors=True)
  if os.path.isdir(path):
    os.replace(path, old)
  os.replace(partial, path)
  shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: str | os.PathLike) -> None:
  """Raises ValueError unless `path` is free, empty, or a directory that `save` or `save_codecs` wrote."""
  known = ("model.json", *(f"vae_f{factor}.safetensors" for factor in VAE_FACTORS))
  if os.path.isdir(path) and not os.path.islink(path):
    names = os.listdir(path)
    if not names or any(name in names for name in known):
      return
  elif not os.path.lexists(path):
    return
  raise ValueError(f"model directory: {os.fspath(path)} exists and holds something else; give another path")


def locate(path: str | os.PathLike, file: str) -> str:
  """The directory that holds a file of a model: `path`, or the model inside a training run; `path` where neither does.

  A kill between the two renames of `save` leaves nothing in its place, but the new directory, complete, and the old one
  beside it: the new one is taken.
  """
  path = os.fspath(path).rstrip("/") or "/"
  for base in (path, f"{path}/model"):
    if os.path.isfile(f"{base}/{file}"):
      return base
    if os.path.isdir(f"{base}.old") and not os.path.lexists(base):
      for rest in (f"{base}.partial", f"{base}.old"):
        if os.path.isfile(f"{rest}/model.json") and os.path.isfile(f"{rest}/{file}"):
          logging.warning("%s was interrupted while it was replaced; reading %s", base, rest)
          return rest
  return path


def load(path: str | os.PathLike) -> Model:
  """Reads a model directory, or the one inside a training run.

  Raises:
    ValueError: where the directory or a file in it is missing or damaged, or weights do not fit model.json.
  """
  path = locate(path, "model.json")
  described = _read_json(path)
  try:
    cfg = dit.DiTConfig(**described["dit"])
    encoder = WordEncoder.from_json(described["text_encoder"])
    flow = FlowShift(**described["flow"])
    size, provenance = described["size"], described["provenance"]
    if not isinstance(size, int) or size < 1:
      raise ValueError(f"size: expected a positive number of pixels, got {size!r}")
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f"checkpoint: {path}/model.json does not describe a model ({type(e).__name__}: {e}); export the model again"
    ) from e
  params = weights.load_tree(f"{path}/dit.safetensors")
  weights.check_tree(dit.init_shapes(cfg), params, f"{path}/dit.safetensors")
  codecs, routes = load_codecs(path), elastic.load_routes(f"{path}/routes.json")
  model = Model(cfg, jax.tree.map(jnp.asarray, params), codecs, encoder, routes, flow, size, provenance)
  _check_parts(path, model)
  return model


def _check_parts(path: str, model: Model) -> None:
  """Each file is fine by itself; do they belong together?"""
  cfg = model.cfg
  pairs = [("routes.json", "blocks", next(iter(model.routes.values())).depth, cfg.depth)]
  pairs += [("model.json", "text features", model.encoder.dim, cfg.text_dim)]
  pairs += [
    (f"vae_f{factor}.safetensors", "latent channels", codec.cfg.latent_channels, cfg.latent_channels)
    for factor, codec in model.codecs.items()
  ]
  for file, what, got, expected in pairs:
    if got != expected:
      raise ValueError(
        f"checkpoint: {path}/{file} is for {got} {what}, the backbone has {expected}; export the model again"
      )
  if model.encoder.length > cfg.text_length:
    raise ValueError(
      f"checkpoint: {path}/model.json has captions of up to {model.encoder.length} words, the backbone reads"
      f" {cfg.text_length}; export the model again"
    )


def save_codecs(path: str | os.PathLike, codecs: Mapping[int, Codec], dtype: str = "float32") -> None:
  """Writes vae_f8.safetensors and vae_f16.safetensors; shape and statistics travel in their metadata."""
  os.makedirs(path, exist_ok=True)
  for factor, codec in codecs.items():
    metadata = {
      "class": next(name for name, kind in _VAE_CLASSES.items() if isinstance(codec.cfg, kind)),
      "config": json.dumps(dataclasses.asdict(codec.cfg)),
      "shift": json.dumps(np.asarray(codec.shift, np.float64).tolist()),
      "scale": json.dumps(float(codec.scale)),
    }
    weights.save_tree(f"{path}/vae_f{factor}.safetensors", codec.params, dtype=dtype, metadata=metadata)


def load_codecs(path: str | os.PathLike) -> dict[int, Codec]:
  """Reads every vae_f*.safetensors of a directory, or of the model inside a training run; or a folder of diffusers.

  Raises:
    ValueError: where there is none, or one is damaged or does not fit its own description.
  """
  if diffusers_vae.is_folder(path):
    codec = diffusers_vae.load(path)
    if codec.factor not in VAE_FACTORS:
      raise ValueError(f"vae: {os.fspath(path)} is an f{codec.factor} VAE; expected one of {VAE_FACTORS}")
    return {codec.factor: codec}
  codecs = {}
  for factor in VAE_FACTORS:
    name = f"vae_f{factor}.safetensors"
    file = f"{locate(path, name)}/{name}"
    if os.path.isfile(file):
      codecs[factor] = _load_codec(file)
  if not codecs:
    raise ValueError(
      f"vae: no vae_f8.safetensors or vae_f16.safetensors in {os.fspath(path)}; train them with configs/vae.py"
    )
  return codecs


def _load_codec(file: str) -> Codec:
  params, metadata = weights.load_tree(file), weights.load_metadata(file)
  try:
    cfg = _VAE_CLASSES[metadata.get("class", "TDVAE")](**json.loads(metadata["config"]))
    shift = np.asarray(json.loads(metadata["shift"]), np.float32)
    scale = np.float32(json.loads(metadata["scale"]))
    if shift.shape != (cfg.latent_channels,) or not np.isfinite(shift).all() or not 0 < scale < np.inf:
      raise ValueError(f"expected {cfg.latent_channels} finite shifts and a positive scale")
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f"vae: {file} lacks the description this library writes into its metadata ({type(e).__name__}: {e})"
    ) from e
  if os.path.basename(file) != f"vae_f{cfg.factor}.safetensors":
    raise ValueError(f"vae: {file} holds an f{cfg.factor} VAE; give the file the name vae_f{cfg.factor}.safetensors")
  weights.check_tree(codec_lib.init_shapes(cfg), params, file)
  return Codec(cfg, jax.tree.map(jnp.asarray, params), jnp.asarray(shift), jnp.asarray(scale))


def _write_json(file: str, value: Mapping) -> None:
  with open(file, "w") as f:
    json.dump(value, f, indent=1)
    f.write("\n")


def _read_json(path: str) -> dict:
  try:
    with open(f"{path}/model.json") as f:
      described = json.load(f)
  except (FileNotFoundError, NotADirectoryError):
    raise ValueError(
      f"checkpoint: no model.json in {path}; expected a model directory or the workdir of a finished training run"
    ) from None
  except ValueError as e:
    raise ValueError(f"checkpoint: {path}/model.json is not valid JSON ({e}); export the model again") from None
  found = described.get("format") if isinstance(described, dict) else None
  if found != FORMAT:
    raise ValueError(
      f"checkpoint: {path}/model.json has format {found!r}, this version reads {FORMAT}; export it again"
    )
  return described
