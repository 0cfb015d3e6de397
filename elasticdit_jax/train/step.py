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
from elasticdit_jax.ops import placement
from elasticdit_jax.train import optim
from elasticdit_jax.train.state import TrainState
from elasticdit_jax.types import Batch, Text, to_float

Group = tuple[Route, ...]
Codecs = Mapping[int, Codec]
_MEAN_RATE = 0.02


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
  points = {vae: noised(cfg, flow, latents[vae], key, vae) for vae in factors(group)}
  return losses_at(cfg, params, points, text, group, teacher, distill)


def losses_at(
  cfg: dit.DiTConfig,
  params: Any,
  points: Mapping[int, tuple[jax.Array, jax.Array, jax.Array]],
  text: Text,
  group: Group,
  teacher: Any = None,
  distill: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`group_losses` at given points: VAE factor -> (x_t, t, eps - x0), see `noised`."""
  metrics, guides, total = {}, {}, 0.0
  for route in group:
    x_t, t, target = points[route.vae]
    if distill and route.vae not in guides:
      full = elastic.standard_routes(cfg.depth)[f"max-f{route.vae}"]
      guides[route.vae] = jax.lax.stop_gradient(velocity(cfg, teacher, x_t, t, text, full))
    v = velocity(cfg, params, x_t, t, text, route)
    loss = jnp.mean(jnp.square(v - target))
    metrics[f"loss/{route.name}"] = loss
    total = total + loss
    if distill:
      total = total + distill * jnp.mean(jnp.square(v - guides[route.vae]))
  return total / len(group), metrics


def factors(group: Group) -> tuple[int, ...]:
  """The VAE factors of a group, each once."""
  return tuple(dict.fromkeys(route.vae for route in group))


def noised(
  cfg: dit.DiTConfig, flow: FlowConfig, x0: jax.Array, key: jax.Array, vae: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(x_t, t [B], eps - x0) of latents x0 [B, h, w, C]; routes of one factor share times and noise."""
  return between(x0, *draw(cfg, flow, x0.shape, key, vae))


def draw(
  cfg: dit.DiTConfig, flow: FlowConfig, shape: tuple[int, ...], key: jax.Array, vae: int
) -> tuple[jax.Array, jax.Array]:
  """(t [B], eps) for latents of this shape [B, h, w, C]."""
  time_key, noise_key = jax.random.split(jax.random.fold_in(key, vae))
  shift = flow.shift_at(shape[1] * shape[2] // cfg.patch**2)
  t = path.sample_t(time_key, shape[:1], mean=flow.mean, std=flow.std, shift=shift)
  return t, jax.random.normal(noise_key, shape)


def between(x0: jax.Array, t: jax.Array, eps: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(x_t, t, eps - x0): the point at time t [B] between latents and noise, and what the velocity should be there."""
  return path.interpolate(x0, eps, t), t, path.target(x0, eps)


def make_step(
  cfg: dit.DiTConfig,
  flow: FlowConfig,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float,
  distill: float = 0.0,
  accumulate: int = 1,
  spike: float = 0.0,
  round_once: bool = False,
  out_shardings: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The jitted update (state, codecs, batch, group, trainable, distilled) -> (state, metrics).

  `group` and `trainable` (routes) and `distilled` (whether state.teacher is listened to) are static: one trace per
  distinct triple. Parameters that no route in `trainable` reads keep their value and their optimiser state bit for bit;
  so a phase that trains flex-lite alone freezes the skipped blocks. The state is donated.

  Args:
    cfg, flow, tx: the backbone, its times, the optimiser.
    ema_decay: of the averaged weights.
    distill: weight of self-distillation where a step is `distilled`.
    accumulate: equal parts of the batch whose gradients are averaged one after the other: memory of one part, the same
      update up to rounding.
    spike: an update whose loss is above `spike` times its running mean, or not finite, is left out, and metrics say
      "skipped" 1; 0 leaves none out. Needs state.create(..., spikes=True).
    round_once: matrices of blocks take the dtype of their products once for all routes of a part of the batch. In
      bfloat16 the gradients of these routes are then added up, in bfloat16, before devices exchange them, not
      afterwards: half the transfers for two routes, for the memory of one route's gradients, whole. Worth it where
      links are slow: between slices.
    out_shardings: for (state, metrics), as jax.jit takes them; None where there is one device.
  """

  def update(state: TrainState, codecs: Codecs, batch: Batch, group: Group, trainable: Group, distilled: bool = False):
    key = jax.random.fold_in(state.key, state.step)
    weight = distill if distilled else 0.0

    def gradients(batch: Batch, drawn: Mapping[int, Any] | None = None):
      latents = _encode(codecs, batch, group)
      points = {
        vae: noised(cfg, flow, x0, key, vae) if drawn is None else between(x0, *drawn[vae])
        for vae, x0 in latents.items()
      }

      def loss_fn(params):
        params = _rounded(cfg, params) if round_once else params
        return losses_at(cfg, params, points, batch.text, group, state.teacher, weight)

      return jax.value_and_grad(loss_fn, has_aux=True)(state.params)

    if accumulate == 1:
      (loss, metrics), grads = gradients(batch)
    else:
      shapes = jax.eval_shape(lambda codecs, batch: _encode(codecs, batch, group), codecs, batch)
      drawn = {vae: draw(cfg, flow, x0.shape, key, vae) for vae, x0 in shapes.items()}
      (loss, metrics), grads = _average(lambda part: gradients(*part), (batch, drawn), accumulate, cfg.batch_axes)
    frozen = frozen_mask(state.params, trainable)
    params, opt_state = optim.frozen_update(tx, grads, state.opt_state, state.params, frozen)
    ema = optim.ema_update(state.ema, params, state.step, ema_decay)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
    new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
    if spike:
      new, metrics = _without_spike(state, new, metrics, spike)
    return new, metrics

  static = ("group", "trainable", "distilled")
  return jax.jit(update, static_argnames=static, donate_argnums=0, out_shardings=out_shardings)


def _encode(codecs: Codecs, batch: Batch, group: Group) -> dict[int, jax.Array]:
  image = to_float(batch.image)
  return {factor: codecs[factor].encode(image) for factor in factors(group)}


def _average(gradients: Callable[[Any], Any], rows: Any, parts: int, batch_axes: placement.Axes) -> Any:
  """Mean of `gradients` over equal parts of `rows`, a tree of arrays [B, ...], one part after the other."""

  def cut(x: jax.Array) -> jax.Array:
    # Strided: each part has rows of every device.
    x = jnp.asarray(x)
    return placement.split(x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), None, batch_axes)

  rows = jax.tree.map(cut, rows)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], rows)))
  total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, gradients(part)), None), zeros, rows)
  return jax.tree.map(lambda x: x / parts, total)


