"""One number for each array that changes with any bit of it: storage flips bits that nobody else notices."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def fingerprints_of(flat: Mapping[str, jax.Array]) -> dict[str, tuple[int, bool]]:
  """Per array: a 32-bit number that changes with any bit, equal on any mesh; and whether all values are finite."""
  results = {}
  for name, x in flat.items():
    results[name] = _fingerprint(x)
    if jax.default_backend() == "cpu" and len(x.sharding.device_set) > 1:
      # Collectives of many programs at once block all threads of a host that stands for several devices.
      jax.block_until_ready(results[name])
  results = jax.device_get(results)
  return {name: (int(value), bool(finite)) for name, (value, finite) in results.items()}


@jax.jit
def _fingerprint(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else jnp.array(True)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  for axis in range(words.ndim):  # positions count too
    words = words + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(0x9E3779B1 + 2 * axis)
  mixed = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)  # one-to-one, so one changed value always shows in the sum
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(mixed, dtype=jnp.uint32), finite
