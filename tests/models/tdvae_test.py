"""T-DVAE: shapes, any size, the wavelet pyramid against PyWavelets, presets, the forms of one function, messages."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pywt
from absl.testing import absltest, parameterized

import elasticdit_jax
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import codec, tdvae
from elasticdit_jax.models.tdvae import TDVAE, VAEConfig
from tests.models import cases

SMALL = {
  8: VAEConfig(8, (4, 8, 8), (0, 0, 1), (0, 0, 1), flow=4),
  16: VAEConfig(16, (4, 8, 8, 8), (0, 0, 0, 1), (0, 1, 0, 1), flow=4),
}

GROUPED = VAEConfig(
  8,
  (8, 8, 16),
  (1, 1, 1),
  (1, 1, 1),
  flow=8,
  shortcut=False,
  groups=(1, 2, 4),
  mid_blocks=2,
  mid_groups=4,
  narrow_upsample=False,
  decoder_norm=True,
)

EMBEDDED = {
  8: ((-4.60035, 0.11998, -3.99378, -6.57372), (0.12317, 0.32581, 0.30180)),
  16: ((0.47058, 1.63523, -4.29906, 0.56229), (0.22224, 0.03504, 0.12889)),
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


class FormsTest(absltest.TestCase):
  def test_fused_and_plain_upsampling_draw_the_same_picture(self):
    cfg = SMALL[16]
    z = np.random.default_rng(0).normal(size=(1, 2, 3, 16)).astype(np.float32)
    fused, plain = (
      jax.jit(lambda p, z, f=f: TDVAE(cfg, f).apply({"params": p}, z, method="decode"))(_params(cfg), z)
      for f in (True, False)
    )
    np.testing.assert_allclose(fused, plain, atol=1e-5)

  def test_deployed_it_does_what_it_did_in_training_form(self):
    cfg, image = dataclasses.replace(GROUPED, branches=True), _image(16, 24)
    params = _params(cfg)
    deployed, merged = tdvae.deploy(cfg, params)
    self.assertEqual(deployed, GROUPED)
    self.assertEqual(jax.tree.map(np.shape, merged), jax.tree.map(lambda s: s.shape, tdvae.init_shapes(GROUPED)))
    trained = _call(cfg, params, image, None)
    self.assertGreater(np.abs(trained).max(), 0.1)
    np.testing.assert_allclose(_call(deployed, merged, image, None), trained, atol=2e-5)
    again, same = tdvae.deploy(deployed, merged)
    self.assertEqual(again, deployed)
    jax.tree.map(np.testing.assert_array_equal, same, merged)


class PresetTest(parameterized.TestCase):
  # Their compute: tests/benchmarks/vae_test.py.
  @parameterized.parameters(
    ("tdvae1-f8", 40.84), ("tdvae2-f8", 10.06), ("tdvae1-f16", 53.82), ("tdvae2-f16", 18.50), ("tdvae2-dense-f8", 28.30)
  )
  def test_parameters(self, name, millions):
    shapes = tdvae.init_shapes(tdvae.PRESETS[name])
    self.assertAlmostEqual(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, millions, places=2)

  def test_grouped_stages_middle_and_last_norm(self):
    image = _image(17, 30)
    params = _params(GROUPED)
    self.assertEqual(params["encoder"]["stage_2_block_0"]["conv1"]["kernel"].shape, (3, 3, 4, 16))
    self.assertIn("mid_block_1", params["decoder"])
    self.assertIn("norm_out", params["decoder"])
    self.assertEqual(params["decoder"]["up_2"]["kernel"].shape, (3, 3, 16, 16))
    out = _call(GROUPED, params, image, None)
    self.assertEqual(out.shape, image.shape)
    self.assertTrue(np.isfinite(out).all())

  @parameterized.parameters((1, (12, 12, 12)), (4, (12, 48, 192)))
  def test_bands_carried_on(self, carried, channels):
    cfg = dataclasses.replace(SMALL[8], carried_bands=carried)
    params = _params(cfg)
    self.assertEqual(tuple(params["decoder"][f"delta_{i}"]["bias"].size for i in range(3)), channels)
    self.assertEqual(params["encoder"]["flow_2"]["kernel"].shape[2], channels[2])
    image = _image(8, 16)
    self.assertEqual(_call(cfg, params, image, None).shape, image.shape)

  def test_embedded_weights_answer_as_they_did(self):
    """Numbers from the code these weights were trained with."""
    image = np.sin(np.arange(32 * 48 * 3).reshape(1, 32, 48, 3) ** 1.1 * 0.05).astype(np.float32)
    codecs = model_dir.load_codecs(pathlib.Path(elasticdit_jax.__file__).parent / "weights" / "tiny")
    for factor, (latent, pixel) in EMBEDDED.items():
      z = jax.jit(codec.Codec.encode)(codecs[factor], image)
      y = jax.jit(codec.Codec.decode)(codecs[factor], z)
      np.testing.assert_allclose(z[0, 1, 2, :4], latent, atol=1e-4)
      np.testing.assert_allclose(y[0, 10, 20], pixel, atol=1e-4)


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
    ({"branches": "yes"}, "branches: expected true or false, got 'yes'"),
    ({"groups": (1, 2)}, "VAEConfig.groups: f8 has 3 stages, got .1, 2."),
    ({"groups": (1, 1, 3)}, "VAEConfig.groups: 8 channels do not split into 3 groups; choose"),
    ({"groups": (1, 1, 0)}, "VAEConfig.groups: expected positive numbers of groups"),
    ({"mid_blocks": 1, "mid_groups": 3}, "VAEConfig.mid_groups: 8 channels do not split into 3 groups"),
    ({"mid_blocks": -1}, "mid_blocks: expected numbers of blocks, 0 or more, got -1"),
    ({"norm_groups": 12}, "norm_groups: expected a power of two, got 12"),
    ({"carried_bands": 2}, "carried_bands: expected 1, 3 or 4, got 2"),
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
