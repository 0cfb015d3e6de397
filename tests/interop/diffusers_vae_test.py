"""Files of diffusers: parity with its AutoencoderKL in both directions, older names, and what is refused.

Parity needs the extra `torch` (torch and diffusers); everything else runs without.
"""

import functools
import json
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy

from elasticdit_jax.interop import convert_vae, diffusers_vae, kl_names, model_dir
from elasticdit_jax.models import autoencoder_kl
from elasticdit_jax.models.autoencoder_kl import AutoencoderKL, KLConfig
from elasticdit_jax.models.codec import Codec
from tests.models.cases import random_tree

FLUX = KLConfig((4, 8, 8, 12), 1, latent_channels=16, norm_num_groups=4)
SD = KLConfig(
  (4, 4, 8, 8),
  1,
  latent_channels=4,
  norm_num_groups=2,
  use_quant_conv=True,
  use_post_quant_conv=True,
  scaling_factor=0.18215,
  shift_factor=0.0,
)


@functools.cache
def _codec(cfg=FLUX):
  shift = jnp.full((cfg.latent_channels,), cfg.shift_factor, jnp.float32)
  return Codec(cfg, random_tree(autoencoder_kl.init_shapes(cfg)), shift, jnp.float32(cfg.scaling_factor))


def _run(cfg, params, value, method):
  return np.asarray(jax.jit(lambda p, x: AutoencoderKL(cfg).apply({"params": p}, x, method=method))(params, value))


class FolderCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.path = os.path.join(self.folder, "vae")

  def tensors(self):
    return safetensors_numpy.load_file(f"{self.path}/{diffusers_vae.FILE}")

  def write(self, tensors):
    safetensors_numpy.save_file(tensors, f"{self.path}/{diffusers_vae.FILE}")


class ParityTest(FolderCase):
  def setUp(self):
    super().setUp()
    try:
      import diffusers
      import torch
    except ImportError:
      self.skipTest("torch and diffusers are not installed")
    self.torch, self.theirs = torch, diffusers.AutoencoderKL

  def compare(self, theirs, codec):
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    z = rng.normal(size=(2, 3, 4, codec.cfg.latent_channels)).astype(np.float32)
    with self.torch.no_grad():
      nchw = (self.torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (image, z))
      latents, picture = theirs.encode(next(nchw)).latent_dist.mode(), theirs.decode(next(nchw)).sample
    pairs = ((image, "encode", latents), (z, "decode", picture))
    for value, method, expected in pairs:
      expected = expected.numpy().transpose(0, 2, 3, 1)
      got = _run(codec.cfg, codec.params, value, method)
      self.assertGreater(np.abs(expected).max(), 0.05)
      self.assertLess(np.abs(got - expected).max(), 1e-5, method)

  @parameterized.named_parameters(("flux", FLUX), ("sd", SD))
  def test_theirs_here(self, cfg):
    self.torch.manual_seed(0)
    fields = diffusers_vae.to_json(cfg)
    theirs = self.theirs(**{k: v for k, v in fields.items() if k != "_class_name"}).eval()
    theirs.save_pretrained(self.path)
    codec = diffusers_vae.load(self.path)
    self.assertEqual(codec.cfg, cfg)
    self.compare(theirs, codec)

  @parameterized.named_parameters(("flux", FLUX), ("sd", SD))
  def test_ours_there(self, cfg):
    diffusers_vae.save(self.path, _codec(cfg))
    theirs, report = self.theirs.from_pretrained(self.path, output_loading_info=True)
    self.assertEqual([*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]], [])
    self.assertEqual(
      (theirs.config.scaling_factor, theirs.config.latent_channels), (cfg.scaling_factor, cfg.latent_channels)
    )
    self.compare(theirs.eval(), _codec(cfg))


