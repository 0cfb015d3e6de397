"""The validation loss is a fixed function of weights and route."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from elasticdit_jax.data import pipeline
from elasticdit_jax.evals import validation
from elasticdit_jax.flow import path
from elasticdit_jax.models import dit
from elasticdit_jax.types import to_float
from tests.evals import tiny_model


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class ValidationTest(absltest.TestCase):
  def test_loss_by_time_and_bypass(self):
    model = tiny_model.make((16,))
    (batch,) = pipeline.validation_batch(pipeline.ScenesSource(1, 64), model.encoder, 3, 1)
    fixed = validation.make_validation(model.cfg, model.codecs, batch, bins=2)
    full, lite = model.routes["max-f16"], model.routes["lite-f16"]
    got = fixed.by_time(model.params, full)
    self.assertEqual(got.shape, (2,))
    np.testing.assert_array_equal(got, fixed.by_time(model.params, full))
    # The definition, once more and without the loop over bins.
    x0 = jax.jit(model.codecs[16].encode)(to_float(batch.image))
    eps = jax.random.normal(jax.random.fold_in(jax.random.key(0), 16), x0.shape)
    t = jnp.full(3, 0.75)
    v = jax.jit(
      lambda x: dit.ElasticDiT(model.cfg).apply(
        {"params": model.params}, x, t, batch.text.embedding, batch.text.mask, route=full
      )
    )(path.interpolate(x0, eps, t))
    self.assertAlmostEqual(float(jnp.mean((v - (eps - x0)) ** 2)), float(got[1]), places=4)
    # Bypassed blocks give the number of the route without them.
    self.assertAlmostEqual(fixed.loss(model.params, full, [1]), fixed.loss(model.params, lite), places=4)
    self.assertNotAlmostEqual(fixed.loss(model.params, full), fixed.loss(model.params, lite), places=3)
    other = dataclasses.replace(fixed, seed=1)
    self.assertGreater(np.abs(other.by_time(model.params, full) - got).max(), 1e-4)


if __name__ == "__main__":
  absltest.main()
