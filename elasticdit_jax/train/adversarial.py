"""The adversarial part of ElasticDiT Eq. 5: hinge losses, and a weight that adapts without a further backward pass.

    real ---------------> D ---+--> hinge loss of D                            (D's own update)
    decoder --> fake -----> D -+--> g = -mean D(fake)
                  |
                  +--> nll = L2 + perceptual

    gradient of the decoder = pull(d nll/d fake + lambda * d g/d fake)
    lambda = weight * |pull(d nll/d fake)| / (|pull(d g/d fake)| + 1e-4)  at the decoder's last layer

(Esser et al. 2021, section 3.2.) `pull` is linear, so both norms and the update come from one linearisation of the
decoder. For the norms only the gradient of the last layer is read: the compiler drops everything behind it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

_EPSILON = 1e-4
_LARGEST = 1e4


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Loss of the critic from its scores, any shapes: zero once all real patches reach +1 and all fake ones -1."""
  return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def generator_loss(fake: jax.Array) -> jax.Array:
  """Loss of the decoder from the critic's scores of its pictures."""
  return -jnp.mean(fake)


def adaptive_weight(nll_grads: Any, gan_grads: Any) -> jax.Array:
  """Ratio of two gradient norms of the last layer, within [0, 1e4]; no gradient goes back through it."""
  ratio = optax.tree.norm(nll_grads) / (optax.tree.norm(gan_grads) + _EPSILON)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, _LARGEST))


def decoder_gradient(
  decode: Callable[[Any], jax.Array],
  params: Any,
  nll: Callable[[jax.Array], tuple[jax.Array, Any]],
  gan: Callable[[jax.Array], jax.Array] | None,
  *,
  last_layer: str,
  weight: float,
) -> tuple[Any, jax.Array, dict[str, Any]]:
  """Gradient of nll + weight * lambda * gan in the decoder's parameters, from one backward pass through it.

  Args:
    decode: parameters -> pictures [B, H, W, 3].
    params: of the decoder.
    nll: pictures -> (loss, metrics).
    gan: pictures -> loss; None before the adversarial part starts.
    last_layer: key in params of the layer that makes the picture; it has a `kernel`.
    weight: of the adversarial term beside an nll of equal gradient.

  Returns:
    (gradients like params, pictures, metrics: those of `nll`, and with `gan` "loss/gan" and "gan_weight").
  """
  image, pull = jax.vjp(decode, params)
  cotangent, metrics = jax.grad(nll, has_aux=True)(image)
  if gan is None:
    return pull(cotangent)[0], image, metrics
  loss, gan_cotangent = jax.value_and_grad(gan)(image)
  scale = weight * adaptive_weight(_last(pull(cotangent), last_layer), _last(pull(gan_cotangent), last_layer))
  grads = pull(cotangent + scale * gan_cotangent)[0]
  return grads, image, metrics | {"loss/gan": loss, "gan_weight": scale}


def _last(pulled: tuple[Any], last_layer: str) -> jax.Array:
  """Gradient of the last layer's kernel; its branches in training form add up to the same kernel."""
  return pulled[0][last_layer]["kernel"]
