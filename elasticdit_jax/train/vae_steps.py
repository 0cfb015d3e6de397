"""The updates of the two stages of T-DVAE training (ElasticDiT section 2.3.2, Figure 6 right).

  stage 1 (Eq. 4)   image --E--> z            loss = mean |z - teacher(image)|^2             trains E
  stage 2 (Eq. 5)   image --E--> z --D--> I'  loss = L2 + L1 + perceptual + PatchGAN         trains D and the critic

An optimiser sees only the part it trains, and an update returns the other part untouched: stage 2 freezes the encoder
bit for bit, whatever momentum or weight decay the optimiser has. Without a teacher, stage 1 trains both parts on their
reconstruction (train.vae says why with noise and an energy penalty).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from elasticdit_jax.models import discriminator, tdvae
from elasticdit_jax.train import adversarial, optim
from elasticdit_jax.train.vae_teacher import Teacher
from elasticdit_jax.types import Batch, to_float

Metrics = dict[str, jax.Array]
_LAST_LAYER = "delta_0"  # of the decoder: the bands whose inverse transform is the picture


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """A pytree with everything needed to go on bit-exactly; its structure is the same in both stages.

  Attributes:
    step: int32 scalar, completed updates of both stages; also the position in the data.
    params: {"encoder", "decoder"}.
    ema: moving average of params; from stage 2 on its encoder is the frozen one.
    critic: parameters of the discriminator.
    opt_state: {"stage1", "stage2", "critic"}, each over what it trains.
    shift, scale: latent statistics of the exported codec: [C] and [].
    key: the run's PRNG key; every step folds its number into it.
  """

  step: jax.Array
  params: Any
  ema: Any
  critic: Any
  opt_state: Any
  shift: jax.Array
  scale: jax.Array
  key: jax.Array


@dataclasses.dataclass(frozen=True)
class Optimizers:
  """One per trained part: stage 1 over `parts` of the VAE, stage 2 over its decoder, and the critic's."""

  stage1: optax.GradientTransformation
  stage2: optax.GradientTransformation
  critic: optax.GradientTransformation
  parts: tuple[str, ...]

  def init(self, params: Any, critic: Any) -> dict[str, Any]:
    """Their states at the start."""
    return {
      "stage1": self.stage1.init({part: params[part] for part in self.parts}),
      "stage2": self.stage2.init(params["decoder"]),
      "critic": self.critic.init(critic),
    }


def make_stage1(
  cfg: tdvae.VAEConfig, txs: Optimizers, stage: Any, ema_decay: float
) -> Callable[..., tuple[State, Metrics]]:
  """The jitted update (state, teacher, batch) -> (state, metrics) of stage 1; the state is donated.

  Args:
    cfg: shape of the VAE.
    txs: the optimisers.
    stage: object with `l1`, `noise` and `energy`, read without a teacher (teacher = None) as in train.vae.
    ema_decay: of the exported weights.
  """
  vae = tdvae.TDVAE(cfg)

  def loss_fn(trained, params, teacher: Teacher | None, image, key):
    z = vae.apply({"params": params | trained}, image, method="encode")
    if teacher is not None:
      error = jnp.mean(jnp.square(z - teacher.latents(image)))
      return error, {"loss": error}
    noisy = z + stage.noise * jax.random.normal(key, z.shape)
    error = vae.apply({"params": params | trained}, noisy, image.shape[1:3], method="decode") - image
    mse, energy = jnp.mean(jnp.square(error)), jnp.mean(jnp.square(z))
    total = mse + stage.l1 * jnp.mean(jnp.abs(error)) + stage.energy * energy
    return total, {"loss": total, "psnr": _psnr(mse), "latent_energy": energy}

  def update(state: State, teacher: Teacher | None, batch: Batch):
    key = jax.random.fold_in(state.key, state.step)
    trained = {part: state.params[part] for part in txs.parts}
    grads, metrics = jax.grad(loss_fn, has_aux=True)(trained, state.params, teacher, to_float(batch.image), key)
    updates, opt_state = txs.stage1.update(grads, state.opt_state["stage1"], trained)
    trained = optax.apply_updates(trained, updates)
    ema = optim.ema_update({part: state.ema[part] for part in trained}, trained, state.step, ema_decay)
    changed = dataclasses.replace(
      state,
      step=state.step + 1,
      params=state.params | trained,
      ema=state.ema | ema,
      opt_state=state.opt_state | {"stage1": opt_state},
    )
    return changed, metrics | {"grad_norm": optax.tree.norm(grads)}

  return jax.jit(update, donate_argnums=0)


