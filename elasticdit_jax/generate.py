"""From prompts to pictures: the Python API, and the task `sample`.

  from elasticdit_jax.generate import Pipeline
  pipeline = Pipeline.load()
  images = pipeline(["two red circles", "a blue square above a circle"], route="lite-f16")   # uint8 [2, 128, 128, 3]

  prompts -> Text --+
  (seed, i) -> noise +--> sampler over route's velocity, guided --> latents --VAE decoder of the route--> uint8

Sampling and decoding are one compiled program per (route, steps, size, solver, chunk size). Weights are its arguments:
another checkpoint of the same shape does not compile again.
"""

import dataclasses
import functools
import importlib.resources
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from elasticdit_jax import __version__, elastic
from elasticdit_jax.elastic import Route
from elasticdit_jax.evals import pictures
from elasticdit_jax.evals.pictures import save_png
from elasticdit_jax.flow import guidance as guidance_lib
from elasticdit_jax.flow import path, sampler
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import dit
from elasticdit_jax.models.codec import Codec, to_uint8
from elasticdit_jax.types import Text

_MOST_TOKENS = 2**16  # a slip of the keyboard should not end in the machine's memory running out
SOLVERS = {"euler": sampler.euler, "heun": sampler.heun, "ab2": sampler.ab2}


