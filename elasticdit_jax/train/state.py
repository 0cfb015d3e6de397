"""What a run carries from step to step, and nothing else: everything needed to go on bit-exactly is in here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A pytree.

  Attributes:
    step: int32 scalar, completed updates; also the position in the data.
    params: the weights that are trained.
    opt_state: of the optimiser.
    ema: exponential moving average of params, the weights that are evaluated and exported.
    key: the run's PRNG key; every step folds its number into it.
    teacher: weights that self-distillation learns from, fixed once the full backbone is trained; None without it.
    loss_mean: float32 scalar, running mean of the loss that a spike is told by; 0 before the first update, None where
      nobody looks for spikes.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  key: jax.Array
  teacher: Any = None
  loss_mean: jax.Array | None = None


def create(
  params: Any, tx: optax.GradientTransformation, seed: int, *, teacher: bool = False, spikes: bool = False
) -> TrainState:
  """A state at step 0; the EMA, and with `teacher` the teacher, start at the parameters, in arrays of their own."""
  state = TrainState(jnp.int32(0), params, tx.init(params), copy(params), jax.random.key(seed))
  state = dataclasses.replace(state, loss_mean=jnp.float32(0)) if spikes else state
  return dataclasses.replace(state, teacher=copy(params)) if teacher else state


def copy(tree: Any) -> Any:
  """The same values in arrays of their own: a donated state cannot hold one array twice."""
  return jax.tree.map(jnp.copy, tree)