def make_stage2(
  cfg: tdvae.VAEConfig,
  critic_cfg: discriminator.DiscriminatorConfig,
  txs: Optimizers,
  stage: Any,
  perceptual: Callable[[Any, jax.Array, jax.Array], jax.Array] | None,
  *,
  start: int,
  ema_decay: float,
) -> Callable[..., tuple[State, Metrics]]:
  """The jitted update (state, perceptual_params, batch, adversarial) -> (state, metrics); the state is donated.

  `adversarial` is static: without it the critic is neither run nor trained.

  Args:
    cfg, critic_cfg: shapes of the VAE and of the critic.
    txs: the optimisers.
    stage: object with the weights `l2`, `l1`, `perceptual` and `gan`, and `noise`: standard deviation of what is added
      to the latents, in units of the normalised ones.
    perceptual: (perceptual_params, a, b) -> distance [B] of pictures in [-1, 1]; None leaves it out.
    start: global step at which the stage begins; the average of the decoder is young then.
    ema_decay: of the exported weights.
  """
  vae, judge = tdvae.TDVAE(cfg), discriminator.PatchDiscriminator(critic_cfg)

  def nll(fake, image, perceptual_params):
    error = fake - image
    mse, l1 = jnp.mean(jnp.square(error)), jnp.mean(jnp.abs(error))
    total, metrics = stage.l2 * mse + stage.l1 * l1, {"psnr": _psnr(mse)}
    if perceptual is not None and stage.perceptual:
      metrics["loss/perceptual"] = jnp.mean(perceptual(perceptual_params, fake, image))
      total = total + stage.perceptual * metrics["loss/perceptual"]
    return total, metrics | {"loss": total}

  def update(state: State, perceptual_params: Any, batch: Batch, adversarial_on: bool):
    key = jax.random.fold_in(state.key, state.step)
    image = to_float(batch.image)
    z = jax.lax.stop_gradient(vae.apply({"params": state.params}, image, method="encode"))
    z = z + stage.noise / state.scale * jax.random.normal(key, z.shape)
    grads, fake, metrics = adversarial.decoder_gradient(
      lambda decoder: vae.apply({"params": {"decoder": decoder}}, z, image.shape[1:3], method="decode"),
      state.params["decoder"],
      lambda x: nll(x, image, perceptual_params),
      (lambda x: adversarial.generator_loss(judge.apply({"params": state.critic}, x))) if adversarial_on else None,
      last_layer=_LAST_LAYER,
      weight=stage.gan,
    )
    critic, critic_state = state.critic, state.opt_state["critic"]
    if adversarial_on:
      critic, critic_state, metrics["loss/critic"] = _train_critic(judge, txs.critic, critic, critic_state, image, fake)
    updates, opt_state = txs.stage2.update(grads, state.opt_state["stage2"], state.params["decoder"])
    decoder = optax.apply_updates(state.params["decoder"], updates)
    ema = optim.ema_update(state.ema["decoder"], decoder, state.step - start, ema_decay)
    changed = dataclasses.replace(
      state,
      step=state.step + 1,
      params=state.params | {"decoder": decoder},
      ema=state.ema | {"decoder": ema},
      critic=critic,
      opt_state=state.opt_state | {"stage2": opt_state, "critic": critic_state},
    )
    return changed, metrics | {"grad_norm": optax.tree.norm(grads)}

  return jax.jit(update, static_argnames="adversarial_on", donate_argnums=0)


def _train_critic(
  judge: discriminator.PatchDiscriminator,
  tx: optax.GradientTransformation,
  params: Any,
  opt_state: Any,
  real: jax.Array,
  fake: jax.Array,
) -> tuple[Any, Any, jax.Array]:
  """One update of the critic on the pictures of this step."""

  def loss_fn(p):
    scores = judge.apply({"params": p}, jnp.concatenate([real, jax.lax.stop_gradient(fake)]))
    return adversarial.hinge_loss(*jnp.split(scores, 2))

  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def _psnr(mse: jax.Array) -> jax.Array:
  return 10 * jnp.log10(4.0 / mse)