class RoundTripTest(FolderCase):
  @parameterized.named_parameters(("flux", FLUX), ("sd", SD))
  def test_folder(self, cfg):
    codec = _codec(cfg)
    for _ in range(2):
      diffusers_vae.save(self.path, codec)  # the second time it replaces the first
      loaded = diffusers_vae.load(self.path)
      self.assertEqual(loaded.cfg, cfg)
      jax.tree.map(np.testing.assert_array_equal, loaded, codec)
    self.assertEqual(os.listdir(self.folder), ["vae"])
    # A folder of a whole pipeline keeps the autoencoder in vae/.
    self.assertEqual(diffusers_vae.load(self.folder).cfg, cfg)

  def test_names_and_layouts_are_those_of_diffusers(self):
    diffusers_vae.save(self.path, _codec(SD))
    shapes = {name: array.shape for name, array in self.tensors().items()}
    self.assertEqual(shapes["encoder.conv_in.weight"], (4, 3, 3, 3))
    self.assertEqual(shapes["encoder.down_blocks.2.resnets.0.conv1.weight"], (8, 4, 3, 3))
    self.assertEqual(shapes["encoder.down_blocks.0.downsamplers.0.conv.bias"], (4,))
    self.assertEqual(shapes["decoder.up_blocks.1.upsamplers.0.conv.weight"], (8, 8, 3, 3))
    self.assertEqual(shapes["decoder.mid_block.attentions.0.to_out.0.weight"], (8, 8))
    self.assertEqual(shapes["post_quant_conv.weight"], (4, 4, 1, 1))
    described = json.loads(pathlib.Path(self.path, "config.json").read_text())
    self.assertEqual((described["_class_name"], described["block_out_channels"]), ("AutoencoderKL", [4, 4, 8, 8]))

  @parameterized.parameters("float16", "bfloat16")
  def test_half_precision_is_read(self, dtype):
    codec = _codec()
    diffusers_vae.save(self.path, codec)
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    self.write({name: array.astype(kind) for name, array in self.tensors().items()})
    loaded = diffusers_vae.load(self.path)
    kernel = loaded.params["encoder"]["conv_in"]["kernel"]
    self.assertEqual(kernel.dtype, np.float32)
    np.testing.assert_array_equal(kernel, codec.params["encoder"]["conv_in"]["kernel"].astype(kind).astype(np.float32))

  def test_a_codec_of_switch_1(self):
    codec, out = _codec(), os.path.join(self.folder, "codecs")
    diffusers_vae.save(self.path, codec)
    self.assertEqual(list(model_dir.load_codecs(self.path)), [8])
    files = convert_vae.convert(self.path, out)
    self.assertEqual([os.path.basename(name) for name in files], ["vae_f8.safetensors"])
    loaded = model_dir.load_codecs(out)[8]
    self.assertEqual(loaded.cfg, FLUX)
    jax.tree.map(np.testing.assert_array_equal, loaded, codec)
    image = np.random.default_rng(0).integers(0, 255, (1, 16, 24, 3), np.uint8)
    z = jax.jit(Codec.encode)(loaded, image)
    raw = _run(FLUX, codec.params, image / np.float32(127.5) - 1, "encode")
    np.testing.assert_allclose(z, (raw - FLUX.shift_factor) * FLUX.scaling_factor, atol=1e-5)
    self.assertEqual(jax.jit(Codec.decode)(loaded, z).shape, (1, 16, 24, 3))
    again = os.path.join(self.folder, "again")
    convert_vae.convert(out, again, to="diffusers")
    jax.tree.map(np.testing.assert_array_equal, diffusers_vae.load(again), codec)


class OlderNamesTest(FolderCase):
  def ldm(self, cfg):
    """The file of `save`, renamed by hand to what LDM calls its tensors."""
    diffusers_vae.save(self.path, _codec(cfg))
    renamed, last = {}, len(cfg.block_out_channels) - 1
    for name, array in self.tensors().items():
      side, _, rest = name.partition(".")
      for i in range(last + 1):
        rest = rest.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
        rest = rest.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
        rest = rest.replace(f"up_blocks.{i}.resnets", f"up.{last - i}.block")
        rest = rest.replace(f"up_blocks.{i}.upsamplers.0", f"up.{last - i}.upsample")
      for new, old in (
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
      ):
        rest = rest.replace(new, old)
      renamed[f"{side}.{rest}"] = array[..., None, None] if "attn_1" in rest and array.ndim == 2 else array
    return renamed

  @parameterized.parameters("", "first_stage_model.")
  def test_ldm(self, prefix):
    tensors = {prefix + name: array for name, array in self.ldm(SD).items()}
    if prefix:
      tensors["model.diffusion_model.out.weight"] = np.ones(3, np.float32)
    file = os.path.join(self.folder, "ae.safetensors")
    safetensors_numpy.save_file(tensors, file)
    loaded = diffusers_vae.load(file, SD)
    jax.tree.map(np.testing.assert_array_equal, loaded, _codec(SD))
    jax.tree.map(np.testing.assert_array_equal, diffusers_vae.load(file, f"{self.path}/config.json"), loaded)

  def test_attention_before_its_renaming(self):
    diffusers_vae.save(self.path, _codec())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = self.tensors()
    for new, name in old.items():
      tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in tensors.items()}
    self.write(tensors)
    jax.tree.map(np.testing.assert_array_equal, diffusers_vae.load(self.path), _codec())

  def test_unknown_names_stay(self):
    self.assertEqual(kl_names.canonical("encoder.other.weight", 4), "encoder.other.weight")


