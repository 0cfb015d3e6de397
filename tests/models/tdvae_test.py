"""T-DVAE: shapes, any size, the wavelet pyramid against PyWavelets, exact upsampling, parameter counts, messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pywt
from absl.testing import absltest, parameterized

from elasticdit_jax.models import tdvae
from elasticdit_jax.models.tdvae import TDVAE, VAEConfig
from tests.models import cases

SMALL = {
  8: VAEConfig(8, (4, 8, 8), (0, 0, 1), (0, 0, 1), flow=4),
  16: VAEConfig(16, (4, 8, 8, 8), (0, 0, 0, 1), (0, 1, 0, 1), flow=4),
}


def _image(height, width, batch=2):
  rng = np.random.default_rng(height * 100 + width)
  return rng.uniform(-1, 1, size=(batch, height, width, 3)).astype(np.float32)


def _call(cfg, params, value, method, *args):
  run = jax.jit(lambda p, x: TDVAE(cfg).apply({"params": p}, x, *args, method=method))
  return np.asarray(run(params, value))


def _params(cfg):
  return cases.random_tree(tdvae.init_shapes(cfg))


def _linear(factor):
  """A config whose latents hold all deepest bands, and parameters that only copy them: no network at all."""
  levels = {8: 3, 16: 4}[factor]
  cfg = VAEConfig(factor, (4,) * levels, (0,) * levels, (0,) * levels, flow=4, latent_channels=12 * 3 ** (levels - 1))
  params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), tdvae.init_shapes(cfg))
  for side in ("encoder", "decoder"):
    params[side]["shortcut"]["kernel"] = np.eye(cfg.latent_channels, dtype=np.float32)[None, None]
  return cfg, params


def _pyramid(x, levels):
  """(LL, cH, cV of the level before) transformed again, levels times: all bands of the deepest level."""
  bands = None
  for level in range(levels):
    low, details = pywt.dwt2(x if level == 0 else bands[..., : bands.shape[-1] * 3 // 4], "haar", axes=(1, 2))
    bands = np.concatenate([low, *details], axis=-1)
  return bands


class ShapeTest(parameterized.TestCase):
  @parameterized.parameters((8, 32, 48), (16, 37, 50), (16, 1, 1))
  def test_any_size(self, factor, height, width):
    cfg, image = SMALL[factor], _image(height, width)
    params = _params(cfg)
    z = _call(cfg, params, image, "encode")
    rows, columns = -(-height // factor), -(-width // factor)
    self.assertEqual(z.shape, (2, rows, columns, 16))
    padded = np.pad(image, ((0, 0), (0, rows * factor - height), (0, columns * factor - width), (0, 0)), mode="edge")
    np.testing.assert_allclose(_call(cfg, params, padded, "encode"), z, atol=1e-5)
    whole = _call(cfg, params, z, "decode")
    self.assertEqual(whole.shape, (2, rows * factor, columns * factor, 3))
    self.assertTrue(np.isfinite(whole).all())
    np.testing.assert_allclose(_call(cfg, params, z, "decode", (height, width)), whole[:, :height, :width], atol=1e-5)
    self.assertEqual(_call(cfg, params, image, None).shape, image.shape)

  def test_every_parameter_gets_a_gradient(self):
    cfg, image = SMALL[16], _image(32, 32, batch=1)

    def loss(params):
      return jnp.square(TDVAE(cfg).apply({"params": params}, image) - image).mean()

    grads = jax.jit(jax.grad(loss))(_params(cfg))
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
      self.assertTrue(np.isfinite(grad).all() and np.any(grad), jax.tree_util.keystr(path))

  def test_bfloat16_parameters_and_images_stay_bfloat16(self):
    cfg = SMALL[8]
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), _params(cfg))
    shape = jax.eval_shape(
      lambda p, x: TDVAE(cfg).apply({"params": p}, x), half, jnp.zeros((1, 16, 16, 3), jnp.bfloat16)
    )
    self.assertEqual((shape.shape, shape.dtype), ((1, 16, 16, 3), jnp.bfloat16))


class PyramidTest(parameterized.TestCase):
  @parameterized.parameters(8, 16)
  def test_the_encoder_sees_and_the_decoder_inverts_the_pyramid(self, factor):
    cfg, params = _linear(factor)
    image = _image(32, 48)
    z = _call(cfg, params, image, "encode")
    np.testing.assert_allclose(z * 2**cfg.levels, _pyramid(image, cfg.levels), atol=1e-5)
    # Decoding and encoding again changes nothing: what the decoder draws has exactly these bands, and no other.
    drawn = _call(cfg, params, z, "decode")
    np.testing.assert_allclose(_call(cfg, params, drawn, "encode"), z, atol=1e-5)
    bands = _pyramid(drawn, 1)
    np.testing.assert_allclose(bands[..., 9:], np.zeros_like(bands[..., 9:]), atol=1e-5)
    again = _call(cfg, params, _call(cfg, params, drawn, "encode"), "decode")
    np.testing.assert_allclose(again, drawn, atol=1e-5)

  def test_every_level_can_correct_all_of_its_bands(self):
    # Equation 3: what a level predicts is added to the carried bands, and is all there is of the diagonal one.
    cfg, params = _linear(8)
    z = _call(cfg, params, _image(16, 16), "encode")
    plain = _pyramid(_call(cfg, params, z, "decode"), 1)
    bias = np.arange(12, dtype=np.float32)
    params["decoder"]["delta_0"]["bias"] = bias
    np.testing.assert_allclose(_pyramid(_call(cfg, params, z, "decode"), 1), plain + bias, atol=1e-5)

  def test_without_shortcut_the_linear_path_is_gone(self):
    cfg = dataclasses.replace(SMALL[8], shortcut=False)
    shapes = tdvae.init_shapes(cfg)
    self.assertNotIn("shortcut", shapes["encoder"])
    self.assertNotIn("shortcut", shapes["decoder"])
    self.assertEqual(_call(cfg, cases.random_tree(shapes), _image(16, 16), None).shape, (2, 16, 16, 3))


class UpsampleTest(parameterized.TestCase):
  @parameterized.parameters((4, 6), (1, 1), (3, 5))
  def test_equals_nearest_and_a_3x3_convolution(self, height, width):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 5)).astype(np.float32)
    kernel, bias = rng.normal(size=(3, 3, 5, 7)).astype(np.float32), rng.normal(size=7).astype(np.float32)
    big = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    expected = jax.lax.conv_general_dilated(big, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    out = tdvae.Upsample(7).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(out, expected + bias, atol=1e-4)

  def test_costs_less_than_half(self):
    x, kernel = np.zeros((1, 16, 16, 8), np.float32), np.zeros((3, 3, 8, 8), np.float32)
    params = {"kernel": kernel, "bias": np.zeros(8, np.float32)}

    def flops(run):
      return jax.jit(run).lower(x).compile().cost_analysis()["flops"]

    def plain(x):
      big = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
      return jax.lax.conv_general_dilated(big, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    self.assertLess(flops(lambda x: tdvae.Upsample(8).apply({"params": params}, x)) / flops(plain), 0.5)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters((8, 0.65e6, 0.95e6), (16, 1.3e6, 2.0e6))
  def test_parameter_counts_of_the_embedded_pair(self, factor, low, high):
    shapes = tdvae.init_shapes(tdvae.NANO[factor])
    self.assertEqual(set(shapes), {"encoder", "decoder"})
    self.assertBetween(sum(leaf.size for leaf in jax.tree.leaves(shapes)), low, high)

  def test_init_fits_its_shapes_and_starts_linear(self):
    cfg = SMALL[8]
    params = tdvae.init(cfg, jax.random.key(0))
    jax.tree.map(lambda a, b: self.assertEqual((a.shape, a.dtype), (b.shape, b.dtype)), params, tdvae.init_shapes(cfg))
    block = params["encoder"]["stage_2_block_0"]
    np.testing.assert_array_equal(block["conv2"]["kernel"], np.zeros_like(block["conv2"]["kernel"]))

  @parameterized.parameters(
    ({"factor": 4}, "VAEConfig.factor: expected 8 or 16, got 4"),
    ({"factor": 16}, "VAEConfig.widths: f16 has 4 stages, got .4, 8, 8."),
    ({"encoder_blocks": (1, 1)}, "VAEConfig.encoder_blocks: f8 has 3 stages"),
    ({"decoder_blocks": (1, 1, 1, 1)}, "VAEConfig.decoder_blocks: f8 has 3 stages"),
    ({"widths": (4, 0, 8)}, "widths: expected positive numbers of channels, got .4, 0, 8."),
    ({"widths": 4}, "widths: expected one number per stage, got 4"),
    ({"encoder_blocks": (0, -1, 1)}, "encoder_blocks: expected numbers of blocks, 0 or more"),
    ({"decoder_blocks": (0, 1.5, 1)}, "decoder_blocks: expected numbers of blocks, 0 or more"),
    ({"flow": 0}, "flow: expected positive numbers of channels, got 0"),
    ({"latent_channels": "16"}, "latent_channels: expected positive numbers of channels, got '16'"),
    ({"shortcut": 1}, "shortcut: expected true or false, got 1"),
  )
  def test_messages(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(SMALL[8], **change)

  def test_lists_from_json_make_an_equal_config(self):
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(SMALL[8]).items()}
    self.assertEqual(VAEConfig(**fields), SMALL[8])
    self.assertEqual(hash(VAEConfig(**fields)), hash(SMALL[8]))


if __name__ == "__main__":
  absltest.main()
