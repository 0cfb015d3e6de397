"""The TPU kernels: numbers by interpretation on CPU, and lowering for TPU without one."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from elasticdit_jax.evals import flops
from elasticdit_jax.ops import pallas_tpu_pieces, pallas_tpu_plan, placement, sparse_attention_pallas_tpu
from elasticdit_jax.ops.sparse_attention import sparse_attention
from tests.ops import sparse_attention_test as contract

LARGE_UNIT = "TPU v6 lite"


class PallasTest(contract.ImplementationTest):
  """The contract, interpreted, in pieces so small that these cases have several of each, the last one uneven."""

  implementation = "pallas_tpu_interpret"

  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.object(sparse_attention_pallas_tpu, "_TILE", 2))
    self.enter_context(mock.patch.object(pallas_tpu_pieces, "TEXT_CHUNK", 5))


class PairsTest(absltest.TestCase):
  def test_two_heads_of_128_channels_side_by_side(self):
    qkv, kept, options, weight = contract.make_case(4, 4, 2, 2, heads=4, batch=1, dim=128)
    with mock.patch.object(placement, "device_kind", return_value=LARGE_UNIT):
      self.assertEqual(sparse_attention_pallas_tpu.plan_of(qkv[0], kept, 5, 4).pack, 2)
      contract.compare(self, (qkv, kept, options, weight), "pallas_tpu_interpret")


class SimulatedTpuTest(absltest.TestCase):
  def test_equals_reference_on_a_simulated_memory(self):
    """InterpretParams copies tiles as the hardware would, fills memory with NaN and refuses indices out of range."""
    qkv, kept, options, weight = contract.make_case(4, 4, 2, 2, heads=3, batch=1)
    expected = contract.compiled(kept, options, weight, "reference")(*qkv)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
      results = contract.compiled(kept, options, weight, "pallas_tpu_interpret")(*qkv)
    for a, b in zip(results, expected, strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5)


def arguments(
  tokens, heads, dim, *, text_len=128, kept=3, lists=1, batch=1, dtype=jnp.bfloat16, place=lambda *axes: None
):
  """Shapes of q, k, v and kept for 64-token blocks."""
  spread = place("data", None, "model", None)
  x = jax.ShapeDtypeStruct((batch, text_len + tokens, heads, dim), dtype, sharding=spread)
  share = place("data", None if lists == 1 else "model", None, None)
  return x, x, x, jax.ShapeDtypeStruct((batch, lists, tokens // 64, kept), jnp.int32, sharding=share)


def lowered(args, platform="tpu", **options):
  """The program of output and gradients for a platform that need not be here."""

  def run(q, k, v, kept):
    def loss(q, k, v):
      out = sparse_attention(q, k, v, kept, **options)
      return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

  return jax.export.export(jax.jit(run), platforms=[platform])(*args).mlir_module()


def on_tpus(*shape, kind="TPU v5 lite"):
  """A context in which programs are for TPUs, none of them attached."""
  device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
  return jax.sharding.use_abstract_mesh(AbstractMesh(shape, ("data", "model"), abstract_device=device))


class LoweringTest(parameterized.TestCase):
  """Mosaic checks tiles and layouts here; sizes of memories only with libtpu, see benchmarks/aot_tpu.py."""

  @parameterized.named_parameters(
    ("head_dim_64", {"heads": 2, "dim": 64}, {}),
    ("head_dim_128", {"heads": 1, "dim": 128}, {}),
    ("odd_heads_own_lists", {"heads": 3, "dim": 64, "lists": 3, "kept": 2}, {}),
    ("float32_no_text_odd_tiles", {"heads": 2, "dim": 64, "text_len": 0, "dtype": jnp.float32, "tokens": 9 * 64}, {}),
    ("masks", {"heads": 2, "dim": 64, "text_len": 77}, {"masked": True}),
  )
  def test_forward_and_backward_lower(self, shape, options):
    args = arguments(**{"tokens": 512, **shape})
    text_len = shape.get("text_len", 128)
    masks = {}
    if options:
      masks["text_mask"] = jnp.ones((1, text_len), bool)
      masks["key_mask"] = jnp.arange(512)[None] < 500
    with on_tpus(1, 1):
      module = lowered(args, text_len=text_len, **masks)
    self.assertEqual(module.count("stablehlo.custom_call @tpu_custom_call"), 2)

  def test_text_without_queries_and_with_lists_lowers(self):
    q, k, v, kept = arguments(512, 2, 64)
    with on_tpus(1, 1):
      skipped = lowered((q.update(shape=(1, 512, 2, 64)), k, v, kept), text_len=128, text_queries=False)
      sparse = lowered((q, k, v, kept), text_len=128, text_kept=np.zeros((1, 1, 1, 3), np.int32))
    for module in (skipped, sparse):
      self.assertEqual(module.count("stablehlo.custom_call @tpu_custom_call"), 2)

  def test_a_large_matrix_unit_takes_two_heads_of_128_channels(self):
    def packs(kind, *shape, **options):
      q, _, _, kept = arguments(*shape, **options)
      with on_tpus(1, 1, kind=kind):
        return sparse_attention_pallas_tpu.plan_of(q, kept, 128, 64).pack

    self.assertEqual(packs(LARGE_UNIT, 4096, 2, 128), 2)
    self.assertEqual(packs("TPU v5 lite", 4096, 2, 128), 1)
    for alone in ((4096, 3, 128), (16384, 2, 128)):  # an odd number; keys that would not fit
      self.assertEqual(packs(LARGE_UNIT, *alone), 1)
    self.assertEqual(packs(LARGE_UNIT, 4096, 2, 128, lists=2), 1)
    self.assertEqual(packs(LARGE_UNIT, 10240, 2, 128), 1)  # would leave no room to load the next heads
    with on_tpus(1, 1, kind=LARGE_UNIT):
      module = lowered(arguments(512, 2, 128), text_len=128)
    self.assertEqual(module.count("stablehlo.custom_call @tpu_custom_call"), 2)

  def test_each_device_has_its_own_samples_and_heads(self):
    with on_tpus(4, 2):
      mesh = jax.sharding.get_abstract_mesh()
      args = arguments(512, 4, 64, batch=8, place=lambda *axes: NamedSharding(mesh, PartitionSpec(*axes)))
      module = lowered(args, text_len=128, batch_axes="data", head_axes="model")
    self.assertEqual(module.count("stablehlo.custom_call @tpu_custom_call"), 2)
    self.assertIn("tensor<2x512x128xbf16>", module)

  def test_none_picks_the_kernels_on_tpus_where_shapes_suit(self):
    for shape, kernels in (((512, 2, 64), True), ((512, 2, 32), False), ((2**18, 2, 64), False)):
      with on_tpus(1, 1):
        program = str(jax.make_jaxpr(lambda *args: sparse_attention(*args, text_len=128))(*arguments(*shape)))
      self.assertEqual("pallas_call" in program, kernels, shape)
    with on_tpus(2, 1):
      split = str(jax.make_jaxpr(lambda *args: sparse_attention(*args, text_len=128))(*arguments(512, 2, 64)))
    cpu = str(jax.make_jaxpr(lambda *args: sparse_attention(*args, text_len=128))(*arguments(512, 2, 64)))
    self.assertNotIn("pallas_call", split + cpu)

  def test_says_why_it_cannot_run(self):
    for message, shape, options in (
      ("head_dim 64 or 128, got 32", (512, 2, 32), {}),
      ("block_size=64, got 32", (256, 2, 64), {"block_size": 32}),
      ("bfloat16 or float32, got float16", (512, 2, 64), {"dtype": jnp.float16}),
      (r"keys of 2 heads with 3 kept blocks need \d+ MiB of VMEM, more than 58 MiB", (2**16, 2, 64), {}),
    ):
      block_size = options.pop("block_size", 64)
      q, k, v, kept = arguments(*shape, **options)
      kept = jax.ShapeDtypeStruct((1, 1, shape[0] // block_size, 3), jnp.int32)
      with on_tpus(1, 1), self.assertRaisesRegex(NotImplementedError, f"pallas_tpu': .*{message}.*use None or 'xla'"):
        jax.eval_shape(
          lambda *args, b=block_size: sparse_attention(*args, text_len=128, block_size=b, implementation="pallas_tpu"),
          *(q, k, v, kept),
        )


class PlanTest(absltest.TestCase):
  def test_long_sequences_give_up_double_buffering_before_they_give_up(self):
    q, _, _, kept = arguments(4096, 2, 64, kept=11)
    plan = sparse_attention_pallas_tpu.plan_of(q, kept, 128, 64)
    self.assertEqual(plan.buffers(backward=True), 2)
    longer = dataclasses.replace(plan, blocks=384)
    self.assertEqual(longer.buffers(backward=True), 1)
    self.assertIsNone(pallas_tpu_plan.obstacle(longer, "bfloat16"))
    self.assertIsNotNone(pallas_tpu_plan.obstacle(dataclasses.replace(plan, blocks=640), "bfloat16"))

  def test_cost_estimate_is_the_work_of_the_other_implementation(self):
    args = arguments(1024, 2, 64, kept=4)

    def attend(name):
      return lambda *args: sparse_attention(*args, text_len=128, implementation=name)

    xla = flops.count_flops(attend("xla"), *args)
    self.assertEqual(flops.count_flops(attend("pallas_tpu_interpret"), *args), xla)
    self.assertEqual(xla, 4 * 64 * 2 * (1024 * (128 + 4 * 64) + 128 * (128 + 1024)))


if __name__ == "__main__":
  absltest.main()
