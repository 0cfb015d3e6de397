"""Converting a VAE: training form to deployed form, the command line. Formats: diffusers_vae_test.py."""

import dataclasses
import os
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from elasticdit_jax.interop import convert_vae, model_dir, package_weights, weights
from elasticdit_jax.models.codec import Codec, init_shapes
from elasticdit_jax.models.tdvae import VAEConfig
from tests.models.cases import random_tree

CFG = VAEConfig(8, (4, 4, 4), (0, 0, 0), (0, 0, 0), flow=4, branches=True)


class ConvertTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.codec = Codec(CFG, random_tree(init_shapes(CFG)), jnp.zeros(16), jnp.float32(2))
    self.run = os.path.join(self.folder, "run")
    model_dir.save_codecs(self.run, {8: self.codec})

  def test_a_file_says_which_form_it_holds_and_is_merged(self):
    self.assertTrue(model_dir.load_codecs(self.run)[8].cfg.branches)
    trained = weights.flatten(weights.load_tree(f"{self.run}/vae_f8.safetensors"))
    self.assertIn("encoder/conv_in/project", trained)
    for name, write in (
      ("converted", lambda out: convert_vae.convert(self.run, out)),
      ("packaged", lambda out: package_weights.package(out, [self.run])),
    ):
      out = os.path.join(self.folder, name)
      write(out)
      loaded = model_dir.load_codecs(out)[8]
      self.assertEqual(loaded.cfg, dataclasses.replace(CFG, branches=False))
      for key, leaf in weights.flatten(self.codec.deploy().params).items():
        np.testing.assert_array_equal(weights.flatten(loaded.params)[key], leaf)

  def test_refusals_write_nothing(self):
    sixteen = VAEConfig(16, (4,) * 4, (0,) * 4, (0,) * 4, flow=4)
    other = Codec(sixteen, random_tree(init_shapes(sixteen)), jnp.zeros(16), jnp.float32(1))
    model_dir.save_codecs(self.run, {16: other})
    out = os.path.join(self.folder, "out")
    with self.assertRaisesRegex(ValueError, "holds 2 VAEs, a folder of diffusers holds one"):
      convert_vae.convert(self.run, out, to="diffusers")
    os.remove(f"{self.run}/vae_f16.safetensors")
    with self.assertRaisesRegex(ValueError, "only an AutoencoderKL can be written"):
      convert_vae.convert(self.run, out, to="diffusers")
    self.assertFalse(os.path.exists(out))

  def test_a_mistake_on_the_command_line_is_one_line(self):
    command = [sys.executable, "-m", "elasticdit_jax.interop.convert_vae", "--vae=/nowhere/ae.ckpt", "--out=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, "^error: vae: /nowhere/ae.ckpt is a pickle, .*\n$")


if __name__ == "__main__":
  absltest.main()