class RefusalTest(FolderCase):
  def setUp(self):
    super().setUp()
    diffusers_vae.save(self.path, _codec())

  def fails(self, message, *args):
    with self.assertRaisesRegex(ValueError, message) as caught:
      diffusers_vae.load(*(args or (self.path,)))
    self.assertNotIn("\n", str(caught.exception))

  def test_tensors_that_do_not_fit_are_listed(self):
    tensors = self.tensors()
    del tensors["decoder.conv_in.bias"]
    tensors["decoder.new.bias"] = np.ones(3, np.float32)
    tensors["encoder.conv_in.weight"] = np.ones((4, 4, 3, 3), np.float32)
    self.write(tensors)
    self.fails(
      "nothing was loaded; of .* 1 missing: decoder.conv_in.bias; 1 unexpected: decoder.new.bias; 1 of another shape:"
      r" encoder.conv_in.weight .4, 4, 3, 3. where the model has .4, 3, 3, 3.; check that config.json"
    )

  def test_long_lists_are_cut(self):
    self.write({"a": np.ones(1, np.float32)})
    self.fails("missing: .* and [0-9]+ more; 1 unexpected: a;")

  def test_not_finite(self):
    tensors = self.tensors()
    tensors["encoder.conv_in.bias"][0] = np.nan
    self.write(tensors)
    self.fails("not finite in encoder.conv_in.bias")

  @parameterized.parameters("model.bin", "ae.ckpt", "ae.pth", "AE.PT")
  def test_pickles(self, name):
    file = os.path.join(self.folder, name)
    pathlib.Path(file).write_bytes(b"\x80\x02")
    self.fails(f"{name} is a pickle, .* convert it once: python -c .*safetensors", file)

  def test_a_folder_with_a_pickle_alone(self):
    os.rename(f"{self.path}/{diffusers_vae.FILE}", f"{self.path}/diffusion_pytorch_model.bin")
    self.fails("diffusion_pytorch_model.bin is a pickle")
    os.remove(f"{self.path}/diffusion_pytorch_model.bin")
    self.fails("no .safetensors file in")

  def test_empty_and_missing_files(self):
    pathlib.Path(self.path, diffusers_vae.FILE).write_bytes(b"")
    self.fails("0 bytes. is truncated or no safetensors file")
    self.fails(
      "no file or folder .*absent.safetensors; check the path", os.path.join(self.folder, "absent.safetensors"), FLUX
    )

  def test_a_lone_file_needs_a_shape(self):
    file = os.path.join(self.folder, "ae.safetensors")
    os.rename(f"{self.path}/{diffusers_vae.FILE}", file)
    self.fails("has no config.json beside it; give one of flux, sd3", file)
    self.fails("--shape=fluks is neither a known shape nor a config.json", file, "fluks")
    self.fails("does not fit its configuration", file, "flux")

  @parameterized.parameters(
    ({"_class_name": "AutoencoderTiny"}, "config.json: _class_name: expected AutoencoderKL, got 'AutoencoderTiny'"),
    ({"act_fn": "gelu"}, "act_fn: expected silu, got 'gelu'"),
    ({"latents_mean": [0.1]}, "latents_mean: expected None"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types: expected DownEncoderBlock2D alone"),
    ({"norm_num_groups": 0}, "config.json: KLConfig.norm_num_groups: expected a positive number"),
  )
  def test_other_autoencoders(self, change, message):
    file = pathlib.Path(self.path, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    self.fails(message)

  def test_damaged_config(self):
    file = pathlib.Path(self.path, "config.json")
    for text, message in (
      ('{"_class_name"', "config.json is not valid JSON"),
      ('["_class_name"]', "holds no object"),
      ("{}", "vae is no folder of diffusers: no config.json with a _class_name"),
    ):
      file.write_text(text)
      self.fails(message)

  def test_the_workdir_of_a_run_is_no_folder_of_diffusers(self):
    pathlib.Path(self.folder, "config.json").write_text(json.dumps({"task": "vae"}))
    os.rename(self.path, f"{self.path}-elsewhere")
    self.assertFalse(diffusers_vae.is_folder(self.folder))
    self.assertTrue(diffusers_vae.is_folder(f"{self.path}-elsewhere"))

  def test_defaults_of_diffusers(self):
    cfg = diffusers_vae.from_json({"_class_name": "AutoencoderKL"})
    self.assertEqual((cfg.block_out_channels, cfg.latent_channels, cfg.shift_factor), ((64,), 4, 0.0))
    self.assertTrue(cfg.use_quant_conv and cfg.use_post_quant_conv)

  def test_other_factors_are_no_side_of_switch_1(self):
    small = KLConfig((4, 8), 1, norm_num_groups=2)
    path = os.path.join(self.folder, "small")
    diffusers_vae.save(path, _codec(small))
    with self.assertRaisesRegex(ValueError, "is an f2 VAE; expected one of"):
      model_dir.load_codecs(path)

  def test_save_refuses(self):
    codec = _codec()
    taken = os.path.join(self.folder, "taken")
    os.makedirs(os.path.join(taken, "photos"))
    cases = (
      (taken, codec, "exists and holds something else"),
      (f"{self.folder}/a", Codec(FLUX, codec.params, jnp.arange(16.0), codec.scale), "one shift_factor"),
      (f"{self.folder}/a", Codec(SD, codec.params, jnp.zeros(4), codec.scale), "do not fit the model"),
    )
    for path, wrong, message in cases:
      with self.assertRaisesRegex(ValueError, message):
        diffusers_vae.save(path, wrong)
    self.assertFalse(os.path.exists(f"{self.folder}/a"))
    self.assertEqual(os.listdir(taken), ["photos"])


if __name__ == "__main__":
  absltest.main()