def _without_spike(
  old: TrainState, new: TrainState, metrics: dict[str, jax.Array], factor: float
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The old weights with the new step number where the loss jumped; decided on the device, nobody waits for it."""
  loss, mean = metrics["loss"], old.loss_mean
  finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
  good = finite & ((mean == 0) | (loss <= factor * mean))
  # A loss that stays high is no spike: it pulls the mean up until it passes.
  seen = jnp.where(mean == 0, loss, jnp.minimum(loss, factor * mean))
  moved = jnp.where(finite, jnp.where(mean == 0, seen, mean + _MEAN_RATE * (seen - mean)), mean)

  def keep(after: Any, before: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), after, before)

  kept = {field: keep(getattr(new, field), getattr(old, field)) for field in ("params", "opt_state", "ema")}
  return dataclasses.replace(new, loss_mean=moved, **kept), metrics | {"skipped": 1.0 - good}


def _rounded(cfg: dit.DiTConfig, params: Any) -> Any:
  matrices = optim.block_matrices(params)
  return jax.tree.map(lambda x, matrix: x.astype(cfg.dtype) if matrix else x, params, matrices)


def frozen_mask(params: Any, trainable: Group) -> Any:
  """A tree like params of Python bools: True where no route of `trainable` reads the parameter."""
  return jax.tree_util.tree_map_with_path(
    lambda keys, _: not any(route.owns([str(k.key) for k in keys]) for route in trainable), params
  )
