"""One update of the shared weights along a group of routes.

    images --codec (per VAE factor)--> x0 --interpolate(t, eps)--> x_t --route 1--> |v1 - (eps - x0)|^2 --+
                                        (the same x_t for every     --route 2--> |v2 - (eps - x0)|^2 --+--> loss
                                         route of one factor)
Routes of a group see identical batches, times and noise (UWCO, section 2.1.3).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from elasticdit_jax import elastic
from elasticdit_jax.elastic import Route
from elasticdit_jax.flow import path
from elasticdit_jax.models import dit
from elasticdit_jax.models.codec import Codec
from elasticdit_jax.train import optim
from elasticdit_jax.train.state import TrainState
from elasticdit_jax.types import Batch, Text, to_float

Group = tuple[Route, ...]
Codecs = Mapping[int, Codec]


@dataclasses.dataclass(frozen=True)
class FlowConfig:
  """Times on the path.

  Attributes:
    mean, std: of the logit-normal distribution.
    shift, tokens: the time shift that is right for `tokens` image tokens; other grids follow path.shift_for.
  """

  mean: float
  std: float
  shift: float
  tokens: int

  def shift_at(self, tokens: int) -> float:
    """The shift for a grid of this many image tokens."""
    return path.shift_for(tokens, self.tokens, self.shift)


def velocity(cfg: dit.DiTConfig, params: Any, x: jax.Array, t: jax.Array, text: Text, route: Route) -> jax.Array:
  """The backbone as a function: x [B, h, w, C], t [B] -> velocity like x."""
  return dit.ElasticDiT(cfg).apply({"params": params}, x, t, text.embedding, text.mask, route=route)


def group_losses(
  cfg: dit.DiTConfig,
  flow: FlowConfig,
  params: Any,
  latents: Mapping[int, jax.Array],
  text: Text,
  key: jax.Array,
  group: Group,
  teacher: Any = None,
  distill: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean loss over a group of routes: |v - (eps - x0)|^2 + distill |v - v_teacher|^2.

  The teacher is the full backbone with weights of its own. Its velocity is the mean of many targets eps - x0, without
  their noise: what a shallower route, and the full one beside it, regress in few steps.

  Args:
    cfg, flow, params: the backbone, its times, its weights.
    latents: VAE factor -> x0 [B, h, w, C], one entry per factor in the group.
    text: captions.
    key: of this step.
    group: the routes.
    teacher: weights that run dense at full depth along the VAE of each route; read where distill is not 0.
    distill: weight of the second term; 0 switches self-distillation off.

  Returns:
    (loss, {"loss/<route>": flow-matching loss of that route}).
  """
  metrics, shared, total = {}, {}, 0.0
  for route in group:
    if route.vae not in shared:
      x_t, t, target = noised(cfg, flow, latents[route.vae], key, route.vae)
      full, guide = elastic.standard_routes(cfg.depth)[f"max-f{route.vae}"], None
      if distill:
        guide = jax.lax.stop_gradient(velocity(cfg, teacher, x_t, t, text, full))
      shared[route.vae] = x_t, t, target, guide
    x_t, t, target, guide = shared[route.vae]
    v = velocity(cfg, params, x_t, t, text, route)
    loss = jnp.mean(jnp.square(v - target))
    metrics[f"loss/{route.name}"] = loss
    total = total + loss
    if guide is not None:
      total = total + distill * jnp.mean(jnp.square(v - guide))
  return total / len(group), metrics


def noised(
  cfg: dit.DiTConfig, flow: FlowConfig, x0: jax.Array, key: jax.Array, vae: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(x_t, t [B], eps - x0) of latents x0 [B, h, w, C]; routes of one factor share times and noise."""
  time_key, noise_key = jax.random.split(jax.random.fold_in(key, vae))
  shift = flow.shift_at(x0.shape[1] * x0.shape[2] // cfg.patch**2)
  t = path.sample_t(time_key, x0.shape[:1], mean=flow.mean, std=flow.std, shift=shift)
  eps = jax.random.normal(noise_key, x0.shape)
  return path.interpolate(x0, eps, t), t, path.target(x0, eps)


def make_step(
  cfg: dit.DiTConfig,
  flow: FlowConfig,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float,
  distill: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The jitted update (state, codecs, batch, group, trainable, distilled) -> (state, metrics).

  `group` and `trainable` (routes) and `distilled` (whether state.teacher is listened to) are static: one trace per
  distinct triple. Parameters that no route in `trainable` reads keep their value and their optimiser state bit for bit;
  so a phase that trains flex-lite alone freezes the skipped blocks. The state is donated.
  """

  def update(state: TrainState, codecs: Codecs, batch: Batch, group: Group, trainable: Group, distilled: bool = False):
    image = to_float(batch.image)
    latents = {factor: codecs[factor].encode(image) for factor in {r.vae for r in group}}
    key = jax.random.fold_in(state.key, state.step)

    def loss_fn(params):
      weight = distill if distilled else 0.0
      return group_losses(cfg, flow, params, latents, batch.text, key, group, state.teacher, weight)

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    frozen = frozen_mask(state.params, trainable)
    params, opt_state = optim.frozen_update(tx, grads, state.opt_state, state.params, frozen)
    ema = optim.ema_update(state.ema, params, state.step, ema_decay)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
    return TrainState(state.step + 1, params, opt_state, ema, state.key, state.teacher), metrics

  return jax.jit(update, static_argnames=("group", "trainable", "distilled"), donate_argnums=0)


def frozen_mask(params: Any, trainable: Group) -> Any:
  """A tree like params of Python bools: True where no route of `trainable` reads the parameter."""
  return jax.tree_util.tree_map_with_path(
    lambda keys, _: not any(route.owns([str(k.key) for k in keys]) for route in trainable), params
  )
