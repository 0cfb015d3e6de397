"""What a training task of the backbone is made of before its first step: data, VAEs, sizes, weights."""

import dataclasses
import importlib.resources
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax import elastic
from elasticdit_jax.data import pipeline
from elasticdit_jax.data.text import WordEncoder
from elasticdit_jax.elastic import Route
from elasticdit_jax.evals import validation as validation_lib
from elasticdit_jax.interop import model_dir, weights
from elasticdit_jax.models import dit
from elasticdit_jax.models.codec import Codec
from elasticdit_jax.train import sharding
from elasticdit_jax.train.ranges import check_ranges
from elasticdit_jax.train.step import FlowConfig
from elasticdit_jax.types import Batch, Text

SHIPPED = "shipped"


@dataclasses.dataclass(frozen=True)
class Job:
  """Everything fixed over a run.

  Attributes:
    config: the task's config.
    workdir: where files go.
    cfg, flow: backbone and times.
    codecs: VAE factor -> Codec.
    source, encoder: training data and the encoder of its captions.
    held_out: validation batches, always the same.
    captions: of the first held-out pictures, within the vocabulary.
    layout: where arrays live.
  """

  config: Any
  workdir: str
  cfg: dit.DiTConfig
  flow: FlowConfig
  codecs: Mapping[int, Codec]
  source: pipeline.Source
  encoder: WordEncoder
  held_out: tuple[Batch, ...]
  captions: tuple[str, ...]
  layout: sharding.Layout = dataclasses.field(default_factory=sharding.one_device)

  def batches(self, start: int) -> Iterator[Batch]:
    """This process's share of the training batches from step `start` on."""
    data = self.config.data
    index, count = self.layout.share()
    return pipeline.make_batches(
      self.source,
      self.encoder,
      batch_size=data.batch_size,
      seed=self.config.seed,
      start_step=start,
      caption_dropout=data.caption_dropout,
      host_index=index,
      host_count=count,
    )

  def validation(self) -> validation_lib.Validation:
    """The held-out batches as one, encoded by every codec; over all devices, so that all processes take part."""
    image = np.concatenate([b.image for b in self.held_out])
    text = jax.tree.map(lambda *parts: np.concatenate(parts), *[b.text for b in self.held_out])
    bad = np.concatenate([b.bad for b in self.held_out])
    batch = self.layout.spread(Batch(image, Text(text.embedding, text.mask), bad))
    return validation_lib.make_validation(self.cfg, self.layout.replicate(dict(self.codecs)), batch)

  def model(self, params: Any, routes: Mapping[str, Route], provenance: Mapping[str, str]) -> model_dir.Model:
    """The weights with everything that generation needs."""
    flow = model_dir.FlowShift(self.flow.shift, self.flow.tokens)
    return model_dir.Model(self.cfg, params, self.codecs, self.encoder, routes, flow, self.config.data.size, provenance)


def shipped_weights() -> str:
  """Directory of the weights inside the package: the embedded default."""
  return str(importlib.resources.files("elasticdit_jax") / "weights" / "tiny")


def weight_path(name: str) -> str:
  """The directory that "shipped" or a path means."""
  return shipped_weights() if name == SHIPPED else name


