"""Layers of the autoencoders: the training form of a convolution against its deployed form, norms, padding."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.models import vae_layers
from elasticdit_jax.models.vae_layers import BRANCHES, Conv, ResBlock, Upsample
from tests.models.cases import random_tree


def _image(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _both(make, x):
  """(parameters in training form, the function of either form)."""
  shapes = jax.eval_shape(lambda x: make(True).init(jax.random.key(0), x)["params"], x)
  return random_tree(shapes), lambda params, branches: make(branches).apply({"params": params}, x)


class TrainingFormTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("convolution", lambda b: Conv(8, groups=2, branches=b)),
    ("other_width", lambda b: Conv(6, strides=2, branches=b)),
    ("upsample", lambda b: Upsample(8, branches=b)),
    ("block", lambda b: ResBlock(12, groups=4, branches=b)),
  )
  def test_merged_it_does_the_same(self, make):
    x = _image(1, 6, 6, 8)
    params, call = _both(make, x)
    merged = vae_layers.merge_tree(params)
    deployed = jax.eval_shape(lambda x: make(False).init(jax.random.key(0), x)["params"], x)
    self.assertEqual(jax.tree.map(np.shape, merged), jax.tree.map(lambda s: s.shape, deployed))
    np.testing.assert_allclose(call(merged, False), call(params, True), atol=1e-6)
    again = vae_layers.merge_tree(merged)
    jax.tree.map(np.testing.assert_array_equal, again, merged)

  def test_it_starts_as_the_plain_convolution_and_every_branch_learns(self):
    x, conv = _image(1, 5, 5, 4), Conv(4, groups=2, branches=True)
    params = conv.init(jax.random.key(0), x)["params"]
    self.assertEqual(set(params), {"kernel", "bias", *BRANCHES})
    plain = {name: params[name] for name in ("kernel", "bias")}
    np.testing.assert_allclose(
      conv.apply({"params": params}, x), Conv(4, groups=2).apply({"params": plain}, x), atol=1e-6
    )
    params["project"] = params["project"] + 0.1
    grads = jax.grad(lambda p: (conv.apply({"params": p}, x) ** 2).sum())(params)
    for name, grad in grads.items():
      self.assertTrue(np.any(grad), name)

  def test_kernels_of_size_one_have_no_branches(self):
    params = Conv(4, size=1, branches=True).init(jax.random.key(0), _image(1, 2, 2, 4))["params"]
    self.assertEqual(set(params), {"kernel", "bias"})


class NormTest(parameterized.TestCase):
  @parameterized.parameters((96, 8, 8), (384, 32, 32), (12, 8, 4), (7, 8, 1), (64, 1, 1))
  def test_groups(self, channels, most, groups):
    self.assertEqual(vae_layers.norm(channels, most).num_groups, groups)


class PadTest(parameterized.TestCase):
  @parameterized.parameters((1, 1, 8, 8), (9, 16, 16, 16), (8, 24, 8, 24))
  def test_repeats_the_edge(self, height, width, rows, columns):
    image = _image(2, height, width, 3)
    expected = np.pad(image, ((0, 0), (0, rows - height), (0, columns - width), (0, 0)), mode="edge")
    np.testing.assert_array_equal(vae_layers.pad_to_multiple(image, 8), expected)


if __name__ == "__main__":
  absltest.main()
