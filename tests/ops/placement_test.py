"""Attention under a mesh: every device its own samples and heads, and what is said where that cannot be."""

import os
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from elasticdit_jax.ops import blocks, gating, placement
from elasticdit_jax.ops.sparse_attention import sparse_attention
from tests.ops.sparse_attention_test import make_case


class PlacementTest(parameterized.TestCase):
  def test_the_platform_is_that_of_the_mesh_else_the_default_backend(self):
    self.assertEqual(placement.platform(), jax.default_backend())
    device = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), abstract_device=device)):
      self.assertEqual(placement.platform(), "tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",))):
      self.assertEqual(placement.platform(), jax.default_backend())

  def test_cores_are_those_that_this_process_may_use_shared_by_its_cpu_devices(self):
    devices = jax.local_device_count("cpu")
    for cores, each in ((1, 1), (2 * devices, 2), (4 * devices + devices - 1, 4)):
      with mock.patch.object(os, "sched_getaffinity", return_value=set(range(cores)), create=True):
        self.assertEqual(placement.cores_per_device(), each)

  @parameterized.parameters(
    ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16\n", False),
    ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", True),
    ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16 clzero\n", True),
    ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n\nvendor_id\t: AuthenticAMD\nflags\t\t: avx512_bf16\n", False),
    ("BogoMIPS\t: 2100.00\nFeatures\t: fp asimd i8mm bf16 dgh\n", True),
    (OSError("no such file"), False),
  )
  def test_products_of_bfloat16_are_in_float32_where_a_cpu_is_slow_at_them(self, said, fast):
    found = {"side_effect": said} if isinstance(said, OSError) else {"new_callable": mock.mock_open, "read_data": said}
    with mock.patch("builtins.open", **found):
      placement._multiplies_bfloat16.cache_clear()
      self.addCleanup(placement._multiplies_bfloat16.cache_clear)
      self.assertEqual(placement._multiplies_bfloat16(), fast)
    with mock.patch.object(placement, "platform", return_value="cpu"):
      self.assertEqual(placement.product_dtype(jnp.bfloat16), jnp.bfloat16 if fast else jnp.float32)
      self.assertEqual(placement.product_dtype("bfloat16"), jnp.bfloat16 if fast else jnp.float32)
      self.assertEqual(placement.product_dtype("float32"), jnp.float32)
    with mock.patch.object(placement, "platform", return_value="tpu"):
      self.assertEqual(placement.product_dtype("bfloat16"), jnp.bfloat16)

  def test_one_device_means_alone_or_split_by_hand(self):
    found = {}

    def look(x, name):
      found[name] = placement.on_one_device()
      return x

    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 1), ("data", "model"))):
      found["mesh"] = placement.on_one_device()
      for name, axes in (("all", {"data", "model"}), ("data", {"data"}), ("model", {"model"})):
        split = jax.shard_map(
          partial(look, name=name),
          in_specs=PartitionSpec(),
          out_specs=PartitionSpec(),
          axis_names=axes,
          check_vma=False,
        )
        jax.eval_shape(jax.jit(split), jax.ShapeDtypeStruct((2,), np.float32))
    self.assertEqual(found, {"mesh": False, "all": True, "data": True, "model": False})
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1), ("data", "model"))):
      self.assertTrue(placement.on_one_device())

  @parameterized.parameters("full", "sparse", "skipped")
  def test_split_over_a_mesh_is_the_same(self, text):
    qkv, kept, options, _ = make_case(4, 4, 2, 2, per_head=text == "sparse", text=text)
    expected = sparse_attention(*qkv, kept, **options)
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    with jax.set_mesh(jax.sharding.Mesh(devices, ("data", "model"))):
      split = jax.jit(lambda *qkv: sparse_attention(*qkv, kept, batch_axes="data", head_axes="model", **options))
      np.testing.assert_allclose(split(*qkv), expected, atol=1e-6)

  def test_bad_input_is_named_under_explicit_axes_too(self):
    x, lists = jnp.ones((2, 8, 2, 4)), jnp.zeros((2, 1, 2, 1), jnp.int32)
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)):
      with self.assertRaisesRegex(ValueError, r"x: expected \[B, 0 text \+ 8 image tokens .* got shape \(8,\)"):
        blocks.to_blocks(x[0, :, 0, 0], blocks.BlockGrid(4, 2, 2))
      with self.assertRaisesRegex(ValueError, "q_blocks, k_blocks: expected arrays"):
        gating.select_blocks(x[0], x[0], 1)
      with self.assertRaisesRegex(ValueError, "q: expected .* got shape"):
        sparse_attention(x[0], x, x, lists, text_len=0, block_size=4)
      with self.assertRaisesRegex(ValueError, "block_size: expected a divisor of the 8 image tokens"):
        blocks.block_mask(key_mask=jnp.ones((1, 8), bool), block_size=3)
      np.testing.assert_array_equal(blocks.block_mask(key_mask=jnp.ones((1, 8), bool), block_size=4), [[True, True]])

  def test_axes_that_do_not_fit_are_named(self):
    qkv, kept, options, _ = make_case(4, 4, 2, 2, heads=3)
    with self.assertRaisesRegex(ValueError, r"batch_axes: .*mesh \(none: call jax.set_mesh first\), got 'data'"):
      sparse_attention(*qkv, kept, batch_axes="data", **options)

    def trace(**axes):
      jax.eval_shape(lambda *qkv: sparse_attention(*qkv, kept, **axes, **options), *qkv)

    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 2), ("data", "model"))):
      with self.assertRaisesRegex(ValueError, r"batch_axes: .*\('data', 'model'\), got 'fsdp'"):
        trace(batch_axes=("data", "fsdp"))
      with self.assertRaisesRegex(ValueError, "head_axes: axis 'model' of 2 devices does not divide the 3 it splits"):
        trace(head_axes="model")


if __name__ == "__main__":
  absltest.main()
