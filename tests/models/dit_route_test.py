"""A route is static: one trace each, skipped blocks are absent from the program, and nothing of them is read."""

import dataclasses
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax import elastic
from elasticdit_jax.elastic import Route, standard_routes
from elasticdit_jax.models import dit
from tests.models import cases


def _depth(count):
  return dataclasses.replace(cases.CFG, depth=count)


def _route(keep, sparsity=None, vae=8):
  keep = tuple(bool(k) for k in keep)
  return Route("r", keep, sparsity or (0.0,) * len(keep), vae)


class RouteTest(parameterized.TestCase):
  def test_one_trace_per_route_however_often_it_is_called_and_read_back(self):
    cfg, traces = _depth(3), []

    def apply(params, x, t, text, mask, route):
      traces.append(route.name)
      return dit.ElasticDiT(cfg).apply({"params": params}, x, t, text, mask, route=route)

    step = jax.jit(apply, static_argnames="route")
    routes = standard_routes(3, [1])
    path = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "routes.json")
    elastic.save_routes(path, routes)
    for count, name in enumerate(("max-f8", "lite-f8", "max-f16", "lite-f16"), start=1):
      side = 64 // routes[name].vae
      for known in (routes, elastic.load_routes(path), standard_routes(3, [1])):
        step(cases.params(cfg), *cases.inputs(side, side, cfg), route=known[name])
      self.assertLen(traces, count)
    self.assertEqual(traces, list(dict.fromkeys(traces)))
    self.assertEqual(step._cache_size(), 4)

  def test_a_skipped_block_is_not_in_the_program(self):
    flops = {}
    for keep in ((1, 1, 1, 1), (1, 1, 0, 1), (1, 0, 0, 1)):
      program = cases.forward().lower(cases.params(), *cases.inputs(), route=_route(keep)).compile()
      flops[sum(keep)] = program.cost_analysis()["flops"]
      text = program.as_text()
      self.assertEqual([int(f"block_{i:02d}" in text) for i in range(4)], list(keep))
    one = flops[4] - flops[3]
    self.assertAlmostEqual((flops[3] - flops[2]) / one, 1.0, delta=0.01)
    # What no route can skip (embeddings, modulation, output) is a small rest.
    self.assertAlmostEqual(flops[3] / flops[4], 3 / 4, delta=0.04)
    self.assertAlmostEqual(flops[2] / flops[4], 2 / 4, delta=0.08)

  def test_gradients_of_skipped_blocks_are_zero_and_their_values_are_not_read(self):
    cfg, route = _depth(3), _route((1, 0, 1))
    params, args = cases.params(cfg), cases.inputs(4, 4, cfg)
    broken = params | {"block_01": jax.tree.map(lambda a: np.full_like(a, np.nan), params["block_01"])}

    def loss(params):
      return jnp.square(dit.ElasticDiT(cfg).apply({"params": params}, *args, route=route)).mean()

    step = jax.jit(jax.value_and_grad(loss))
    value, grads = step(params)
    other, others = step(broken)
    self.assertTrue(np.isfinite(value))
    self.assertEqual(value, other)
    jax.tree.map(np.testing.assert_array_equal, grads, others)
    unread = set()
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
      keys = [k.key for k in path]
      if not route.owns(keys):
        np.testing.assert_array_equal(grad, np.zeros_like(grad), "/".join(keys))
      elif not np.any(grad):
        unread.add("/".join(keys))
    # The last block gives no text out, so nothing depends on its text queries.
    self.assertEqual(unread, {"block_02/attention/text/q_norm/scale"})

  @parameterized.parameters(((1, 0, 1, 1),), ((1, 0, 0, 1),))
  def test_lite_equals_max_with_the_skipped_blocks_bypassed(self, keep):
    # Mixed sparsity: a block keeps its window on every route, whatever runs before it.
    sparsity = (0.5, 0.0, 0.5, 0.5)
    args = (cases.params(), *cases.inputs())
    full, lite = _route((1, 1, 1, 1), sparsity), _route(keep, sparsity)
    bypass = ~np.array(keep, bool)
    expected = cases.forward()(*args, bypass, route=full)
    np.testing.assert_allclose(cases.forward()(*args, route=lite), expected, atol=2e-5)
    nothing = cases.forward()(*args, np.zeros(4, bool), route=full)
    self.assertGreater(np.abs(nothing - expected).max(), 1e-2)

  def test_kept_counts_in_one_masked_program_equal_the_sparse_route(self):
    args = (cases.params(), *cases.inputs())
    cfg = dataclasses.replace(cases.CFG, remat="full")
    for keep, kept in (((1, 1, 1, 1), (2, 4, 1, 3)), ((1, 0, 1, 1), (1, 4, 2, 4))):
      route = _route(keep, tuple(1 - k / 4 for k in kept))
      base, expected = _route(keep), cases.forward()(*args, route=route)
      for shape in (cases.CFG, cfg):
        got = jax.jit(
          lambda p, *x, kept, shape=shape, base=base: dit.ElasticDiT(shape).apply(
            {"params": p}, *x, route=base, kept=kept
          )
        )(*args, kept=np.int32(kept))
        np.testing.assert_allclose(got, expected, atol=2e-5)

  def test_lite_equals_max_where_the_gates_of_the_skipped_block_are_zero(self):
    params = dict(cases.params())
    params["modulation"] = jax.tree.map(np.zeros_like, params["modulation"])
    offset = np.array(params["block_01"]["modulation"])
    offset[:, [2, 5]] = 0.0
    params["block_01"] = params["block_01"] | {"modulation": offset}
    run = cases.forward()
    full = run(params, *cases.inputs(), route=_route((1, 1, 1, 1)))
    np.testing.assert_allclose(run(params, *cases.inputs(), route=_route((1, 0, 1, 1))), full, atol=1e-5)
    whole = run(cases.params(), *cases.inputs(), route=_route((1, 1, 1, 1)))
    self.assertGreater(np.abs(whole - full).max(), 1e-2)

  def test_the_vae_factor_matters_on_equal_latents(self):
    args = (cases.params(), *cases.inputs())
    f8, f16 = (cases.forward()(*args, route=_route((1, 1, 1, 1), vae=v)) for v in (8, 16))
    self.assertGreater(np.abs(f8 - f16).max(), 1e-2)

  def test_a_route_of_another_depth_is_refused(self):
    with self.assertRaisesRegex(ValueError, "route 'r' is for 3 blocks, this model has 4"):
      cases.forward()(cases.params(), *cases.inputs(), route=_route((1, 1, 1)))


if __name__ == "__main__":
  absltest.main()
