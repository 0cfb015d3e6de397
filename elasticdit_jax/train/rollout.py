"""Pictures to learn from: drawn with noise along one route, scored while the next ones are drawn, ready for the update.

A batch is split over all devices of all hosts (train/sharding.py), so that pictures of one prompt may lie on several;
every host scores those that lie on it, and advantages come from the rewards of all.

prompts x group --sampler, noise in a window of steps--> latents --decoder--> uint8 --rewards (threads)--> advantages
                    |
                    +-- x before and after every step of the window: the rows of the update
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elasticdit_jax.elastic import Route
from elasticdit_jax.flow import guidance as guidance_lib
from elasticdit_jax.flow import sampler, stochastic
from elasticdit_jax.models import dit
from elasticdit_jax.models.codec import Codec, to_uint8
from elasticdit_jax.ops import placement
from elasticdit_jax.train import losses, scoring
from elasticdit_jax.train import rows as rows_lib
from elasticdit_jax.train.prompts import Prompt
from elasticdit_jax.train.rewards import Reward, combine
from elasticdit_jax.train.step import velocity
from elasticdit_jax.types import Text


@dataclasses.dataclass(frozen=True)
class Plan:
  """How pictures are drawn.

  Attributes:
    group: pictures of each prompt.
    steps: of the sampler.
    guidance: scale of classifier-free guidance; 1 switches it off.
    rule, level: noise of the steps, see flow.stochastic; rule "ode" draws none.
    window: steps with noise, the ones that are trained; they lie within first..last. For DiffusionNFT also the number
      of times at which a picture is trained.
    batch: pictures computed at a time, and rows of one backward pass, over all devices.
  """

  group: int
  steps: int
  guidance: float
  rule: str
  level: float
  window: int
  first: int
  last: int
  batch: int

  def window_at(self, seed: int, epoch: int) -> int:
    """First noisy step of an epoch, uniform over the places the window has; without noise it is anywhere."""
    if self.rule == "ode":
      return self.first
    places = self.last - self.first + 2 - self.window
    return self.first + int(np.random.default_rng([seed, epoch, 1]).integers(places))

  def table(self, times: np.ndarray, first: int) -> stochastic.Steps:
    """The steps of a rollout whose window begins at `first`."""
    if self.rule == "ode":
      return stochastic.ode(times)
    return stochastic.window(stochastic.RULES[self.rule](times, self.level), first, self.window)


@dataclasses.dataclass(frozen=True)
class Drawn:
  """One route's pictures of an epoch, B = prompts x group in that order, and M = times x B rows of update.

  Attributes:
    x, goal: float32 [M, h, w, C], see losses.Moments; all pictures at one time, at the next, ...
    row: columns [M].
    text: B rows.
    prompts: of the B pictures.
    images: uint8 [b, H, W, 3] of the b pictures that this process scored, in their order.
    rewards: float32 [B], the weighted sum.
    scores: name -> float32 [B].
    advantage: float32 [B].
    held: how many of the last rows are those of Objective.anchor: B or 0.
    velocity: float32 [M - held, h, w, C] at x, guided as the sampler was, of the weights that drew; None where
      the rows are not at steps of the sampler.
  """

  x: jax.Array
  goal: jax.Array
  row: stochastic.Steps
  text: Text
  prompts: Sequence[Prompt]
  images: np.ndarray
  rewards: np.ndarray
  scores: dict[str, np.ndarray]
  advantage: np.ndarray
  held: int
  velocity: jax.Array | None


@functools.partial(jax.jit, static_argnames=("cfg", "route", "grid", "kept"))
def draw_batch(
  params: Any,
  codec: Codec,
  text: Text,
  null: Text,
  guidance: jax.Array | None,
  key: jax.Array,
  index: jax.Array,
  times: jax.Array,
  steps: stochastic.Steps,
  first: jax.Array,
  *,
  cfg: dit.DiTConfig,
  route: Route,
  grid: tuple[int, int],
  kept: int,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
  """The compiled sampler.

  Args:
    params, codec: weights and VAE of the route.
    text, null: B prompts; the empty one.
    guidance: scale, []; None for plain conditional sampling.
    key: of the epoch. All noise of a picture is a function of (key, index) alone: of no batch, device or host.
    index: int32 [B].
    times, steps, first: schedule, its table, and the first step to keep.
    cfg, route, grid: the backbone, the way through it, (rows, columns) of latent cells.
    kept: number of steps to keep.

  Returns:
    ((x float32 [kept + 1, B, h, w, C] around the kept steps, velocities [kept, B, h, w, C] where they began), finished
    latents [B, h, w, C], pictures uint8).
  """
  first_key, step_key = jax.random.split(key)
  shape = (*grid, codec.cfg.latent_channels)
  index, text = jax.tree.map(lambda a: placement.split(jnp.asarray(a), cfg.batch_axes), (index, text))
  noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(first_key, i), shape))(index)
  guided = guidance_lib.guide(
    lambda x, t, text: velocity(cfg, params, x, t, text, route), text, null, 1 if guidance is None else guidance
  )
  noise = placement.split(noise, cfg.batch_axes)
  way, asked = sampler.trajectory(guided, noise, times, step=stochastic.step(steps, index), key=step_key)
  around = tuple(
    placement.split(jax.lax.dynamic_slice_in_dim(part, first, count), None, cfg.batch_axes)
    for part, count in ((way, kept + 1), (asked, kept))
  )
  end, images = (placement.split(x, cfg.batch_axes) for x in (way[-1], to_uint8(codec.decode(way[-1]))))
  return around, end, images


class Sampler:
  """Draws the pictures of prompts along routes.

  Args:
    job: see train.job; its model's encoder, codecs, times and layout.
    plan: see Plan.
    objective: what the rows are for.
    spread: see losses.advantages.
    reward: scores pictures.
  """

  def __init__(self, job: Any, plan: Plan, objective: losses.Objective, spread: str, reward: Reward):
    self._job, self.plan, self._objective, self._spread, self._reward = job, plan, objective, spread, reward
    self._cfg, self._codecs = job.layout.bind(job.cfg), job.layout.replicate(dict(job.codecs))
    self.null = job.layout.replicate(job.encoder.encode([""]))
    self.scale = None if plan.guidance == 1 else np.float32(plan.guidance)

  def grid(self, route: Route) -> tuple[int, int]:
    """Latent cells of a picture."""
    side = self._job.config.data.size // route.vae
    return side, side

  def times(self, route: Route) -> np.ndarray:
    """The schedule of a route."""
    rows, columns = self.grid(route)
    return sampler.times(self.plan.steps, self._job.flow.shift_at(rows * columns // self._job.cfg.patch**2))

  def rollout(self, params: Any, prompts: Sequence[Prompt], route: Route, key: jax.Array, first: int) -> Drawn:
    """plan.group pictures of each prompt, their rewards and the rows of the update; all processes take part.

    Args:
      params: of the weights that draw.
      prompts: of the epoch.
      route: the way.
      key: of the epoch; routes with one VAE start from the same noise.
      first: first noisy step.

    Raises:
      ValueError: for a reward that is missing or not finite.
      interrupt.StopError, OSError: see scoring.settle.
    """
    rows = [prompt for prompt in prompts for _ in range(self.plan.group)]
    key = jax.random.fold_in(key, route.vae)
    steps = self.plan.table(self.times(route), first)
    of_steps = self._objective.name != "nft"
    kept = self.plan.window if of_steps else 0
    parts, scores, text = self._draw(params, rows, route, key, steps, first, kept)
    ways, ends, images = zip(*parts, strict=True)
    total = combine(scores, self._reward.weights)
    advantage = losses.advantages(total.reshape(len(prompts), -1), self._spread).reshape(-1)
    if of_steps:
      x, goal, velocity_there = rows_lib.of_steps(ways, len(rows), self._job.layout)
      row = jax.tree.map(lambda c: np.repeat(np.float32(c[first : first + kept]), len(rows)), steps)
    else:
      (x, goal, row), velocity_there = self._renoised(ends, len(rows), route, key), None
    held = len(rows) if self._objective.anchor else 0
    if held:
      key = jax.random.fold_in(key, 3)
      x, goal, row = rows_lib.with_anchor((x, goal, row), ends, key, held, self._law(route), self._job.layout)
    return Drawn(x, goal, row, text, rows, np.concatenate(images), total, scores, advantage, held, velocity_there)

  def pictures(
    self, params: Any, prompts: Sequence[Prompt], route: Route, key: jax.Array
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pictures without noise in the steps, for measuring: (uint8 [B, H, W, 3], scores); all on every process."""
    steps, key = stochastic.ode(self.times(route)), jax.random.fold_in(key, route.vae)
    parts, scores, _ = self._draw(params, prompts, route, key, steps, 0, 0, everywhere=True)
    return np.concatenate([images for _, _, images in parts])[: len(prompts)], scores

  def _draw(self, params, rows, route, key, steps, first, kept, everywhere=False):
    """Batch by batch; a process's own pictures are scored while the next batch is drawn.

    Returns:
      ([(x and velocities of the kept steps, finished latents, pictures: its own, or all of the batch `everywhere`) of
      each batch, the last one filled up], scores of all rows, text of all rows).
    """
    layout, batch = self._job.layout, self.plan.batch
    encoded = self._job.encoder.encode([row.text for row in rows] + [""] * (-len(rows) % batch))
    parts, pending, numbers = [], [], []
    for start in range(0, len(encoded.mask), batch):
      part = jax.tree.map(lambda a, start=start: a[start : start + batch], encoded)
      with layout.active():
        way, end, images = draw_batch(
          params,
          self._codecs[route.vae],
          part,
          self.null,
          self.scale,
          key,
          np.arange(start, start + batch, dtype=np.int32),
          self.times(route),
          jax.tree.map(np.float32, steps),
          np.int32(first),
          cfg=self._cfg,
          route=route,
          grid=self.grid(route),
          kept=kept,
        )
      number, own = layout.owned(images)
      number = start + number
      mine = [rows[i] for i in number if i < len(rows)]  # what fills a batch up comes last
      number, own = number[: len(mine)], own[: len(mine)]
      parts.append((way, end, np.asarray(layout.local(images)) if everywhere else own))
      if mine:
        numbers.append(number)
        pending.append(self._reward.submit(own, [row.text for row in mine], [row.metadata for row in mine]))
    scores = scoring.gather(self._reward, pending, numbers, len(rows))
    return parts, scores, layout.spread(jax.tree.map(lambda a: jnp.asarray(a[: len(rows)]), encoded))

  def _renoised(
    self, ends: Sequence[jax.Array], count: int, route: Route, key: jax.Array
  ) -> tuple[jax.Array, jax.Array, stochastic.Steps]:
    """Finished latents at plan.window new times each, for an objective of the forward process."""
    key = jax.random.fold_in(key, 2)
    return rows_lib.renoised(ends, key, count, self.plan.window, self._law(route), self._job.layout)

  def _law(self, route: Route) -> tuple[float, float, float]:
    """Of new times: mean, std and shift of path.sample_t."""
    rows, columns = self.grid(route)
    flow = self._job.flow
    return flow.mean, flow.std, flow.shift_at(rows * columns // self._job.cfg.patch**2)
