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
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  key: jax.Array


def create(params: Any, tx: optax.GradientTransformation, seed: int) -> TrainState:
  """A state at step 0; the EMA starts at the parameters, in arrays of its own."""
  ema = jax.tree.map(jnp.copy, params)
  return TrainState(jnp.int32(0), params, tx.init(params), ema, jax.random.key(seed))
