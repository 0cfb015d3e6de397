"""What each route costs: parameters, floating-point operations, realised sparsity, milliseconds.

Everything is measured on the program that draws pictures, generate.sample_images. A step of the sampler is what is left
of it without the decoder, divided by the number of steps; its time is a difference of the fastest runs, because noise
only ever adds.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from elasticdit_jax import generate
from elasticdit_jax.elastic import Route
from elasticdit_jax.evals.flops import count_flops
from elasticdit_jax.models import dit
from elasticdit_jax.models.codec import Codec
from elasticdit_jax.ops import blocks, gating


@dataclasses.dataclass(frozen=True)
class Profile:
  """Costs of one route; FLOPs are 2 * multiply-accumulates with attention.

  Attributes:
    active_blocks: blocks that run.
    active_parameters: parameters of the backbone that the route reads.
    tokens: image tokens.
    realised_sparsity: mean over active blocks of the share of key blocks that a query block drops.
    num_blocks: key blocks there are for a query block.
    kept: how many of them it keeps in each active block.
    flops_per_step: of one picture and one step of the sampler, both halves of guidance included.
    flops_per_image: of one picture, decoder included.
    ms_per_step: of one picture where `batch` pictures run together; NaN where the noise was larger.
    ms_per_image: likewise, median.
    compile_s: seconds to trace and compile; short where a compilation cache already held the program.
    batch, steps, guidance: how it was run.
    height, width: of the pictures.
  """

  active_blocks: int
  active_parameters: int
  tokens: int
  realised_sparsity: float
  flops_per_step: float
  flops_per_image: float
  ms_per_step: float
  ms_per_image: float
  compile_s: float
  batch: int
  steps: int
  guidance: float
  height: int
  width: int
  num_blocks: int
  kept: tuple[int, ...]


def kept_blocks(route: Route, grid: tuple[int, int], block_side: int) -> tuple[int, ...]:
  """Key blocks that a query block keeps in each active block; arguments as in realised_sparsity."""
  total = blocks.BlockGrid(*grid, block_side).num_blocks
  return tuple(gating.num_kept(total, route.sparsity[i]) for i in route.active)


def realised_sparsity(route: Route, grid: tuple[int, int], block_side: int) -> float:
  """Mean over the active blocks of dropped / all key blocks; as whole blocks are dropped, at most the asked share.

  Args:
    route: with the asked sparsity of every block.
    grid: (rows, columns) of image tokens.
    block_side: tokens along one side of a sparse block.
  """
  total = blocks.BlockGrid(*grid, block_side).num_blocks
  kept = kept_blocks(route, grid, block_side)
  return 1 - sum(kept) / (len(kept) * total)


def profile_routes(
  pipeline: generate.Pipeline,
  routes: Sequence[str] | None = None,
  *,
  steps: int = 20,
  guidance: float = 3.0,
  solver: str = "euler",
  size: int | tuple[int, int] | None = None,
  batch: int = 1,
  repeats: int = 5,
) -> dict[str, Profile]:
  """Profiles routes in one process, in turns, so that a busy moment of the machine hits all of them alike.

  Args:
    pipeline: the weights.
    routes: names; all that can draw where None.
    steps, guidance, solver, size: as in the call of the pipeline.
    batch: pictures at a time; 1 measures latency.
    repeats: rounds.

  Raises:
    ValueError: for what the pipeline refuses, or fewer than one repeat or picture.
  """
  if repeats < 1 or batch < 1:
    raise ValueError(f"repeats, batch: expected at least 1, got {repeats} and {batch}")
  names = tuple(pipeline.routes if routes is None else routes)
  asked = {"steps": steps, "guidance": guidance, "solver": solver, "size": size}
  programs = {name: _Program(*pipeline.arguments([""] * batch, name, **asked)) for name in names}
  decoders = {}
  for name, program in programs.items():
    logging.info("profile: %s compiled in %.1f s", name, program.compile_s)
    if program.route.vae not in decoders:
      decoders[program.route.vae] = _Decoder(program.codec, (batch, *program.grid, program.codec.cfg.latent_channels))
  seconds = interleaved({**programs, **decoders}, repeats)
  return {
    name: _profile(
      pipeline, program, decoders[program.route.vae], seconds[name], seconds[program.route.vae], steps, guidance, batch
    )
    for name, program in programs.items()
  }


class _Program:
  """The compiled drawing program of one route with its arguments."""

  def __init__(self, args: tuple[Any, ...], static: dict[str, Any]):
    self.args, self.codec, self.route, self.grid = args, args[1], static["route"], static["grid"]
    self.flops = count_flops(functools.partial(generate.sample_images, **static), *args)
    begin = time.perf_counter()
    self._compiled = generate.sample_images.lower(*args, **static).compile()
    self.compile_s = time.perf_counter() - begin

  def __call__(self) -> jax.Array:
    return self._compiled(*self.args)


class _Decoder:
  """The compiled decoder of one VAE."""

  def __init__(self, codec: Codec, shape: tuple[int, ...]):
    decode = jax.jit(lambda codec, latents: codec.decode(latents))
    self._args = (codec, jnp.zeros(shape))
    self.flops = count_flops(decode, *self._args)
    self._compiled = decode.lower(*self._args).compile()

  def __call__(self) -> jax.Array:
    return self._compiled(*self._args)


def interleaved(programs: dict[Any, Callable[[], jax.Array]], repeats: int) -> dict[Any, list[float]]:
  """Seconds of every run of each program, in turns; the first round warms up and does not count."""
  seconds = {name: [] for name in programs}
  for number in range(repeats + 1):
    for name, program in programs.items():
      begin = time.perf_counter()
      jax.block_until_ready(program())
      if number:
        seconds[name].append(time.perf_counter() - begin)
  return seconds


def _profile(
  pipeline: generate.Pipeline,
  program: _Program,
  decoder: _Decoder,
  image_s: list[float],
  decode_s: list[float],
  steps: int,
  guidance: float,
  batch: int,
) -> Profile:
  cfg, route = pipeline.model.cfg, program.route
  grid = tuple(n // cfg.patch for n in program.grid)
  height, width = (n * route.vae for n in program.grid)
  step_s = (min(image_s) - min(decode_s)) / steps
  return Profile(
    active_blocks=len(route.active),
    active_parameters=dit.count_parameters(pipeline.model.params, route),
    tokens=int(np.prod(grid)),
    realised_sparsity=realised_sparsity(route, grid, cfg.block_side),
    flops_per_step=(program.flops - decoder.flops) / steps / batch,
    flops_per_image=program.flops / batch,
    ms_per_step=1000 * step_s / batch if step_s > 0 else math.nan,
    ms_per_image=1000 * statistics.median(image_s) / batch,
    compile_s=program.compile_s,
    batch=batch,
    steps=steps,
    guidance=guidance,
    height=height,
    width=width,
    num_blocks=blocks.BlockGrid(*grid, cfg.block_side).num_blocks,
    kept=kept_blocks(route, grid, cfg.block_side),
  )
