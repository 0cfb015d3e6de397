"""LPIPS against the same arithmetic in numpy, and in torch where it is installed; random weights."""

import os
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest
from scipy import signal

from elasticdit_jax.interop import lpips_weights
from elasticdit_jax.models import lpips
from tests.models import lpips_case

_SMALL = ((3, 3), (4, 4), (3, 3, 3), (3, 3, 3), (3, 3, 3))


def _numpy_lpips(params, a, b):
  """Straight from the paper, one picture at a time."""

  def features(image):
    h = (image - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    taps = []
    for group, widths in enumerate(_SMALL):
      if group:
        rows, columns = h.shape[0] // 2 * 2, h.shape[1] // 2 * 2
        h = h[:rows, :columns].reshape(rows // 2, 2, columns // 2, 2, -1).max((1, 3))
      for i, width in enumerate(widths):
        layer = jax.tree.map(np.float64, params["vgg"][f"conv_{group}_{i}"])
        out = np.zeros((*h.shape[:2], width))
        for o in range(width):
          out[..., o] = layer["bias"][o] + sum(
            signal.correlate2d(h[..., c], layer["kernel"][:, :, c, o], "same") for c in range(h.shape[-1])
          )
        h = np.maximum(out, 0)
      taps.append(h / np.sqrt((h**2).sum(-1, keepdims=True) + 1e-10))
    return taps

  pairs = zip(features(a), features(b), strict=True)
  return sum((((x - y) ** 2) * params["heads"][f"head_{i}"]).sum(-1).mean() for i, (x, y) in enumerate(pairs))


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


_distance = jax.jit(lpips.distance)


class LpipsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.object(lpips, "GROUPS", _SMALL))
    self.params = lpips_case.random_params()
    rng = np.random.default_rng(1)
    self.a, self.b = rng.uniform(-1, 1, (2, 2, 21, 18, 3)).astype(np.float32)

  def test_equals_numpy(self):
    got = np.asarray(_distance(self.params, self.a, self.b))
    want = [_numpy_lpips(self.params, a, b) for a, b in zip(self.a, self.b, strict=True)]
    np.testing.assert_allclose(got, want, rtol=2e-5)
    self.assertGreater(got.min(), 1e-3)

  def test_equals_torch_from_the_same_file(self):
    try:
      import torch
    except ImportError:
      self.skipTest("torch is not installed")
    path = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "vgg.safetensors")
    with mock.patch.object(lpips_weights, "_OUR_NAMES", lpips_weights._names()):
      lpips_weights.save(path, self.params)
      loaded = lpips_weights.load(path)
    want = lpips_case.torch_lpips(torch, path, _SMALL, self.a, self.b)
    np.testing.assert_allclose(_distance(loaded, self.a, self.b), want, rtol=2e-5)

  def test_zero_for_equal_pictures_and_their_gradient_is_finite(self):
    value, grad = jax.jit(jax.value_and_grad(lambda x: lpips.distance(self.params, x, self.b).sum()))(self.b)
    self.assertEqual(float(value), 0.0)
    self.assertTrue(np.isfinite(grad).all())

  def test_without_heads_channels_count_alike(self):
    uniform = {f"head_{i}": np.full(w[-1], 1 / w[-1], np.float32) for i, w in enumerate(_SMALL)}
    want = _distance({"vgg": self.params["vgg"], "heads": uniform}, self.a, self.b)
    np.testing.assert_allclose(_distance({"vgg": self.params["vgg"]}, self.a, self.b), want, rtol=1e-6)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, "at least 16 pixels a side"):
      lpips.distance(self.params, self.a[:, :15], self.b[:, :15])
    with self.assertRaisesRegex(ValueError, "of one shape"):
      lpips.distance(self.params, self.a, self.b[:, :20])


if __name__ == "__main__":
  absltest.main()
