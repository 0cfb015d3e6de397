"""Pictures to learn from: drawn with noise along one route, scored while the next ones are drawn, ready for the update.

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
from elasticdit_jax.flow import path, sampler, stochastic
from elasticdit_jax.models import dit
from elasticdit_jax.models.codec import Codec, to_uint8
from elasticdit_jax.train import losses
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
    window: steps with noise, the ones that are trained; they lie within first..last.
    batch: pictures computed at a time, and rows of one backward pass.
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
    """First noisy step of an epoch, uniform over the places the window has."""
    places = self.last - self.first + 2 - self.window
    return self.first + int(np.random.default_rng([seed, epoch, 1]).integers(places))

  def table(self, times: np.ndarray, first: int) -> stochastic.Steps:
    """The steps of a rollout whose window begins at `first`."""
    if self.rule == "ode":
      return stochastic.ode(times)
    return stochastic.window(stochastic.RULES[self.rule](times, self.level), first, self.window)


@dataclasses.dataclass(frozen=True)
class Drawn:
  """One route's pictures of an epoch, B = prompts x group in that order, and M = trained times x B rows of update.

  Attributes:
    x, goal: float32 [M, h, w, C], see losses.Moments.
    row: columns [M].
    text: B rows.
    prompts: of the B pictures.
    images: uint8 [B, H, W, 3].
    rewards: float32 [B], the weighted sum.
    scores: name -> float32 [B].
    advantage: float32 [B].
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The compiled sampler.

  Args:
    params, codec: weights and VAE of the route.
    text, null: B prompts; the empty one.
    guidance: scale, []; None for plain conditional sampling.
    key: of the epoch. The first noise of a picture is a function of (key, index) alone.
    index: int32 [B].
    times, steps, first: schedule, its table, and the first step to keep.
    cfg, route, grid: the backbone, the way through it, (rows, columns) of latent cells.
    kept: number of steps to keep.

  Returns:
    (x float32 [kept + 1, B, h, w, C] around the kept steps, finished latents [B, h, w, C], pictures uint8).
  """
  first_key, step_key = jax.random.split(key)
  shape = (*grid, codec.cfg.latent_channels)
  noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(first_key, i), shape))(index)
  guided = guidance_lib.guide(
    lambda x, t, text: velocity(cfg, params, x, t, text, route), text, null, 1 if guidance is None else guidance
  )
  way = sampler.trajectory(
    guided, noise, times, step=stochastic.step(steps), key=jax.random.fold_in(step_key, index[0])
  )
  return jax.lax.dynamic_slice_in_dim(way, first, kept + 1), way[-1], to_uint8(codec.decode(way[-1]))


class Sampler:
  """Draws the pictures of prompts along routes.

  Args:
    job: see train.job; its model's encoder, codecs and times.
    plan: see Plan.
    objective: what the rows are for.
    spread: see losses.advantages.
    reward: scores pictures.
  """

  def __init__(self, job: Any, plan: Plan, objective: losses.Objective, spread: str, reward: Reward):
    self._job, self.plan, self._objective, self._spread, self._reward = job, plan, objective, spread, reward
    self.null = job.encoder.encode([""])
    self.scale = None if plan.guidance == 1 else jnp.float32(plan.guidance)

  def grid(self, route: Route) -> tuple[int, int]:
    """Latent cells of a picture."""
    side = self._job.config.data.size // route.vae
    return side, side

  def times(self, route: Route) -> np.ndarray:
    """The schedule of a route."""
    rows, columns = self.grid(route)
    return sampler.times(self.plan.steps, self._job.flow.shift_at(rows * columns // self._job.cfg.patch**2))

  def rollout(self, params: Any, prompts: Sequence[Prompt], route: Route, key: jax.Array, first: int) -> Drawn:
    """plan.group pictures of each prompt, their rewards and the rows of the update.

    Args:
      params: of the weights that draw.
      prompts: of the epoch.
      route: the way.
      key: of the epoch; routes with one VAE start from the same noise.
      first: first noisy step.

    Raises:
      ValueError: for a reward that is missing or not finite.
    """
    rows = [prompt for prompt in prompts for _ in range(self.plan.group)]
    key = jax.random.fold_in(key, route.vae)
    steps = self.plan.table(self.times(route), first)
    kept = self.plan.window if self._objective.name == "grpo" else 0
    ways, ends, images, scores, text = self._draw(params, rows, route, key, steps, first, kept)
    total = combine(scores, self._reward.weights)
    advantage = losses.advantages(total.reshape(len(prompts), -1), self._spread).reshape(-1)
    if self._objective.name == "grpo":
      x, goal, row = _steps_taken(ways, jax.tree.map(lambda c: c[first : first + kept], steps))
    else:
      x, goal, row = self._renoised(ends, route, key)
    return Drawn(x, goal, row, text, rows, images, total, scores, advantage)

  def pictures(
    self, params: Any, prompts: Sequence[Prompt], route: Route, key: jax.Array
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pictures without noise in the steps, for measuring: (uint8 [B, H, W, 3], scores)."""
    steps = stochastic.ode(self.times(route))
    _, _, images, scores, _ = self._draw(params, prompts, route, jax.random.fold_in(key, route.vae), steps, 0, 0)
    return images, scores

  def _draw(self, params, rows, route, key, steps, first, kept):
    """Batch by batch; rewards are scored while the next batch is drawn."""
    batch, parts, pending = self.plan.batch, [], []
    filled = [row.text for row in rows] + [""] * (-len(rows) % batch)
    text = self._job.encoder.encode(filled)
    for start in range(0, len(filled), batch):
      part = slice(start, start + batch)
      index = np.arange(start, start + batch, dtype=np.int32)
      way, end, images = draw_batch(
        params,
        self._job.codecs[route.vae],
        jax.tree.map(lambda a, part=part: a[part], text),
        self.null,
        self.scale,
        key,
        index,
        self.times(route),
        steps.to_device(),
        first,
        cfg=self._job.cfg,
        route=route,
        grid=self.grid(route),
        kept=kept,
      )
      images, real = np.asarray(images), rows[part]
      parts.append((way, end, images))
      texts, metadata = [row.text for row in real], [row.metadata for row in real]
      pending.append(self._reward.submit(images[: len(real)], texts, metadata))
    found = [self._reward.collect(each) for each in pending]
    scores = {name: np.concatenate([each[name] for each in found]) for name in self._reward.names}
    ways = jnp.concatenate([way for way, _, _ in parts], axis=1)[:, : len(rows)]
    ends = jnp.concatenate([end for _, end, _ in parts])[: len(rows)]
    images = np.concatenate([image for _, _, image in parts])[: len(rows)]
    return ways, ends, images, scores, jax.tree.map(lambda a: jnp.asarray(a[: len(rows)]), text)

  def _renoised(self, ends: jax.Array, route: Route, key: jax.Array) -> tuple[jax.Array, jax.Array, stochastic.Steps]:
    """Finished latents at plan.window new times each, for an objective of the forward process."""
    count = self.plan.window
    time_key, noise_key = jax.random.split(jax.random.fold_in(key, 2))
    rows, columns = self.grid(route)
    shift = self._job.flow.shift_at(rows * columns // self._job.cfg.patch**2)
    t = path.sample_t(time_key, (count * len(ends),), mean=self._job.flow.mean, std=self._job.flow.std, shift=shift)
    goal = jnp.tile(ends, (count, 1, 1, 1))
    x = path.interpolate(goal, jax.random.normal(noise_key, goal.shape), t)
    zero = jnp.zeros_like(t)
    return x, goal, stochastic.Steps(t, zero, zero, zero, zero, zero, zero, zero)


def _steps_taken(ways: jax.Array, steps: stochastic.Steps) -> tuple[jax.Array, jax.Array, stochastic.Steps]:
  """[K + 1, B, ...] and K steps as M = K x B rows: where each began, where it went, and its row of the table."""
  kept, count = len(steps.t), ways.shape[1]
  x, goal = (part.reshape((kept * count,) + ways.shape[2:]) for part in (ways[:-1], ways[1:]))
  return x, goal, jax.tree.map(lambda column: jnp.repeat(column, count), steps.to_device())
