"""PatchGAN against its published size and patch width."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.models import discriminator

_SMALL = discriminator.DiscriminatorConfig(8, 2)


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class DiscriminatorTest(parameterized.TestCase):
  def test_size_of_the_published_one(self):
    shapes = discriminator.init_shapes(discriminator.DiscriminatorConfig())
    # Convolutions 4x4: 3-64 (bias), 64-128, 128-256, 256-512 with a norm each, 512-1 (bias).
    expected = 3 * 64 * 16 + 64 + sum(a * b * 16 + 2 * b for a, b in ((64, 128), (128, 256), (256, 512))) + 512 * 16 + 1
    self.assertEqual(sum(x.size for x in jax.tree.leaves(shapes)), expected)
    self.assertEqual(expected, 2_765_633)

  @parameterized.parameters((2, 34), (3, 70))
  def test_a_score_sees_one_patch(self, layers, patch):
    """Of the convolutions alone: the norms look at the whole picture."""
    side, stride = 1, 1
    for _ in range(2):
      side += 3 * stride
    for _ in range(layers):
      side, stride = side * 2 + 2, stride * 2
    self.assertEqual(side, patch)
    cfg = discriminator.DiscriminatorConfig(2, layers)
    size = 3 * patch
    out = jax.eval_shape(
      lambda p, x: discriminator.PatchDiscriminator(cfg).apply({"params": p}, x),
      discriminator.init_shapes(cfg),
      jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
    )
    self.assertEqual(out.shape, (2, size // 2**layers - 2, size // 2**layers - 2, 1))

  def test_pictures_are_judged_one_by_one(self):
    params = discriminator.init(_SMALL, jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (3, 16, 20, 3), minval=-1.0)
    judge = jax.jit(lambda x: discriminator.PatchDiscriminator(_SMALL).apply({"params": params}, x))
    np.testing.assert_allclose(judge(images)[1:2], judge(images[1:2]), atol=1e-6)
    kernels = np.concatenate([np.ravel(params[name]["kernel"]) for name in params if name.startswith("conv")])
    self.assertAlmostEqual(float(kernels.std()), 0.02, delta=0.001)

  def test_too_small(self):
    params = discriminator.init_shapes(_SMALL)
    with self.assertRaisesRegex(ValueError, "11 x 16 pixels is too small for 2 layers, expected at least 12 a side"):
      jax.eval_shape(
        lambda p, x: discriminator.PatchDiscriminator(_SMALL).apply({"params": p}, x), params, jnp.zeros((1, 11, 16, 3))
      )
    with self.assertRaisesRegex(ValueError, "discriminator.layers: expected a positive number, got 0"):
      discriminator.DiscriminatorConfig(8, 0)


if __name__ == "__main__":
  absltest.main()
