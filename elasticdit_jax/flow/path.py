"""The straight path between data and noise, and which times on it are trained.

  t = 0  data x0  ------ x_t = (1 - t) x0 + t eps ------>  noise eps  t = 1        v = d x_t / d t = eps - x0

Rectified flow (Liu et al. 2022) with the logit-normal times and the resolution shift of Stable Diffusion 3
(Esser et al. 2024, arXiv 2403.03206, equations 19 and 23). Everything is a pure function of arrays.
"""

import math

import jax
import jax.numpy as jnp

from elasticdit_jax.types import Array


def _like(t: Array | float, x: Array) -> jax.Array:
  """t [B] with trailing axes of length 1, so that it multiplies x [B, ...]; a scalar stays one."""
  t = jnp.asarray(t)
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def interpolate(x0: Array, eps: Array, t: Array | float) -> jax.Array:
  """x_t = (1 - t) x0 + t eps.

  Args:
    x0: data (latents) [B, ...].
    eps: standard normal noise, shape of x0.
    t: [B] or scalar in [0, 1].
  """
  t = _like(t, x0)
  return (1 - t) * x0 + t * eps


def target(x0: Array, eps: Array) -> Array:
  """The velocity the model regresses, v = eps - x0, the same at every t."""
  return eps - x0


def predict_x0(x_t: Array, v: Array, t: Array | float) -> jax.Array:
  """The data estimate x_t - t v that a velocity implies; x_t and v [B, ...], t [B] or scalar."""
  return x_t - _like(t, x_t) * v


def shift_t(t: Array, shift: float) -> Array:
  """t' = s t / (1 + (s - 1) t): moves times towards noise for s > 1, keeps 0 and 1 where they are."""
  return shift * t / (1 + (shift - 1) * t)


def shift_for(tokens: int, base_tokens: int, base_shift: float = 1.0) -> float:
  """The shift for another resolution: base_shift * sqrt(tokens / base_tokens) (SD3, equation 23).

  The same t leaves more signal in an image of more tokens, because neighbouring tokens average the noise away; the
  square root restores the signal-to-noise ratio of the whole image. Flux uses exp(mu) with mu linear in the token count
  for the same purpose; give its value to `shift_t` directly if its schedule is wanted.

  Args:
    tokens: image tokens at the resolution at hand.
    base_tokens: image tokens at which base_shift is right.
    base_shift: the shift at base_tokens, > 0.

  Raises:
    ValueError: for a count below 1 or a shift that is not positive.
  """
  if tokens < 1 or base_tokens < 1:
    raise ValueError(f"shift_for: expected tokens and base_tokens >= 1, got {tokens} and {base_tokens}")
  if not base_shift > 0:
    raise ValueError(f"shift_for: expected base_shift > 0, got {base_shift}")
  return base_shift * math.sqrt(tokens / base_tokens)


def sample_t(
  key: jax.Array, shape: tuple[int, ...], *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> jax.Array:
  """Training times, float32 of `shape` in (0, 1): sigmoid(mean + std * normal), then `shift_t`.

  Logit-normal (SD3, equation 19) puts most steps in the middle of the path, where the target is hardest to guess. The
  shift turns the median into shift_t(sigmoid(mean)) and is the one the sampler uses for the same resolution.

  Each time has that law; together they are stratified: one random offset to a regular grid of quantiles, so that every
  batch covers all noise levels and the loss of a batch says less about its times (Kingma et al. 2021, arXiv 2107.00630,
  appendix I.1). Neighbouring rows get neighbouring times, so rows must come in random order.
  """
  count = math.prod(shape)
  offset = jax.random.uniform(key, (), jnp.float32)
  quantile = (offset + jnp.arange(count, dtype=jnp.float32) / count) % 1.0
  # The ends of float32's range of quantiles would be infinite.
  quantile = jnp.clip(quantile, 1e-6, 1 - 1e-6).reshape(shape)
  return shift_t(jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(quantile)), shift)


def bin_centers(num_bins: int) -> jax.Array:
  """Midpoints of num_bins equal time bins, float32 [num_bins]: fixed times at which validation loss is measured."""
  if num_bins < 1:
    raise ValueError(f"num_bins: expected at least 1, got {num_bins}")
  return (jnp.arange(num_bins, dtype=jnp.float32) + 0.5) / num_bins


def mean_by_bin(loss: Array, t: Array, num_bins: int) -> tuple[jax.Array, jax.Array]:
  """Average loss in equal time bins: a mean over all t hides at which noise level a model is better.

  Args:
    loss: float [N], one value per example.
    t: float [N] in [0, 1], its time; t = 1 counts in the last bin.
    num_bins: number of bins over [0, 1].

  Returns:
    (mean float32 [num_bins], NaN where a bin is empty; count int32 [num_bins]).
  """
  index = jnp.clip(jnp.floor(t * num_bins).astype(jnp.int32), 0, num_bins - 1)
  count = jnp.zeros(num_bins, jnp.int32).at[index].add(1)
  total = jnp.zeros(num_bins, jnp.float32).at[index].add(loss)
  return total / count, count
