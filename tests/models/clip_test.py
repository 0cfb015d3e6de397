"""The towers of CLIP against plain numpy."""

import dataclasses
import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.interop import weights
from elasticdit_jax.models import clip

_TOWER = clip.TowerConfig(8, 1, 2, 8)
_CFG = clip.CLIPConfig(_TOWER, _TOWER, vocabulary=9, length=5, size=4, patch=2, projection=4)


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


@functools.partial(jax.jit, static_argnames=("cfg", "method"))
def _apply(params, *inputs, cfg, method):
  return clip.CLIP(cfg).apply({"params": params}, *inputs, method=method)


class CLIPTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.params = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), clip.init_shapes(_CFG))

  def _texts(self, ids, cfg=_CFG):
    return _apply(self.params, np.int32(ids), cfg=cfg, method="embed_texts")

  def test_nothing_behind_the_end_token_matters_and_everything_before_does(self):
    first = self._texts([[7, 1, 8, 8, 8], [7, 1, 8, 2, 3], [7, 2, 8, 8, 8], [7, 8, 1, 8, 8]])
    np.testing.assert_allclose(first[0], first[1], atol=1e-6)
    self.assertGreater(np.abs(first[0] - first[2]).max(), 1e-2)
    self.assertGreater(np.abs(first[0] - first[3]).max(), 1e-2)

  def test_the_end_token_by_its_id(self):
    ids = [[7, 1, 3, 8, 8]]
    by_id = self._texts(ids, dataclasses.replace(_CFG, end=3))
    np.testing.assert_allclose(by_id, self._texts([[7, 1, 3, 2, 8]], dataclasses.replace(_CFG, end=3)), atol=1e-6)
    self.assertGreater(np.abs(by_id - self._texts(ids)).max(), 1e-2)

  def test_logits_are_scaled_cosines_of_unit_vectors(self):
    pixels = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)
    ids = np.int32([[7, 1, 8, 8, 8], [7, 2, 3, 8, 8], [8, 8, 8, 8, 8]])
    images = _apply(self.params, pixels, cfg=_CFG, method="embed_images")
    texts = self._texts(ids)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    logits = _apply(self.params, pixels, ids, cfg=_CFG, method="__call__")
    np.testing.assert_allclose(logits, np.exp(self.params["logit_scale"]) * images @ texts.T, rtol=1e-5)

  def test_big_models_have_the_known_number_of_parameters(self):
    """ViT-L/14 and ViT-H/14 as their authors count them."""
    for text, vision, projection, millions in (
      (clip.TowerConfig(768, 12, 12, 3072), clip.TowerConfig(1024, 24, 16, 4096), 768, 427.6),
      (clip.TowerConfig(1024, 24, 16, 4096), clip.TowerConfig(1280, 32, 16, 5120), 1024, 986.1),
    ):
      shapes = weights.flatten(clip.init_shapes(clip.CLIPConfig(text, vision, patch=14, projection=projection)))
      self.assertAlmostEqual(sum(np.prod(s.shape) for s in shapes.values()) / 1e6, millions, places=1)

  @parameterized.parameters(
    (lambda: clip.TowerConfig(8, 1, 3, 8), "TowerConfig.heads: expected a divisor of the width 8, got 3"),
    (lambda: clip.TowerConfig(8, 0, 2, 8), "TowerConfig.layers: expected a positive int"),
    (lambda: clip.TowerConfig(8, 1, 2, 8, "relu"), "TowerConfig.activation: expected one of quick_gelu, gelu"),
    (lambda: dataclasses.replace(_CFG, patch=3), "CLIPConfig.patch: expected a divisor of the size 4, got 3"),
    (lambda: dataclasses.replace(_CFG, length=0), "CLIPConfig.length: expected a positive int"),
  )
  def test_refuses(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()


if __name__ == "__main__":
  absltest.main()
