"""Preference scores from a random CLIP: formulas, preprocessing, batches, and a directory read from disk."""

import importlib
import json
import os
import tempfile
import unittest

import jax
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image
from safetensors.numpy import save_file
from scipy import ndimage

from elasticdit_jax.evals import preference
from elasticdit_jax.interop import clip_weights
from elasticdit_jax.train import rewards
from tests.interop import clip_tokenizer_test
from tests.models import clip_oracle

try:
  import torch
  import transformers
except ImportError:
  torch = transformers = None

_IMAGES = np.random.default_rng(2).integers(0, 255, (5, 15, 18, 3), np.uint8)
_PROMPTS = ["a", "b", "a", "c", "b"]
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def _tokenize(texts):
  return np.int32([[38, *(ord(c) % 30 for c in text), 39, 0, 0, 0, 0, 0][:7] for text in texts])


def _photograph(height, width):
  smooth = ndimage.gaussian_filter(np.random.default_rng(0).uniform(0, 255, (height, width, 3)), (2, 2, 0))
  return np.clip(3 * smooth - 255, 0, 255).astype(np.uint8)


@unittest.skipUnless(transformers, "needs torch and transformers")
class OriginalPreprocessingTest(parameterized.TestCase):
  @parameterized.parameters((256, 256), (300, 257), (333, 500), (128, 128), (231, 229))
  def test_crop_is_that_of_transformers(self, height, width):
    image = _photograph(height, width)
    processor = importlib.import_module("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil()
    expected = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(
      (preference.crop(image, 224) - np.float32(_MEAN)) / np.float32(_STD), expected, atol=1e-6
    )

  @parameterized.parameters((512, 512), (300, 400), (100, 100))
  def test_pad_resizes_as_torch_does_with_antialiasing(self, height, width):
    image = _photograph(height, width)
    size = [round(n * 224 / max(height, width)) for n in (height, width)]
    tensor = torch.from_numpy(image / 255).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(tensor, size, mode="bicubic", antialias=True, align_corners=False)
    top = (224 - size[0]) // 2
    np.testing.assert_allclose(
      preference.pad(image, 224)[top : top + size[0]], resized[0].permute(1, 2, 0).numpy(), atol=1e-5
    )


class PreferenceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.enterContext(tempfile.TemporaryDirectory())
    self.tensors = clip_oracle.tensors()
    self._write(clip_oracle.CONFIG, self.tensors)

  def _write(self, config, tensors):
    with open(os.path.join(self.directory, "config.json"), "w") as f:
      json.dump(config, f)
    save_file(tensors, os.path.join(self.directory, "model.safetensors"))

  @parameterized.parameters(
    ("clip_score", lambda t: 1.0), ("pick_score", lambda t: np.exp(t["logit_scale"]) / 26), ("hps_v2", lambda t: 1.0)
  )
  def test_formula_and_batches(self, kind, scale):
    score = preference.Preference(kind, *clip_weights.load(self.directory), _tokenize, batch_size=3)
    got = score(_IMAGES, _PROMPTS)[kind]
    self.assertEqual((got.dtype, got.shape), (np.float32, (5,)))
    fit = preference.pad if kind == "hps_v2" else preference.crop
    pixels = (np.stack([fit(image, 12) for image in _IMAGES]) - np.array(_MEAN)) / np.array(_STD)
    texts = clip_oracle.embed_texts(self.tensors, _tokenize(_PROMPTS))
    cosine = (clip_oracle.embed_images(self.tensors, pixels) * texts).sum(1)
    np.testing.assert_allclose(got, scale(self.tensors) * cosine, atol=2e-5)
    self.assertEqual(score(_IMAGES[:0], [])[kind].shape, (0,))

  def test_crop_takes_the_middle_square(self):
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30, 0] = 255
    image[:, :, 1] = 255
    got = preference.crop(image, 10)
    self.assertEqual(got.shape, (10, 10, 3))
    np.testing.assert_allclose(got[:, 1:-1], np.broadcast_to([1, 1, 0], (10, 8, 3)))
    upright = preference.crop(image.transpose(1, 0, 2), 10)
    np.testing.assert_array_equal(upright, got.transpose(1, 0, 2))
    np.testing.assert_array_equal(preference.crop(image[:, :20], 20) * 255, image[:, :20])

  def test_pad_keeps_all_of_the_picture(self):
    image = np.full((20, 40, 3), 255, np.uint8)
    got = preference.pad(image, 10)
    np.testing.assert_allclose(got[2:7], 1, atol=1e-6)
    np.testing.assert_array_equal(got[[0, 1, 7, 8, 9]], 0)
    np.testing.assert_allclose(preference.pad(image.transpose(1, 0, 2), 10), got.transpose(1, 0, 2))

  def test_pad_reduces_with_antialiasing_and_does_not_round(self):
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).uniform(0, 255, (64, 64, 3)), (6, 6, 0))
    image = np.rint(smooth).astype(np.uint8)
    got = preference.pad(image, 16)
    means = (image / 255).reshape(16, 4, 16, 4, 3).mean((1, 3))
    np.testing.assert_allclose(got[1:-1, 1:-1], means[1:-1, 1:-1], atol=0.01)
    self.assertGreater(np.abs(got * 255 - np.rint(got * 255)).max(), 0.3)
    rounded = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(got, rounded, atol=1 / 255)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, "unknown score 'hps'; there are clip_score, pick_score, hps_v2"):
      preference.load("hps", self.directory)
    with self.assertRaisesRegex(ValueError, "pick_score: no directory nowhere"):
      preference.load("pick_score", "nowhere")
    with self.assertRaisesRegex(ValueError, "batch_size: expected at least 1"):
      preference.Preference("hps_v2", None, {}, _tokenize, batch_size=0)

  @unittest.skipUnless(clip_tokenizer_test.tokenizers, "needs tokenizers")
  def test_from_a_directory_as_a_reward(self):
    table = clip_tokenizer_test.vocabulary()
    clip_tokenizer_test.write_vocabulary(self.directory)
    end = table["<|endoftext|>"]
    text = clip_oracle.TEXT | {"vocab_size": len(table), "eos_token_id": end}
    name = "text_model.embeddings.token_embedding.weight"
    tokens = np.random.default_rng(1).normal(0, 0.4, (len(table), 16)).astype(np.float32)
    self.tensors[name] = tokens
    self._write(clip_oracle.CONFIG | {"text_config": text}, self.tensors)
    reward = rewards.from_config({"weights": "pick_score=1,jpeg_size=0", "models": f"pick_score={self.directory}"})
    prompts = ["cat", "two dog", "cat", "dog", "cat"]
    ids = [[table["<|startoftext|>"], *(table[f"{w}</w>"] for w in p.split()), end, end, end, end][:7] for p in prompts]
    pixels = (np.stack([preference.crop(image, 12) for image in _IMAGES]) - np.array(_MEAN)) / np.array(_STD)
    texts = clip_oracle.embed_texts(self.tensors, np.array([row + [end] * (7 - len(row)) for row in ids]), end)
    cosine = (clip_oracle.embed_images(self.tensors, pixels) * texts).sum(1)
    got = reward(_IMAGES, prompts)["pick_score"]
    np.testing.assert_allclose(got, np.exp(self.tensors["logit_scale"]) / 26 * cosine, atol=2e-5)


if __name__ == "__main__":
  absltest.main()
