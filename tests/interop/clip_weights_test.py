"""CLIP directories of others: values against numpy and transformers, and damage that is named."""

import functools
import json
import os
import tempfile
import unittest

import jax
import numpy as np
from absl.testing import absltest, parameterized
from safetensors.flax import save_file as save_flax
from safetensors.numpy import save_file

from elasticdit_jax.interop import clip_weights
from elasticdit_jax.models import clip
from tests.models import clip_oracle

try:
  import torch
  import transformers
except ImportError:
  torch = transformers = None

_IDS = np.int32([[38, 1, 2, 39, 39, 39, 39], [38, 5, 39, 7, 9, 11, 0], [38, 4, 3, 2, 1, 0, 39]])
_PIXELS = np.random.default_rng(5).normal(size=(2, 12, 12, 3)).astype(np.float32)


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


@functools.partial(jax.jit, static_argnames="cfg")
def _embed(params, ids, pixels, *, cfg):
  model = clip.CLIP(cfg)
  texts = model.apply({"params": params}, ids, method="embed_texts")
  return texts, model.apply({"params": params}, pixels, method="embed_images")


class ClipWeightsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.enterContext(tempfile.TemporaryDirectory())
    self.tensors = clip_oracle.tensors()

  def _path(self, name):
    return os.path.join(self.directory, name)

  def _write(self, tensors, config=clip_oracle.CONFIG):
    with open(self._path("config.json"), "w") as f:
      json.dump(config, f)
    if tensors:
      save_file(tensors, self._path("model.safetensors"))

  def _check(self, end=39, ids=_IDS, atol=1e-5):
    cfg, params = clip_weights.load(self.directory)
    texts, images = _embed(params, ids, _PIXELS, cfg=cfg)
    np.testing.assert_allclose(texts, clip_oracle.embed_texts(self.tensors, ids, end), atol=atol)
    np.testing.assert_allclose(images, clip_oracle.embed_images(self.tensors, _PIXELS), atol=atol)

  def test_names_of_transformers(self):
    buffers = {f"{part}_model.embeddings.position_ids": np.arange(9)[None] for part in ("text", "vision")}
    self._write(self.tensors | buffers)
    self._check()

  def test_names_of_open_clip(self):
    self._write(clip_oracle.open_clip_names(self.tensors))
    self._check()

  def test_half_precision_and_several_files(self):
    self.tensors = {name: np.asarray(np.float16(tensor), np.float32) for name, tensor in self.tensors.items()}
    self._write(None)
    index = {}
    for number, names in enumerate((list(self.tensors)[:10], list(self.tensors)[10:])):
      file = f"model-{number}.safetensors"
      save_file({name: np.asarray(self.tensors[name], np.float16) for name in names}, self._path(file))
      index |= dict.fromkeys(names, file)
    with open(self._path("model.safetensors.index.json"), "w") as f:
      json.dump({"weight_map": index}, f)
    self._check()

  def test_bfloat16(self):
    halves = {name: jax.numpy.asarray(tensor, jax.numpy.bfloat16) for name, tensor in self.tensors.items()}
    self.tensors = {name: np.asarray(tensor, np.float32) for name, tensor in halves.items()}
    self._write(None)
    save_flax(halves, self._path("model.safetensors"))
    self._check()

  def test_old_configs(self):
    """An end token of 2 means the largest id; text_config_dict rules over text_config; defaults fill the rest."""
    old = {key: value for key, value in clip_oracle.TEXT.items() if key != "hidden_act"} | {"eos_token_id": 2}
    config = clip_oracle.CONFIG | {"text_config": {"hidden_act": "gelu", "width": 3}, "text_config_dict": old}
    self._write(self.tensors, config)
    self._check(end=None, ids=np.int32([[3, 1, 2, 38, 4, 4, 4], [5, 37, 3, 1, 2, 0, 0]]))
    self._write(None, {"model_type": "clip"})
    cfg = clip_weights.read_config(self.directory)
    self.assertEqual((cfg.text.width, cfg.vision.width, cfg.projection, cfg.end), (512, 768, 512, 49407))

  def test_differences_are_named(self):
    bad = dict(self.tensors)
    del bad["text_projection.weight"]
    bad["extra.weight"] = np.zeros(3, np.float32)
    bad["visual_projection.weight"] = np.zeros((24, 8), np.float32)
    self._write(bad)
    with self.assertRaisesRegex(
      ValueError,
      r"3 of 94 tensors do not fit the model: text_projection.weight is missing; extra.weight is not part of the"
      r" model; visual_projection.weight has shape \(24, 8\) where the model has \(8, 24\)",
    ):
      clip_weights.load(self.directory)

  def test_missing_and_damaged_files(self):
    with self.assertRaisesRegex(ValueError, "CLIP: no .*config.json"):
      clip_weights.load(self.directory)
    self._write(None)
    with open(self._path("pytorch_model.bin"), "w") as f:
      f.write("x")
    with self.assertRaisesRegex(ValueError, "no .safetensors file in .*; pytorch_model.bin is a pickle, convert it"):
      clip_weights.load(self.directory)
    with open(self._path("model.safetensors"), "w") as f:
      f.write("x")
    with self.assertRaisesRegex(ValueError, "truncated or no safetensors file"):
      clip_weights.load(self.directory)

  @parameterized.parameters(
    ({"model_type": "siglip"}, "model_type is 'siglip', expected 'clip'"),
    ({"text_config": {"hidden_act": "swish"}}, "activation: expected one of quick_gelu, gelu, got 'swish'"),
    ({"vision_config": {"patch_size": [16, 16]}}, "patch: expected a positive int"),
  )
  def test_other_models_are_refused(self, config, message):
    self._write(None, config)
    with self.assertRaisesRegex(ValueError, f"config.json does not describe a CLIP model .*{message}"):
      clip_weights.read_config(self.directory)


@unittest.skipUnless(transformers, "needs torch and transformers")
class TransformersTest(parameterized.TestCase):
  @parameterized.parameters(39, 2)
  def test_saved_by_transformers(self, end):
    """The oracle of the other tests, and ours, against the original."""
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(**clip_oracle.TEXT | {"eos_token_id": end})
    config = transformers.CLIPConfig(
      text_config=text.to_dict(), vision_config=transformers.CLIPVisionConfig(**clip_oracle.VISION).to_dict(),
      projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    tensors = clip_oracle.tensors(1)
    model.load_state_dict({name: torch.from_numpy(np.asarray(tensor)) for name, tensor in tensors.items()})
    with tempfile.TemporaryDirectory() as directory:
      model.save_pretrained(directory)
      cfg, params = clip_weights.load(directory)
    pixels = torch.from_numpy(_PIXELS.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
      out = model(input_ids=torch.from_numpy(_IDS).long(), pixel_values=pixels)
    texts, images = _embed(params, _IDS, _PIXELS, cfg=cfg)
    np.testing.assert_allclose(texts, out.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(images, out.image_embeds.numpy(), atol=1e-5)
    oracle = clip_oracle.embed_texts(tensors, _IDS, None if end == 2 else end)
    np.testing.assert_allclose(out.text_embeds.numpy(), oracle, atol=1e-5)
    np.testing.assert_allclose(out.image_embeds.numpy(), clip_oracle.embed_images(tensors, _PIXELS), atol=1e-5)


if __name__ == "__main__":
  absltest.main()
