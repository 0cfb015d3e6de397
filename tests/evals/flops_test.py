"""Counted work against formulas written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental import pallas as pl

from elasticdit_jax.evals.flops import count_flops


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def conv(x, w, groups=1, **options):
  options = {"window_strides": (1, 1), "padding": "SAME", **options}
  return jax.lax.conv_general_dilated(
    x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups, **options
  )


class FlopsTest(parameterized.TestCase):
  def test_matrix_product(self):
    self.assertEqual(count_flops(jnp.dot, shape(3, 5), shape(5, 7)), 2 * 3 * 5 * 7)
    self.assertEqual(count_flops(jnp.dot, jnp.ones((3, 5)), jnp.ones((5, 7))), 2 * 3 * 5 * 7)
    self.assertIsInstance(count_flops(jnp.dot, shape(3, 5), shape(5, 7)), int)

  def test_elementwise_work_is_not_counted(self):
    self.assertEqual(count_flops(lambda x: jnp.sum(jnp.exp(x) * 2 + x), shape(8, 8)), 0)

  @parameterized.parameters(1, 2, 8)
  def test_convolution_with_groups(self, groups):
    got = count_flops(lambda x, w: conv(x, w, groups), shape(2, 10, 12, 8), shape(3, 3, 8 // groups, 16))
    self.assertEqual(got, 2 * (2 * 10 * 12 * 16) * (3 * 3 * 8 // groups))

  def test_strided_and_transposed_convolution_cost_the_same(self):
    down = count_flops(
      lambda x, w: conv(x, w, window_strides=(2, 2), padding="VALID"), shape(1, 8, 8, 3), shape(2, 2, 3, 5)
    )
    up = count_flops(lambda x, w: jax.lax.conv_transpose(x, w, (2, 2), "SAME"), shape(1, 4, 4, 5), shape(2, 2, 5, 3))
    self.assertEqual(down, 2 * 4 * 4 * 5 * 2 * 2 * 3)
    self.assertEqual(up, down)

  def test_backward_of_a_convolution_is_two_more_of_the_same(self):
    x, w = shape(2, 8, 8, 4), shape(3, 3, 4, 6)
    forward = count_flops(conv, x, w)
    both = count_flops(jax.grad(lambda x, w: jnp.sum(conv(x, w) ** 2), (0, 1)), x, w)
    self.assertEqual(both, 3 * forward)

  def test_scan_counts_its_length(self):
    def loop(x, w):
      return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=9)[0]

    self.assertEqual(count_flops(loop, shape(3, 4), shape(4, 4)), 9 * 2 * 3 * 4 * 4)

  def test_conditional_counts_the_dearest_branch(self):
    def branch(i, x, w):
      return jax.lax.switch(i, [lambda: x, lambda: x @ w, lambda: x @ w @ w], *())

    i = jax.ShapeDtypeStruct((), jnp.int32)
    self.assertEqual(count_flops(branch, i, shape(3, 4), shape(4, 4)), 2 * 2 * 3 * 4 * 4)

  def test_wrappers_are_seen_through(self):
    x, w = shape(3, 4), shape(4, 4)
    once = 2 * 3 * 4 * 4

    @jax.custom_vjp
    def product(x, w):
      return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    @jax.custom_jvp
    def again(x, w):
      return x @ w

    again.defjvp(lambda primals, tangents: (again(*primals), tangents[0] @ primals[1]))
    for fn in (jax.jit(jnp.dot), jax.checkpoint(jnp.dot), product, again):
      self.assertEqual(count_flops(fn, x, w), once)
    self.assertEqual(count_flops(jax.grad(lambda x, w: jnp.sum(product(x, w)), (0, 1)), x, w), 3 * once)
    # The recomputation of a checkpointed product is real work and is counted.
    remat = jax.grad(lambda x, w: jnp.sum(jnp.sin(jax.checkpoint(lambda x: jnp.sin(x @ w) @ w)(x))))
    plain = jax.grad(lambda x, w: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w)))
    self.assertEqual(count_flops(remat, x, w) - count_flops(plain, x, w), once)

  def test_while_loop(self):
    def rounds(x, w, use):
      return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ w if use else x + 1, x)

    self.assertEqual(count_flops(lambda x, w: rounds(x, w, False), shape(4, 4), shape(4, 4)), 0)
    with self.assertRaisesRegex(ValueError, "while loop of unknown length"):
      count_flops(lambda x, w: rounds(x, w, True), shape(4, 4), shape(4, 4))

  def test_attention_can_be_left_out(self):
    def block(x, w):
      q = (x @ w).reshape(2, 6, 4, 8)
      return jax.nn.dot_product_attention(q, q, q)

    x, w = shape(2, 6, 32), shape(32, 32)
    projection, products = 2 * 2 * 6 * 32 * 32, 2 * (2 * 2 * 4 * 6 * 6 * 8)
    self.assertEqual(count_flops(block, x, w), projection + products)
    self.assertEqual(count_flops(block, x, w, attention=False), projection)

  def test_shard_map_counts_all_devices(self):
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(split, whole), out_specs=split)
    self.assertEqual(count_flops(fn, shape(8, 4), shape(4, 4)), 2 * 8 * 4 * 4)

  def test_kernels_count_what_they_declare(self):
    def kernel(x, y):
      y[...] = x[...] @ x[...]

    def call(x, estimate):
      return pl.pallas_call(kernel, out_shape=x, cost_estimate=estimate)(x)

    x = np.ones((8, 8), np.float32)
    declared = pl.CostEstimate(flops=1024, transcendentals=0, bytes_accessed=0)
    self.assertEqual(count_flops(lambda x: call(x, declared), x), 1024)
    self.assertEqual(count_flops(lambda x: call(x, declared), x, attention=False), 0)
    with self.assertRaisesRegex(ValueError, "no cost_estimate"):
      count_flops(lambda x: call(x, None), x)


if __name__ == "__main__":
  absltest.main()