def prepare(config: Any, workdir: str) -> Job:
  """Reads data and VAEs and checks that they fit; writes nothing.

  Raises:
    ValueError: naming the field of the config that does not fit.
  """
  check_ranges(config)
  if config.model.size not in dit.SIZES:
    raise ValueError(f"config.model.size: expected one of {', '.join(dit.SIZES)}, got {config.model.size!r}")
  cfg = dataclasses.replace(
    dit.SIZES[config.model.size],
    text_dim=config.data.text_dim,
    text_length=config.data.text_length,
    remat=config.model.remat,
    dtype=config.model.dtype,
  )
  if not config.vae:
    raise ValueError("config.vae: expected a directory with vae_f8.safetensors and vae_f16.safetensors, or 'shipped'")
  codecs = model_dir.load_codecs(weight_path(config.vae))
  for codec in codecs.values():
    if codec.cfg.latent_channels != cfg.latent_channels:
      raise ValueError(
        f"config.vae: the f{codec.factor} VAE has {codec.cfg.latent_channels} latent channels, the backbone"
        f" {cfg.latent_channels}"
      )
  check_size(config.data.size, max(codecs) * cfg.patch)
  layout = sharding.from_config(config)
  layout.check_batch(config.data.batch_size, config.train.get("accumulate", 1))
  source, held_out, encoder = pipeline.source_from_config(config.data)
  batches = pipeline.validation_batch(held_out, encoder, config.data.batch_size, config.train.validation_batches)
  first = held_out.read(np.arange(config.report.pictures))[1]
  captions = tuple(encoder.clip(caption) for caption in first)
  flow = FlowConfig(config.flow.mean, config.flow.std, config.flow.shift, config.flow.tokens)
  return Job(config, workdir, cfg, flow, codecs, source, encoder, tuple(batches), captions, layout)


def check_size(size: int, multiple: int) -> None:
  """Raises ValueError, naming the nearest good one, for a resolution that the routes cannot take."""
  if size < multiple or size % multiple:
    nearest = max(multiple, round(size / multiple) * multiple)
    raise ValueError(
      f"config.data.size: {size} is not a multiple of {multiple} pixels, as the routes need; the nearest is {nearest}"
    )


def init_directory(config: Any) -> str | None:
  """Directory of the weights of config.init, a model directory or a workdir; None where they are random.

  Raises:
    ValueError: where there are none.
  """
  if not config.init:
    return None
  path = weight_path(config.init)
  directory = model_dir.locate(path, "dit.safetensors")
  if os.path.isfile(f"{directory}/dit.safetensors"):
    return directory
  raise ValueError(f"config.init: no dit.safetensors in {path}; give a model directory, 'shipped', or '' for random")


def given_routes(job: Job, names: set[str]) -> dict[str, Route]:
  """Those of `names` beyond the four standard routes that routes.json beside the weights of config.init holds."""
  names = names - set(elastic.standard_routes(job.cfg.depth))
  directory = init_directory(job.config) if names else None
  if directory is None or not os.path.isfile(f"{directory}/routes.json"):
    return {}
  known = elastic.load_routes(f"{directory}/routes.json")
  found = {name: known[name] for name in sorted(names & set(known)) if known[name].depth == job.cfg.depth}
  return {route.name: route for route in found.values()} | found


def initial_params(job: Job) -> dict:
  """Weights of config.init: random for "", the package's for "shipped", else those of a model directory or a workdir.

  Raises:
    ValueError: where they do not fit the configured backbone.
  """
  directory = init_directory(job.config)
  if directory is None:
    return dit.init(job.cfg, jax.random.key(job.config.seed))
  file = f"{directory}/dit.safetensors"
  params = weights.load_tree(file)
  weights.check_tree(dit.init_shapes(job.cfg), params, f"config.init: {file}")
  return jax.tree.map(jnp.asarray, params)


def check_routes(names: set[str], routes: Mapping[str, Route], codecs: Mapping[int, Codec]) -> None:
  """Raises ValueError for a route name nobody knows, or one whose VAE is missing."""
  for name in sorted(names):
    if name not in routes:
      raise ValueError(
        f"config.phases: unknown route {name!r}; expected one of {', '.join(sorted(routes))}, or one in routes.json"
        " beside the weights of config.init, where configs/sparsify.py puts sparse ones"
      )
    route = routes[name]
    if route.vae not in codecs:
      raise ValueError(
        f"route {name!r} needs vae_f{route.vae}.safetensors, which config.vae does not have; train it with"
        f" configs/vae.py:factor={route.vae}, or name routes of the other VAE in config.phases"
      )
