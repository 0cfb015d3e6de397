"""AutoencoderKL: shapes, published parameter counts and compute, any size, chunked attention, messages."""

import dataclasses
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.models import autoencoder_kl
from elasticdit_jax.models.autoencoder_kl import KL_PRESETS, AutoencoderKL, KLConfig
from tests.models.cases import random_tree

SMALL = KLConfig((4, 8), 1, latent_channels=3, norm_num_groups=2, use_quant_conv=True, use_post_quant_conv=True)


def _call(cfg, params, value, method=None, *args, fused=True):
  run = jax.jit(lambda p, x: AutoencoderKL(cfg, fused).apply({"params": p}, x, *args, method=method))
  return jax.tree.map(np.asarray, run(params, value))


class AutoencoderKLTest(parameterized.TestCase):
  # Their compute: tests/benchmarks/vae_test.py.
  @parameterized.parameters(("flux", 83.82), ("sd", 83.65), ("ostris-f8-d16", 57.27))
  def test_published_sizes(self, name, millions):
    shapes = autoencoder_kl.init_shapes(KL_PRESETS[name])
    self.assertAlmostEqual(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, millions, places=2)

  def test_any_size_and_the_posterior(self):
    params, image = random_tree(autoencoder_kl.init_shapes(SMALL)), np.ones((2, 9, 6, 3), np.float32)
    mean, log_variance = _call(SMALL, params, image, "moments")
    self.assertEqual((mean.shape, log_variance.shape), ((2, 5, 3, 3), (2, 5, 3, 3)))
    np.testing.assert_allclose(_call(SMALL, params, image, "encode"), mean, atol=1e-6)
    self.assertEqual(_call(SMALL, params, mean, "decode").shape, (2, 10, 6, 3))
    self.assertEqual(_call(SMALL, params, image).shape, image.shape)

  def test_attention_in_chunks_and_plain_upsampling_change_nothing(self):
    params = random_tree(autoencoder_kl.init_shapes(SMALL))
    z = np.random.default_rng(0).normal(size=(2, 3, 5, 3)).astype(np.float32)
    whole = _call(SMALL, params, z, "decode")
    np.testing.assert_allclose(_call(SMALL, params, z, "decode", fused=False), whole, atol=1e-5)
    with mock.patch.object(autoencoder_kl, "_QUERIES", 4):
      np.testing.assert_allclose(_call(SMALL, params, z, "decode"), whole, atol=1e-5)
    silent = dataclasses.replace(SMALL, mid_block_add_attention=False)
    self.assertNotIn("attentions_0", autoencoder_kl.init_shapes(silent)["decoder"]["mid_block"])

  @parameterized.parameters(
    ({"block_out_channels": 8}, "KLConfig.block_out_channels: expected one number per level, got 8"),
    ({"block_out_channels": (4, -8)}, r"block_out_channels.1.: expected a positive number, got -8"),
    ({"norm_num_groups": 3}, "4 channels do not split into norm_num_groups=3"),
    ({"use_quant_conv": 1}, "use_quant_conv: expected true or false, got 1"),
    ({"scaling_factor": 0.0}, "scaling_factor: expected a finite number, positive for the scale, got 0.0"),
    ({"latent_channels": None}, "latent_channels: expected a positive number, got None"),
  )
  def test_messages(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(SMALL, **change)


if __name__ == "__main__":
  absltest.main()
