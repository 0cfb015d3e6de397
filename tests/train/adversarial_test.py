"""Hinge losses against their definition; the adaptive weight against two whole backward passes, and its price."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from elasticdit_jax.evals.flops import count_flops
from elasticdit_jax.models import discriminator, tdvae
from elasticdit_jax.train import adversarial

_CFG = tdvae.VAEConfig(8, (4, 4, 8), (0, 0, 0), (1, 0, 1), flow=4)
_CRITIC = discriminator.DiscriminatorConfig(4, 1)


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class LossTest(absltest.TestCase):
  def test_hinge(self):
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0])
    self.assertAlmostEqual(float(adversarial.hinge_loss(real, fake)), 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1) / 2), places=6)
    self.assertEqual(float(adversarial.hinge_loss(jnp.array([1.0, 4.0]), jnp.array([-1.0, -2.0]))), 0)
    self.assertEqual(float(adversarial.generator_loss(fake)), 1.5)

  def test_adaptive_weight_is_clipped_and_constant(self):
    big, tiny = jnp.array([3.0, 4.0]), jnp.zeros(2)
    self.assertAlmostEqual(float(adversarial.adaptive_weight(big, big)), 5 / 5.0001, places=5)
    self.assertEqual(float(adversarial.adaptive_weight(big, tiny)), 1e4)  # 5 / 1e-4 and then the limit
    grad = jax.grad(lambda x: adversarial.adaptive_weight(x, big))(big)
    np.testing.assert_array_equal(grad, 0)


class DecoderGradientTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    rng = np.random.default_rng(0)
    fill = lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32)  # noqa: E731
    cls.decoder = jax.tree.map(fill, tdvae.init_shapes(_CFG)["decoder"])
    cls.critic = jax.tree.map(fill, discriminator.init_shapes(_CRITIC))
    cls.z, cls.image = fill(np.zeros((2, 2, 2, 16))), fill(np.zeros((2, 16, 16, 3)))
    compiled = lambda fn: jax.jit(fn).lower(cls.decoder).compile()  # noqa: E731
    cls.nll_gradient = compiled(jax.grad(lambda d: cls._nll(cls._decode(d))[0]))
    cls.gan_gradient = compiled(jax.grad(lambda d: cls._gan(cls._decode(d))))
    cls.both = compiled(lambda d: cls._gradient(d, cls._gan))

  @classmethod
  def _decode(cls, decoder):
    return tdvae.TDVAE(_CFG).apply({"params": {"decoder": decoder}}, cls.z, method="decode")

  @classmethod
  def _nll(cls, image):
    loss = jnp.mean(jnp.square(image - cls.image))
    return loss, {"loss": loss}

  @classmethod
  def _gan(cls, image):
    scores = discriminator.PatchDiscriminator(_CRITIC).apply({"params": cls.critic}, image)
    return adversarial.generator_loss(scores)

  @classmethod
  def _gradient(cls, decoder, gan):
    return adversarial.decoder_gradient(cls._decode, decoder, cls._nll, gan, last_layer="delta_0", weight=0.8)

  def test_equals_two_backward_passes(self):
    grads, _, metrics = self.both(self.decoder)
    nll, gan = self.nll_gradient(self.decoder), self.gan_gradient(self.decoder)
    norms = [float(optax.tree.norm(g["delta_0"]["kernel"])) for g in (nll, gan)]
    scale = 0.8 * norms[0] / (norms[1] + 1e-4)
    self.assertAlmostEqual(float(metrics["gan_weight"]), scale, delta=1e-4 * scale)
    want = jax.tree.map(lambda a, b: a + scale * b, nll, gan)
    # Biases in front of a norm have no gradient: theirs is the rounding of others.
    rounding = 1e-5 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=rounding), grads, want)

  def test_costs_two_kernel_gradients_of_the_last_layer_and_no_decoder_backward(self):
    nll, gan, both = (f.cost_analysis()["flops"] for f in (self.nll_gradient, self.gan_gradient, self.both))
    decoder = 3 * count_flops(self._decode, self.decoder)  # forward and backward
    critic = gan - nll
    last = 2 * 2 * 8 * 8 * 9 * 4 * 12  # 2 * batch * positions * taps * channels in * out
    self.assertLess(both - nll - critic, 3 * last)
    self.assertLess(3 * last, 0.4 * decoder)

  def test_before_its_start_there_is_no_critic(self):
    grads, _, metrics = jax.jit(lambda d: self._gradient(d, None))(self.decoder)
    want = self.nll_gradient(self.decoder)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, want)
    self.assertEqual(set(metrics), {"loss"})


if __name__ == "__main__":
  absltest.main()
