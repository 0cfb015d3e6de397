"""Optimiser, learning-rate schedule, EMA, and the update that really freezes.

  config.optimizer:  name            "adamw" | "muon" (matrices inside blocks; everything else on AdamW)
                     learning_rate   peak; the same for both, because Muon's steps are scaled to AdamW's typical size
                     warmup_steps    linear from 0; absent: none
                     decay_fraction  last part of the run, linear to 0 ("constant, then linear tail"); absent: none
                     weight_decay    decoupled, times the learning rate; not on vectors
                     b1, b2          AdamW moments
                     clip_norm       global norm over the trainable leaves; 0 switches clipping off

Zero gradients do not freeze anything: momentum and weight decay go on moving the parameters. `frozen_update` therefore
masks the updates and the optimiser's own state.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from elasticdit_jax.ops import placement

Params = Any
Places = Callable[[Params], Any]  # a tree -> the NamedSharding of each of its leaves, such as Layout.of
_BLOCK = re.compile(r"block_\d+$")
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # Jordan et al. 2024, "Muon"
_NEWTON_SCHULZ_STEPS = 5
_ADAM_LIKE_RMS = 0.2  # Liu et al. 2025, "Muon is scalable", section 2.2: AdamW's usual update size


def schedule(config: Mapping[str, Any], total_steps: int) -> optax.Schedule:
  """Linear warm-up, constant, linear tail to zero after the last of `total_steps` updates.

  Raises:
    ValueError: naming the field of config.optimizer that is out of range.
  """
  _check(config, total_steps)
  peak, (warmup, decay) = config["learning_rate"], _shape(config)
  tail = max(1.0, decay * total_steps)

  def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    rising = jnp.minimum(1.0, (count + 1) / max(1, warmup))
    falling = jnp.clip((total_steps - count) / tail, 0.0, 1.0) if decay else 1.0
    return peak * rising * falling

  return learning_rate


def _shape(config: Mapping[str, Any]) -> tuple[int, float]:
  """(warmup_steps, decay_fraction); a config without them has a constant rate."""
  return config.get("warmup_steps", 0), config.get("decay_fraction", 0.0)


def _check(config: Mapping[str, Any], total_steps: int) -> None:
  warmup, decay = _shape(config)
  for field, good, expected in (
    ("name", config["name"] in ("adamw", "muon"), "adamw or muon"),
    ("learning_rate", 0 < config["learning_rate"] < math.inf, "a positive number"),
    ("warmup_steps", warmup >= 0, "a number of steps"),
    ("decay_fraction", 0 <= decay <= 1, "a fraction in [0, 1]"),
    ("weight_decay", 0 <= config["weight_decay"] < math.inf, "zero or a positive number"),
    ("b1", 0 <= config["b1"] < 1, "a number in [0, 1)"),
    ("b2", 0 <= config["b2"] < 1, "a number in [0, 1)"),
    ("clip_norm", 0 <= config["clip_norm"] < math.inf, "a norm, or 0 for no clipping"),
  ):
    if not good:
      raise ValueError(f"config.optimizer.{field}: expected {expected}, got {config[field]!r}")
  if total_steps < 1:
    raise ValueError(f"total_steps: expected at least one step, got {total_steps}")


def make(
  config: Mapping[str, Any], params: Params, learning_rate: optax.ScalarOrSchedule, places: Places | None = None
) -> optax.GradientTransformation:
  """The optimiser of config.optimizer.

  Args:
    config: see the module docstring.
    params: the parameters or their shapes (`jax.eval_shape`); only names and ranks are read.
    learning_rate: usually `schedule(config, total_steps)`; counted in updates.
    places: where the parameters lie, in a program split over devices; see `scale_by_grouped_muon`.

  Raises:
    ValueError: naming the field that is out of range.
  """
  _check(config, total_steps=1)
  adam = optax.scale_by_adam(b1=config["b1"], b2=config["b2"])
  if config["name"] == "muon":
    labels = jax.tree.map(lambda m: "matrix" if m else "other", block_matrices(params))
    scale = optax.partition({"matrix": scale_by_grouped_muon(places=places), "other": adam}, labels)
  else:
    scale = adam
  return optax.chain(
    optax.clip_by_global_norm(config["clip_norm"]) if config["clip_norm"] else optax.identity(),
    scale,
    optax.add_decayed_weights(config["weight_decay"], mask=jax.tree.map(lambda x: len(x.shape) > 1, params)),
    optax.scale_by_learning_rate(learning_rate),
  )


def block_matrices(params: Params) -> Params:
  """True for the leaves that Muon takes: two-dimensional kernels inside `block_NN`.

  Embeddings, input and output projections, convolutions, norms, biases and per-block modulation tables stay on AdamW.
  """

  def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    keys = [str(getattr(k, "key", k)) for k in path]
    return keys[-1] == "kernel" and len(leaf.shape) == 2 and any(_BLOCK.match(k) for k in keys)

  return jax.tree_util.tree_map_with_path(is_matrix, params)


class MuonState(NamedTuple):
  """Momentum of the matrices, and the number of updates."""

  count: jax.Array
  mu: Params


def scale_by_grouped_muon(
  beta: float = 0.95, eps: float = 1e-8, places: Places | None = None
) -> optax.GradientTransformation:
  """Muon for a tree of matrices, with Nesterov momentum and AdamW-sized steps.

  The arithmetic of `optax.contrib.muon(consistent_rms=0.2)`, with matrices of one shape orthogonalised as a stack:
  blocks repeat the same few shapes, and one batched product compiles and runs faster than dozens of small ones.

  With `places`, the devices that share the matrices of a stack also share the work, each with whole matrices of its
  own: one exchange per axis, there and back. Left to itself the partitioner cuts within matrices, over all axes of the
  mesh, and sends the products between devices in each of five iterations, from slice to slice as well.
  """

  def init(params: Params) -> MuonState:
    return MuonState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

  def update(grads: Params, state: MuonState, params: Params = None) -> tuple[Params, MuonState]:
    del params
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(grads, state.mu, beta, 1)
    ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
    now = optax.tree.bias_correction(grads, beta, count)
    steps = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
    leaves, structure = jax.tree.flatten(steps)
    where = [None] * len(leaves) if places is None else jax.tree.leaves(places(steps))
    return structure.unflatten(_orthogonalize_by_shape(leaves, where, eps)), MuonState(count, mu)

  return optax.GradientTransformation(init, update)


def _orthogonalize_by_shape(
  matrices: list[jax.Array], places: list[NamedSharding | None], eps: float
) -> list[jax.Array]:
  groups: dict[tuple[Any, ...], list[int]] = {}
  for i, (matrix, place) in enumerate(zip(matrices, places, strict=True)):
    groups.setdefault((matrix.shape, place), []).append(i)
  out = list(matrices)
  for (shape, place), members in groups.items():
    stack = jnp.stack([matrices[i] for i in members])
    stack = placement.over_matrices(lambda stack: _orthogonalize(stack, eps), stack, place)
    for i, matrix in zip(members, stack * (_ADAM_LIKE_RMS * max(shape) ** 0.5), strict=True):
      out[i] = matrix
  return out


def _orthogonalize(x: jax.Array, eps: float) -> jax.Array:
  """Newton-Schulz on a stack [n, rows, columns]: singular values go to about 1, directions stay."""
  tall = x.shape[1] > x.shape[2]
  x = x.swapaxes(1, 2) if tall else x  # the Gram matrix is taken on the shorter side
  x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + eps)
  a, b, c = _NEWTON_SCHULZ
  for _ in range(_NEWTON_SCHULZ_STEPS):
    gram = x @ x.swapaxes(1, 2)
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x.swapaxes(1, 2) if tall else x


def frozen_update(
  tx: optax.GradientTransformation, grads: Params, opt_state: Any, params: Params, frozen: Params
) -> tuple[Params, Any]:
  """One update that leaves frozen parameters and their optimiser state bit-identical (UWCO phase 3, section 3.2).

  Args:
    tx: from `make`.
    grads: like params. Frozen leaves count as zero, so the clipping norm is taken over the trainable ones.
    opt_state: of `tx`. Its arrays that mirror a parameter are frozen with it; step counters go on.
    params: the parameters.
    frozen: a tree like params of Python bools (static: the compiler drops the frozen work) or boolean arrays.

  Returns:
    The new parameters and the new optimiser state.
  """
  grads = jax.tree.map(lambda g, f: _select(f, jnp.zeros_like(g), g), grads, frozen)
  updates, new_state = tx.update(grads, opt_state, params)
  new_params = jax.tree.map(
    lambda old, new, f: _select(f, old, new), params, optax.apply_updates(params, updates), frozen
  )
  by_path = {_keys(path): f for path, f in jax.tree_util.tree_flatten_with_path(frozen)[0]}

  def keep(path: tuple[Any, ...], old: jax.Array, new: jax.Array) -> jax.Array:
    keys = _keys(path)
    # The optimiser nests whole parameter trees in its state: the longest matching tail of the path is the parameter.
    owner = next((by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path), False)
    return _select(owner, old, new)

  return new_params, jax.tree_util.tree_map_with_path(keep, opt_state, new_state)


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _select(frozen: Any, old: jax.Array, new: jax.Array) -> jax.Array:
  if isinstance(frozen, bool):
    return old if frozen else new
  return jnp.where(frozen, old, new)


def ema_update(ema: Params, params: Params, step: jax.typing.ArrayLike, decay: float) -> Params:
  """Exponential moving average of the parameters, quicker while it is young.

  Args:
    ema: the average so far.
    params: the parameters after update number `step`, counted from 0.
    step: see params.
    decay: the final decay; the one used is min(decay, (1 + step) / (10 + step)).
  """
  step = jnp.asarray(step, jnp.float32)
  d = jnp.minimum(decay, (1 + step) / (10 + step))
  # In this form an average of what stays the same stays the same, bit for bit.
  return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, params)
