"""Convolutions: groups against sums written out, fused upsampling and merged branches against the plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import signal

from elasticdit_jax.evals.flops import count_flops
from elasticdit_jax.ops.convolution import conv2d, merge_branches, upsample_conv


def _normal(*shape):
  return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _slow(x, kernel, groups):
  """Stride 1, one pair of channels after the other, in float64."""
  inputs, outputs = kernel.shape[2], kernel.shape[3] // groups
  y = np.zeros((*x.shape[:3], kernel.shape[3]))
  for b in range(x.shape[0]):
    for d in range(kernel.shape[3]):
      for c in range(inputs):
        image = x[b, :, :, d // outputs * inputs + c].astype(np.float64)
        y[b, :, :, d] += signal.correlate2d(image, kernel[:, :, c, d], mode="same")
  return y


class Conv2dTest(parameterized.TestCase):
  @parameterized.product(groups=(1, 2, 4), implementation=("split", "native", None))
  def test_groups(self, groups, implementation):
    x, kernel = _normal(2, 5, 6, 8), _normal(3, 3, 8 // groups, 12)
    got = conv2d(x, kernel, groups=groups, implementation=implementation)
    np.testing.assert_allclose(got, _slow(x, kernel, groups), atol=1e-4)

  @parameterized.parameters((6, 8), (5, 7))
  def test_strides_of_two_see_one_more_row_and_column_at_the_end(self, height, width):
    x, kernel = _normal(1, height, width, 4), _normal(3, 3, 2, 4)
    before = [(0 if n % 2 == 0 else 1, 1) for n in (height, width)]
    dense = _slow(np.pad(x, ((0, 0), *before, (0, 0))), kernel, 2)[:, 1:-1:2, 1:-1:2]
    np.testing.assert_allclose(conv2d(x, kernel, strides=2, groups=2), dense, atol=1e-4)

  def test_both_implementations_have_the_same_gradients(self):
    x, kernel = _normal(1, 4, 4, 4), _normal(3, 3, 2, 6)

    def loss(x, kernel, implementation):
      return jnp.sum(jnp.sin(conv2d(x, kernel, groups=2, implementation=implementation)))

    split, native = (jax.grad(loss, (0, 1))(x, kernel, i) for i in ("split", "native"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split, native)

  def test_groups_divide_the_work(self):
    x = _normal(1, 8, 8, 8)
    dense, *grouped = (
      count_flops(lambda x, k: conv2d(x, k, groups=g, implementation=i), x, _normal(3, 3, 8 // g, 8))  # noqa: B023
      for g, i in ((1, "split"), (4, "split"), (4, "native"))
    )
    self.assertEqual(grouped, [dense // 4, dense // 4])

  def test_unknown_implementation(self):
    with self.assertRaisesRegex(ValueError, "implementation: expected None or one of split, native, got 'fast'"):
      conv2d(_normal(1, 4, 4, 4), _normal(3, 3, 2, 4), groups=2, implementation="fast")


class UpsampleConvTest(parameterized.TestCase):
  @parameterized.product(size=((4, 6), (1, 1), (3, 5)), fused=(True, False))
  def test_equals_nearest_and_a_3x3_convolution(self, size, fused):
    x, kernel = _normal(2, *size, 5), _normal(3, 3, 5, 7)
    big = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(upsample_conv(x, kernel, fused=fused), _slow(big, kernel, 1), atol=1e-4)

  def test_gradients_are_those_of_the_plain_form(self):
    x, kernel = _normal(1, 3, 4, 2), _normal(3, 3, 2, 3)
    fused, plain = (
      jax.grad(lambda x, k: jnp.sum(jnp.sin(upsample_conv(x, k, fused=f))), (0, 1))(x, kernel)  # noqa: B023
      for f in (True, False)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), fused, plain)

  def test_fused_takes_four_ninths_of_the_work(self):
    x, kernel = _normal(1, 8, 8, 4), _normal(3, 3, 4, 4)
    fused, plain = (count_flops(lambda x: upsample_conv(x, kernel, fused=f), x) for f in (True, False))  # noqa: B023
    self.assertEqual(9 * fused, 4 * plain)


class MergeBranchesTest(parameterized.TestCase):
  @parameterized.parameters((1, 6, 6), (2, 6, 6), (3, 6, 6), (2, 6, 4))
  def test_one_kernel_equals_the_branches_side_by_side(self, groups, inputs, outputs):
    c, e, d = inputs // groups, 5, outputs // groups
    branches = {
      "kernel": _normal(3, 3, c, outputs),
      "point": _normal(1, 1, c, outputs),
      "expand": _normal(groups, c, e),
      "project": _normal(3, 3, groups, e, d),
    }
    x = _normal(2, 5, 4, inputs)
    expected = _slow(x, branches["kernel"], groups) + _slow(x, branches["point"], groups)
    if inputs == outputs:
      branches["identity"] = _normal(outputs)
      expected += branches["identity"] * x
    for g in range(groups):
      wide = _slow(x[..., g * c : (g + 1) * c], branches["expand"][g][None, None], 1)
      expected[..., g * d : (g + 1) * d] += _slow(wide, branches["project"][:, :, g], 1)
    np.testing.assert_allclose(_slow(x, merge_branches(branches), groups), expected, atol=1e-4)


if __name__ == "__main__":
  absltest.main()