@functools.partial(jax.jit, static_argnames=("cfg", "route", "grid", "step"))
def sample_images(
  params: Any,
  codec: Codec,
  text: Text,
  null: Text,
  guidance: jax.Array | None,
  seed: jax.Array,
  index: jax.Array,
  times: jax.Array,
  *,
  cfg: dit.DiTConfig,
  route: Route,
  grid: tuple[int, int],
  step: sampler.Step,
) -> jax.Array:
  """The compiled program: noise, sampler, decoder.

  Args:
    params: of the backbone.
    codec: of the route's VAE.
    text: B prompts.
    null: the empty prompt, one row.
    guidance: scale of classifier-free guidance, []; None is plain conditional sampling at half the cost.
    seed: uint32 [].
    index: int32 [B]; the noise of a row is a function of (seed, index) alone.
    times: [steps + 1], see flow.sampler.times.
    cfg, route: the backbone and the way through it.
    grid: (rows, columns) of latent cells.
    step: rule of the sampler.

  Returns:
    uint8 [B, H, W, 3].
  """
  key = jax.random.key(seed)
  shape = (*grid, codec.cfg.latent_channels)
  noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)

  def velocity(x, t, text):
    return dit.ElasticDiT(cfg).apply({"params": params}, x, t, text.embedding, text.mask, route=route)

  guided = guidance_lib.guide(velocity, text, null, 1 if guidance is None else guidance)
  return to_uint8(codec.decode(sampler.sample(guided, noise, times, step=step)))


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Weights ready to draw; call it with prompts.

  Attributes:
    model: see interop.model_dir.
    batch_size: most pictures computed at a time.
  """

  model: model_dir.Model
  batch_size: int = 16

  def __post_init__(self):
    if self.batch_size < 1:
      raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")

  @classmethod
  def load(cls, checkpoint_dir: str | os.PathLike | None = None, batch_size: int = 16) -> "Pipeline":
    """Reads a model directory or the workdir of a training run; None reads the weights inside the package.

    Raises:
      ValueError: where files are missing or do not fit; see interop.model_dir.load.
    """
    if checkpoint_dir is not None:
      return cls(model_dir.load(checkpoint_dir), batch_size)
    shipped = importlib.resources.files("elasticdit_jax") / "weights" / "tiny"
    with importlib.resources.as_file(shipped) as directory:
      return cls(model_dir.load(directory), batch_size)

  @property
  def routes(self) -> Mapping[str, Route]:
    """The routes that can draw, those whose VAE is there; second names are left out, though `select` knows them."""
    return {name: r for name, r in self.model.routes.items() if r.vae in self.model.codecs and name == r.name}

  def __call__(
    self,
    prompts: str | Sequence[str],
    route: str = "lite-f16",
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    solver: str = "euler",
    first: int = 0,
  ) -> np.ndarray:
    """Draws one picture per prompt.

    The noise of picture i depends on (seed, first + i) only: neither on the number of prompts nor on the depth of the
    route, so the pictures of two routes with one VAE are comparable.

    Args:
      prompts: captions within the vocabulary of the model.
      route: name of one of `routes`.
      steps: of the sampler.
      guidance: scale of classifier-free guidance; 1 switches it off and halves the cost.
      seed: 0 .. 2**32 - 1.
      size: side in pixels, or (height, width); the size of the training pictures where None.
      solver: "euler", "heun" (two evaluations a step) or "ab2".
      first: number of the first picture; pipeline(p, seed=s, first=7) repeats the eighth picture of a longer call.

    Returns:
      uint8 [len(prompts), H, W, 3].

    Raises:
      ValueError: in one line, for anything that does not fit the model.
    """
    captions = [prompts] if isinstance(prompts, str) else list(prompts)
    if not captions:
      raise ValueError("prompts: expected at least one prompt, got none")
    chunk = self.chunk(len(captions))
    images = []
    for start in range(0, len(captions), chunk):
      part = captions[start : start + chunk]
      padded = part + [""] * (chunk - len(part))
      args, static = self.arguments(padded, route, steps, guidance, seed, size, solver, first + start)
      images.append(np.asarray(sample_images(*args, **static))[: len(part)])
    return np.concatenate(images)

  def chunk(self, count: int) -> int:
    """Pictures computed at a time for `count` prompts: 1, 4, 16 ... up to batch_size; few programs serve all counts."""
    return min(self.batch_size, 4 ** math.ceil(math.log(max(count, 1), 4) - 1e-9))

  def compile(self, count: int, **settings: Any) -> float:
    """Compiles the program for `count` prompts ahead of the call; returns seconds, near 0 where it already was.

    Args:
      count: of prompts.
      **settings: route, steps, guidance, seed, size, solver as in the call.
    """
    begin = time.perf_counter()
    args, static = self.arguments([""] * self.chunk(count), **settings)
    sample_images.lower(*args, **static).compile()
    return time.perf_counter() - begin

  def arguments(
    self,
    captions: Sequence[str],
    route: str = "lite-f16",
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    solver: str = "euler",
    first: int | Sequence[int] = 0,
  ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `sample_images`, arrays and static ones, for one chunk; `first` may number every picture itself."""
    model, chosen = self.model, self.select(route)
    if solver not in SOLVERS:
      raise ValueError(f"solver: unknown solver {solver!r}; expected one of {', '.join(SOLVERS)}")
    if not 0 <= guidance < math.inf:
      raise ValueError(f"guidance: expected a finite number of at least 0, got {guidance}; 1 switches guidance off")
    if not 0 <= seed < 2**32:
      raise ValueError(f"seed: expected 0 .. {2**32 - 1}, got {seed}")
    rows, columns = latent_grid(model.size if size is None else size, chosen, model.cfg.patch)
    tokens = rows * columns // model.cfg.patch**2
    times = sampler.times(steps, path.shift_for(tokens, model.flow.tokens, model.flow.shift))
    scale = None if guidance == 1 else jnp.float32(guidance)
    index = np.asarray(first + np.arange(len(captions)) if isinstance(first, int) else first, np.int32)
    text, null = model.encoder.encode(captions), model.encoder.encode([""])
    args = (model.params, model.codecs[chosen.vae], text, null, scale, np.uint32(seed), index, times)
    return args, {"cfg": model.cfg, "route": chosen, "grid": (rows, columns), "step": SOLVERS[solver]}

  def select(self, name: str) -> Route:
    """The route of that name; raises ValueError where it is unknown or its VAE is missing."""
    route = elastic.select_route(self.model.routes, name)
    if route.vae not in self.model.codecs:
      usable = ", ".join(sorted(self.routes)) or "none"
      raise ValueError(
        f"route: {name!r} needs vae_f{route.vae}.safetensors, which this model does not have; usable: {usable}"
      )
    return route


