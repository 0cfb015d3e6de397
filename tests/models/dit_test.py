"""The backbone as a function: start, grids, sparsity, text masks, precision, remat, messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.elastic import Route
from elasticdit_jax.models import dit
from tests.models import cases

CFG = dataclasses.replace(cases.CFG, depth=2)


def _route(*sparsity, vae=8):
  return Route("r", (True,) * len(sparsity), sparsity, vae)


DENSE, SPARSE = _route(0.0, 0.0), _route(0.6, 0.6)


def _run(x, t, text, mask, route=DENSE, params=None, cfg=CFG):
  return np.asarray(cases.forward(cfg)(cases.params(cfg) if params is None else params, x, t, text, mask, route=route))


class StartTest(absltest.TestCase):
  def test_the_first_velocity_is_zero_and_so_is_the_refining_convolution(self):
    params = dit.init(CFG, jax.random.key(0))
    jax.tree.map(lambda a, b: self.assertEqual(a.shape, b.shape), params, dit.init_shapes(CFG))
    for leaf in jax.tree.leaves(params["refine"]):
      np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    self.assertEqual(params["refine"]["kernel"].shape, (3, 3, 16, 16))
    np.testing.assert_array_equal(_run(*cases.inputs(), params=params), np.zeros((2, 8, 8, 16)))

  def test_the_refining_convolution_is_residual_and_works_on_the_raster(self):
    params = dict(cases.params(CFG))
    kernel = np.zeros((3, 3, 16, 16), np.float32)
    params["refine"] = {"kernel": kernel, "bias": np.zeros(16, np.float32)}
    plain = _run(*cases.inputs(), params=params)
    params["refine"] = params["refine"] | {"kernel": kernel.copy()}
    params["refine"]["kernel"][1, 0] = np.eye(16)  # adds the left neighbour
    left = np.pad(plain, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    np.testing.assert_allclose(_run(*cases.inputs(), params=params), plain + left, atol=1e-5)


class SparsityTest(parameterized.TestCase):
  def test_a_route_that_drops_no_whole_block_is_dense(self):
    # 16 tokens are 4 blocks, 15 (3 x 5, padded) are 6: an eighth of either is no whole block.
    for rows, columns in ((8, 8), (6, 10)):
      args = cases.inputs(rows, columns)
      dense = _run(*args)
      self.assertEqual(dense.shape, (2, rows, columns, 16))
      np.testing.assert_array_equal(_run(*args, _route(0.125, 0.125)), dense)
      dropped = _run(*args, SPARSE)
      self.assertTrue(np.isfinite(dropped).all())
      self.assertGreater(np.abs(dropped - dense).max(), 1e-2)

  @parameterized.parameters(("per_head", 1e-2), ("force_self", 1e-2), ("sparse_text", 1e-3))
  def test_options_of_the_selection(self, option, least):
    cfg = dataclasses.replace(CFG, **{option: True})
    out = _run(*cases.inputs(), SPARSE, params=cases.params(CFG), cfg=cfg)
    self.assertGreater(np.abs(out - _run(*cases.inputs(), SPARSE)).max(), least)

  def test_a_sample_does_not_depend_on_its_neighbours(self):
    x, t, text, mask = cases.inputs()
    swap = [1, 0]
    for route in (DENSE, SPARSE):
      out = _run(x, t, text, mask, route)
      np.testing.assert_allclose(_run(x[swap], t[swap], text[swap], mask[swap], route), out[swap], atol=2e-5)


class TextTest(parameterized.TestCase):
  def test_what_stands_in_absent_tokens_does_not_matter(self):
    x, t, text, mask = cases.inputs()
    for garbage in (1e4, np.nan):
      dirty = np.where(mask[..., None], text, np.float32(garbage))
      for route in (DENSE, SPARSE):
        np.testing.assert_array_equal(_run(x, t, dirty, mask, route), _run(x, t, text, mask, route))

  @parameterized.parameters("flatten", "mean")
  def test_absent_tokens_equal_a_shorter_text(self, pool):
    cfg = dataclasses.replace(CFG, text_pool=pool)
    route = _route(0.0, 0.6)
    x, t, text, mask = cases.inputs(cfg=cfg)
    mask = np.broadcast_to(mask[1:], mask.shape)
    expected = _run(x, t, text, mask, route, cfg=cfg)
    np.testing.assert_allclose(_run(x, t, text[:, :3], mask[:, :3], route, cfg=cfg), expected, atol=2e-5)

  def test_words_and_their_order_matter(self):
    x, t, text, mask = cases.inputs()
    out = _run(x, t, text, mask)
    self.assertGreater(np.abs(_run(x, t, text[:, ::-1], mask) - out)[0].max(), 1e-2)
    self.assertGreater(np.abs(_run(x, t, text, mask[::-1]) - out).max(), 1e-2)

  def test_the_null_prompt_is_finite(self):
    x, t, text, mask = cases.inputs()
    null = np.zeros_like(mask)
    for route in (DENSE, SPARSE):
      out = _run(x, t, text, null, route)
      self.assertTrue(np.isfinite(out).all())
      np.testing.assert_array_equal(out, _run(x, t, np.zeros_like(text), null, route))


class PrecisionTest(absltest.TestCase):
  def test_bfloat16_is_close_to_float32_and_the_velocity_is_float32(self):
    # Dense: selection would amplify rounding.
    route = DENSE
    exact = _run(*cases.inputs(), route)
    half = _run(*cases.inputs(), route, cfg=dataclasses.replace(CFG, dtype="bfloat16"))
    self.assertEqual(half.dtype, np.float32)
    error = np.abs(half - exact).max() / np.abs(exact).max()
    self.assertBetween(error, 1e-5, 0.05)

  def test_remat_changes_neither_values_nor_gradients(self):
    results, products = {}, {}
    for remat in ("none", "full", "dots_saveable"):
      cfg = dataclasses.replace(CFG, remat=remat)
      args = cases.inputs(6, 4, cfg)

      def loss(params, cfg=cfg, args=args):
        return jnp.square(dit.ElasticDiT(cfg).apply({"params": params}, *args, route=_route(0.6, 0.0))).mean()

      traced = jax.jit(jax.value_and_grad(loss)).trace(cases.params(cfg))
      products[remat] = str(traced.jaxpr).count("dot_general")
      if remat != "dots_saveable":
        results[remat] = traced.lower().compile()(cases.params(cfg))
    (value, grads), (other, others) = results["none"], results["full"]
    self.assertTrue(all(np.isfinite(g).all() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), others, grads)
    self.assertLess(products["none"], products["full"])
    self.assertLess(products["dots_saveable"], products["full"])


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    # 72 x 136 pixels at f8: 9 x 17 cells.
    ((9, 17), 8, r"resolution 72x136: route 'r' needs multiples of 16 pixels; the nearest is (64|80)x(128|144)$"),
    ((3, 8), 16, r"resolution 48x128: route 'r' needs multiples of 32 pixels; the nearest is (32|64)x128$"),
    ((1, 1), 8, r"resolution 8x8: .*; the nearest is 16x16$"),
  )
  def test_resolution(self, grid, vae, message):
    route = _route(0.0, 0.0, vae=vae)
    with self.assertRaisesRegex(ValueError, message):
      _run(*cases.inputs(*grid), route)

  @parameterized.parameters("bypass", "kept")
  def test_one_value_per_block(self, name):
    for wrong in (np.ones(3, np.int32), np.int32(1)):
      with self.assertRaisesRegex(ValueError, f"{name}: expected one value for each of the 2 blocks, got shape"):
        dit.ElasticDiT(CFG).apply({"params": cases.params(CFG)}, *cases.inputs(), route=DENSE, **{name: wrong})

  def test_shapes(self):
    x, t, text, mask = cases.inputs()
    long = np.zeros((2, 9, 16), np.float32)
    for message, args in (
      (r"x: expected latents \[B, h, w, 16\], got shape \(2, 8, 8, 4\)", (x[..., :4], t, text, mask)),
      (r"x: expected latents", (x[0], t, text, mask)),
      (r"text: expected at most 8 tokens of 16 features, got \(8, 5\)", (x, t, text[..., :5], mask)),
      (r"text: expected at most 8 tokens of 16 features, got \(9, 16\)", (x, t, long, np.zeros((2, 9), bool))),
      (r"Text.mask: expected shape \(2, 8\), got \(2, 7\)", (x, t, text, mask[:, :7])),
      (r"Text.mask: expected bool, got float32", (x, t, text, mask.astype(np.float32))),
    ):
      with self.assertRaisesRegex(ValueError, message):
        _run(*args)

  @parameterized.parameters(
    ({"width": 40}, "width.*multiple of head_dim"),
    ({"width": 0}, "DiTConfig.width: expected a positive int, got 0"),
    ({"head_dim": 0}, "DiTConfig.head_dim: expected a positive int, got 0"),
    ({"head_dim": 2}, "head_dim.*of 4"),
    ({"depth": 1}, "DiTConfig.depth: expected at least 2"),
    ({"depth": 4.0}, "DiTConfig.depth: expected a positive int, got 4.0"),
    ({"patch": 0}, "DiTConfig.patch"),
    ({"block_side": -8}, "DiTConfig.block_side"),
    ({"per_head": 1}, "DiTConfig.per_head: expected a bool, got 1"),
    ({"mlp_ratio": 0.0}, "DiTConfig.mlp_ratio: expected a positive number"),
    ({"activation": "swish"}, "DiTConfig.activation: expected one of gelu, silu, relu2, got 'swish'"),
    ({"text_pool": "last"}, "DiTConfig.text_pool: expected one of mean, flatten"),
    ({"dtype": "float16"}, "DiTConfig.dtype: expected one of float32, bfloat16"),
    ({"remat": "dots"}, "DiTConfig.remat: expected one of none, full, dots_saveable"),
    # A maker of policies, not a policy: as a policy it would silently save everything.
    ({"remat": "save_only_these_names"}, "DiTConfig.remat"),
  )
  def test_config(self, change, message):
    with self.assertRaisesRegex(ValueError, message) as caught:
      dataclasses.replace(CFG, **change)
    self.assertNotIn("\n", str(caught.exception))


if __name__ == "__main__":
  absltest.main()
