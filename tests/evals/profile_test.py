"""Costs of a route: counted exactly, measured sensibly."""

import functools

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from elasticdit_jax import generate
from elasticdit_jax.elastic import Route
from elasticdit_jax.evals import profile
from elasticdit_jax.evals.flops import count_flops
from elasticdit_jax.models import dit
from tests.evals import tiny_model


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class RealisedSparsityTest(parameterized.TestCase):
  @parameterized.parameters(
    ((0.0, 0.0, 0.0), (True, True, True), (8, 8), 0.0),
    ((0.5, 0.5, 0.5), (True, True, True), (8, 8), 0.5),
    # 16 blocks: floor(16 * .8416) = 13 of them are dropped.
    ((0.8416, 0.8416, 0.8416), (True, True, True), (8, 8), 13 / 16),
    ((0.0, 0.5, 0.5), (True, True, True), (4, 4), 1 / 3),
    ((0.0, 0.5, 0.5), (True, False, True), (4, 4), 0.25),
    # One row of a single block cannot drop it.
    ((0.9, 0.9, 0.9), (True, True, True), (2, 2), 0.0),
    # Ragged: 3 x 3 tokens are 4 blocks.
    ((0.25, 0.25, 0.25), (True, True, True), (3, 3), 0.25),
  )
  def test_by_hand(self, sparsity, keep, grid, expected):
    route = Route("r", keep, sparsity, 8)
    self.assertAlmostEqual(profile.realised_sparsity(route, grid, 2), expected)


class ProfileRoutesTest(absltest.TestCase):
  def test_counts_and_times(self):
    model = tiny_model.make()
    pipeline = generate.Pipeline(model)
    steps = 2
    profiles = profile.profile_routes(pipeline, ("max-f16", "lite-f16"), steps=steps, batch=2, repeats=1)
    self.assertEqual(list(profiles), ["max-f16", "lite-f16"])
    for name, got in profiles.items():
      route = model.routes[name]
      (params, codec, text, _, _, _, _, _), static = pipeline.arguments(["", ""], name, steps=steps)
      x, text = (
        jax.tree.map(lambda a: jnp.concatenate([a, a]), part) for part in (jnp.zeros((2, *static["grid"], 16)), text)
      )
      velocity = functools.partial(dit.ElasticDiT(model.cfg).apply, route=route)
      once = count_flops(velocity, {"params": params}, x, jnp.zeros(4), text.embedding, text.mask)
      decode = count_flops(lambda c, z: c.decode(z), codec, x[:2])
      self.assertEqual(got.flops_per_step, once / 2)
      self.assertEqual(got.flops_per_image, (steps * once + decode) / 2)
      self.assertEqual(got.active_blocks, len(route.active))
      self.assertEqual(got.active_parameters, dit.count_parameters(params, route))
      self.assertEqual((got.tokens, got.height, got.width, got.batch), (4, 64, 64, 2))
      self.assertGreater(got.ms_per_image, 0)
      self.assertGreater(got.compile_s, 0)
    self.assertLess(profiles["lite-f16"].active_parameters, profiles["max-f16"].active_parameters)

  def test_refuses(self):
    pipeline = generate.Pipeline(tiny_model.make((8,)))
    with self.assertRaisesRegex(ValueError, "repeats, batch: expected at least 1"):
      profile.profile_routes(pipeline, repeats=0)
    with self.assertRaisesRegex(ValueError, "needs vae_f16.safetensors"):
      profile.profile_routes(pipeline, ("max-f16",))


if __name__ == "__main__":
  absltest.main()
