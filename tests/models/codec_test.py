"""Codec: normalised latents, statistics, and pixels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.models import tdvae
from elasticdit_jax.models.autoencoder_kl import AutoencoderKL, KLConfig
from elasticdit_jax.models.codec import Codec, as_rgb, fit_statistics, init_shapes, to_uint8
from elasticdit_jax.models.tdvae import TDVAE, VAEConfig
from elasticdit_jax.types import to_float
from tests.models import cases

CFG = VAEConfig(8, (4, 8, 8), (0, 0, 1), (0, 0, 1), flow=4)


def _codec(shift=0.0, scale=1.0):
  return Codec(CFG, cases.random_tree(tdvae.init_shapes(CFG)), jnp.full(16, shift), jnp.float32(scale))


def _image(size=24):
  return np.random.default_rng(size).uniform(-1, 1, (3, size, size, 3)).astype(np.float32)


_encode = jax.jit(Codec.encode)
_decode = jax.jit(Codec.decode)


class CodecTest(absltest.TestCase):
  def test_statistics_normalise(self):
    rng = np.random.default_rng(0)
    raw = (rng.normal(size=(4, 8, 8, 3)) * [1.0, 2.0, 0.1] + [5.0, 0.0, -1.0]).astype(np.float32)
    shift, scale = fit_statistics(raw)
    self.assertEqual((shift.shape, scale.shape), ((3,), ()))
    z = (raw - shift) * scale
    np.testing.assert_allclose(z.mean((0, 1, 2)), np.zeros(3), atol=1e-5)
    self.assertAlmostEqual(np.square(z).mean(), 1.0, places=4)
    # One scale for all: the channels keep their relative energies.
    np.testing.assert_allclose(z.std((0, 1, 2)) / raw.std((0, 1, 2)), np.full(3, scale), rtol=1e-4)

  def test_latents_without_variance_have_no_scale(self):
    constant = np.full((2, 4, 4, 3), 0.1, np.float32) * np.array([1.0, -30.0, 7.7], np.float32)
    for latents in (constant, np.zeros((2, 4, 4, 3), np.float32), np.full((2, 4, 4, 3), np.nan, np.float32)):
      with self.assertRaisesRegex(ValueError, "latents: expected finite values that differ.*train it for longer"):
        fit_statistics(latents)
    _, scale = fit_statistics(constant + 1e-3 * np.random.default_rng(0).normal(size=constant.shape))
    self.assertAlmostEqual(float(scale), 1000.0, delta=100.0)

  def test_pictures_of_any_size_come_back_in_their_size(self):
    image = np.random.default_rng(0).uniform(-1, 1, (1, 13, 22, 3)).astype(np.float32)
    codec = _codec()
    z = _encode(codec, image)
    whole, cropped = _decode(codec, z), jax.jit(Codec.decode, static_argnums=2)(codec, z, (13, 22))
    self.assertEqual((whole.shape, cropped.shape), ((1, 16, 24, 3), image.shape))
    np.testing.assert_allclose(cropped, whole[:, :13, :22], atol=1e-5)

  def test_encode_and_decode_undo_the_normalisation(self):
    image, plain = _image(), _codec()
    raw = _encode(plain, image)
    codec = dataclasses.replace(plain, shift=raw.mean((0, 1, 2)), scale=jnp.float32(4.0))
    self.assertEqual(codec.factor, 8)
    z = _encode(codec, image)
    np.testing.assert_allclose(z, (raw - codec.shift) * 4.0, atol=1e-5)
    np.testing.assert_allclose(_decode(codec, z), _decode(plain, raw), atol=1e-4)
    self.assertEqual(_decode(plain, raw).shape, image.shape)

  def test_decoded_values_are_clipped_and_no_gradient_enters_the_encoder(self):
    codec = _codec()
    z = np.random.default_rng(0).normal(size=(3, 3, 3, 16)).astype(np.float32)
    decode = jax.jit(lambda z: TDVAE(CFG).apply({"params": codec.params}, z, method="decode"))
    direct = decode(100 * z)
    self.assertGreater(np.abs(direct).max(), 2.0)
    np.testing.assert_allclose(_decode(codec, 100 * z), np.clip(direct, -1, 1), atol=1e-4)
    grad = jax.jit(jax.grad(lambda x: jnp.square(codec.encode(x)).sum()))(_image(8))
    np.testing.assert_array_equal(grad, np.zeros_like(grad))

  def test_a_codec_is_an_argument_under_jit_and_its_weights_are_no_part_of_the_program(self):
    traces = []

    @jax.jit
    def encode(codec, image):
      traces.append(codec.cfg)
      return codec.encode(image)

    image = _image(8)
    first, second = encode(_codec(), image), encode(_codec(shift=1.0, scale=2.0), image)
    self.assertLen(traces, 1)
    np.testing.assert_allclose(second, (first - 1.0) * 2.0, atol=1e-4)
    other = dataclasses.replace(CFG, flow=8)
    encode(Codec(other, cases.random_tree(tdvae.init_shapes(other)), jnp.zeros(16), jnp.float32(1.0)), image)
    self.assertEqual(traces, [CFG, other])

  def test_training_form_is_merged_and_nothing_else_changes(self):
    cfg = dataclasses.replace(CFG, branches=True)
    codec = Codec(cfg, cases.random_tree(tdvae.init_shapes(cfg)), jnp.ones(16), jnp.float32(2.0))
    deployed = codec.deploy()
    self.assertEqual(deployed.cfg, CFG)
    image = _image(16)
    np.testing.assert_allclose(_encode(deployed, image), _encode(codec, image), atol=2e-5)
    self.assertIs(deployed.deploy(), deployed)

  def test_an_autoencoder_kl_is_a_codec_too(self):
    cfg = KLConfig((4, 4, 4, 4), 1, latent_channels=3, norm_num_groups=2, use_post_quant_conv=True)
    codec = Codec(cfg, cases.random_tree(init_shapes(cfg)), jnp.full(3, 0.5), jnp.float32(2.0))
    self.assertEqual(codec.factor, 8)
    self.assertIs(codec.deploy(), codec)
    image = _image(16)
    z = _encode(codec, image)
    raw = jax.jit(lambda x: AutoencoderKL(cfg).apply({"params": codec.params}, x, method="encode"))(image)
    np.testing.assert_allclose(z, (raw - 0.5) * 2.0, atol=1e-5)
    self.assertEqual(_decode(codec, z).shape, image.shape)

  def test_pixels_round_trip_and_round_to_the_nearest_level(self):
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(levels)), levels)
    np.testing.assert_array_equal(to_uint8(to_float(levels) + 0.9 / 255 * np.sign(127.5 - levels)), levels)
    self.assertEqual(to_uint8(jnp.array([-1.0, 0.0, 1.0])).dtype, jnp.uint8)


class PicturesTest(parameterized.TestCase):
  def test_what_is_converted(self):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    grey = as_rgb(levels)
    self.assertEqual(grey.shape, (1, 16, 16, 3))
    np.testing.assert_allclose(grey[..., 2], levels[..., 0] / 127.5 - 1, atol=1e-6)
    image = _image(8)
    self.assertIs(as_rgb(image), image)
    self.assertEqual(_encode(_codec(), levels).shape, (1, 2, 2, 16))
    self.assertEqual(_encode(_codec(), np.zeros((1, 1, 1, 3), np.uint8)).shape, (1, 1, 1, 16))

  @parameterized.parameters(
    (np.zeros((1, 8, 8, 4), np.uint8), "got shape .1, 8, 8, 4.; blend the alpha channel"),
    (np.zeros((8, 8, 3), np.uint8), "expected .B, H, W, 3., or 1 channel of grey, got shape .8, 8, 3."),
    (np.zeros((1, 0, 8, 3), np.uint8), "got shape .1, 0, 8, 3."),
    (np.zeros((1, 8, 8, 3), np.int32), "expected uint8, or floats in .-1, 1., got int32"),
    (np.full((1, 8, 8, 3), 255.0, np.float32), "got values from 255 to 255; give uint8, or divide by 127.5"),
    (np.full((1, 8, 8, 3), np.nan, np.float32), "got values from nan to nan"),
  )
  def test_what_is_refused(self, image, message):
    with self.assertRaisesRegex(ValueError, message):
      _codec().encode(image)


if __name__ == "__main__":
  absltest.main()