def latent_grid(size: int | tuple[int, int], route: Route, patch: int) -> tuple[int, int]:
  """Latent cells (rows, columns) of a picture; the only limit of a route is whole tokens, sparse blocks may be ragged.

  Raises:
    ValueError: naming the nearest good size where (height, width) are not multiples of the VAE factor times the patch.
  """
  height, width = (size, size) if isinstance(size, int) else size
  need = route.vae * patch
  if height < need or width < need or height % need or width % need:
    nearest = "x".join(str(max(need, round(n / need) * need)) for n in (height, width))
    raise ValueError(
      f"size: {height}x{width}: route {route.name!r} needs multiples of {need} pixels; the nearest is {nearest}"
    )
  if (height // need) * (width // need) > _MOST_TOKENS:
    most = need * math.isqrt(_MOST_TOKENS)
    raise ValueError(f"size: {height}x{width}: expected at most {most}x{most} along route {route.name!r}")
  return height // route.vae, width // route.vae


def parse_routes(text: str, pipeline: Pipeline) -> tuple[str, ...]:
  """First names of the routes of "all", "a" or "a,b"; raises ValueError for one that cannot draw."""
  if text == "all":
    return tuple(pipeline.routes)
  return tuple(dict.fromkeys(pipeline.select(name.strip()).name for name in text.split(",")))


def run(config: Any, workdir: str) -> None:
  """Task `sample`: writes WORKDIR/images/<number>-<route>-<prompt>.png, and grid.png where there are several.

  Args:
    config: fields checkpoint ("" = the weights inside the package), prompt (several separated by ";"), route (a name, a
      comma-separated list, or "all"), count (pictures per prompt), steps, guidance, seed, size (0 = the model's) and
      solver.
    workdir: is created.

  Raises:
    ValueError: in one line; nothing has been written then.
  """
  prompts = [prompt.strip() for prompt in config.prompt.split(";") if prompt.strip()]
  if not prompts:
    raise ValueError("config.prompt: expected a prompt, or several separated by ';', got none")
  if config.count < 1:
    raise ValueError(f"config.count: expected at least 1 picture per prompt, got {config.count}")
  pipeline = Pipeline.load(config.checkpoint or None)
  names = parse_routes(config.route, pipeline)
  captions = [prompt for prompt in prompts for _ in range(config.count)]
  settings = {key: config[key] for key in ("steps", "guidance", "seed", "solver")}
  size = config.size or pipeline.model.size
  pipeline.model.encoder.encode(prompts)
  for name in names:
    pipeline.arguments([""], name, size=size, **settings)
  directory = os.path.join(workdir, "images")
  os.makedirs(directory, exist_ok=True)
  rows = {}
  for name in names:
    rows[name] = _draw(pipeline, captions, name, size, settings)
    for number, (caption, image) in enumerate(zip(captions, rows[name], strict=True)):
      file = os.path.join(directory, f"{number:03d}-{name}-{_slug(caption)}.png")
      save_png(file, image, prompt=caption, route=name, number=number, size=size, version=__version__, **settings)
      logging.info("%s", file)
  if len(names) * len(captions) > 1:
    file = os.path.join(directory, "grid.png")
    save_png(file, pictures.grid(captions, rows), prompt="; ".join(prompts), version=__version__, **settings)
    logging.info("%s", file)


def _draw(pipeline: Pipeline, captions: list[str], route: str, size: int, settings: Mapping[str, Any]) -> np.ndarray:
  compiled = pipeline.compile(len(captions), route=route, size=size, **settings)
  begin = time.perf_counter()
  images = pipeline(captions, route, size=size, **settings)
  milliseconds = 1000 * (time.perf_counter() - begin) / len(captions)
  logging.info("%s: %.0f ms per image, %d steps (compiled in %.1f s)", route, milliseconds, settings["steps"], compiled)
  return images


def _slug(caption: str) -> str:
  """A caption as part of a file name."""
  return re.sub(r"[\W_]+", "-", caption.lower()).strip("-")[:48].rstrip("-") or "prompt"
