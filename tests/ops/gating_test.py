"""Block selection: the right blocks, as lists that kernels can trust."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.ops import gating


def pooled(seed=0, batch=2, blocks=6, heads=3, dim=4):
  keys = jax.random.split(jax.random.key(seed))
  return tuple(jax.random.normal(k, (batch, blocks, heads, dim)) for k in keys)


class GatingTest(parameterized.TestCase):
  @parameterized.parameters(
    (16, 0.0, 16), (16, 0.75, 4), (16, 0.8416, 3), (64, 0.8416, 11), (256, 0.8416, 41), (100, 0.29, 71), (1, 0.9, 1),
    (15, 1 - 7 / 15, 7), (4, 0.999999999, 1),
  )  # fmt: skip
  def test_num_kept(self, blocks, sparsity, expected):
    self.assertEqual(gating.num_kept(blocks, sparsity), expected)

  def test_num_kept_recovers_every_integer_from_its_ratio(self):
    for blocks in range(1, 130):
      for kept in range(1, blocks + 1):
        self.assertEqual(gating.num_kept(blocks, 1 - kept / blocks), kept)

  def test_shared_list_drops_the_smallest_affinity_over_all_channels(self):
    q, k = pooled()
    kept = gating.select_blocks(q, k, 2)
    self.assertEqual((kept.shape, kept.dtype), ((2, 1, 6, 2), jnp.int32))
    affinity = np.einsum("bqc,bkc->bqk", np.reshape(q, (2, 6, 12)), np.reshape(k, (2, 6, 12)))
    expected = np.sort(np.argsort(-affinity, axis=-1)[..., :2], axis=-1)
    np.testing.assert_array_equal(kept[:, 0], expected)

  def test_affinity_is_signed(self):
    q = jnp.ones((1, 3, 1, 1))
    k = jnp.array([-5.0, 1.0, 2.0]).reshape(1, 3, 1, 1)
    np.testing.assert_array_equal(gating.select_blocks(q, k, 2)[0, 0, 0], [1, 2])

  def test_per_head_equals_every_head_alone(self):
    q, k = pooled()
    kept = gating.select_blocks(q, k, 3, per_head=True)
    self.assertEqual(kept.shape, (2, 3, 6, 3))
    for head in range(3):
      alone = gating.select_blocks(q[:, :, head : head + 1], k[:, :, head : head + 1], 3)
      np.testing.assert_array_equal(kept[:, head], alone[:, 0])

  @parameterized.product(per_head=[False, True], count=[1, 3])
  def test_force_self(self, per_head, count):
    q, k = pooled()
    kept = np.asarray(gating.select_blocks(q, -q, count, per_head=per_head, force_self=True))
    self.assertTrue((kept == np.arange(6)[:, None]).any(-1).all())
    gating.check_kept(kept, 6)
    free = np.asarray(gating.select_blocks(q, -q, 1, per_head=per_head))
    self.assertFalse((free == np.arange(6)[:, None]).any(-1).all())

  def test_padding_blocks_are_never_listed(self):
    q, k = pooled()
    mask = jnp.array([[True] * 4 + [False] * 2, [False, True, True, True, True, False]])
    for force_self in (False, True):
      kept = np.asarray(gating.select_blocks(q, 100 * k, 4, block_mask=mask, force_self=force_self))
      np.testing.assert_array_equal(kept[0], np.broadcast_to([0, 1, 2, 3], (1, 6, 4)))
      np.testing.assert_array_equal(kept[1], np.broadcast_to([1, 2, 3, 4], (1, 6, 4)))
    # With fewer real blocks than the list is long, the list stays well formed and still holds all real ones.
    kept = np.asarray(gating.select_blocks(q, k, 5, block_mask=mask))
    gating.check_kept(kept, 6)
    self.assertTrue(np.isin([0, 1, 2, 3], kept[0, 0, 0]).all())

  @parameterized.parameters(False, True)
  def test_other_queries_than_those_of_the_blocks(self, per_head):
    q, k = pooled()
    expected = gating.select_blocks(q, k, 3, per_head=per_head)[:, :, 2:3]
    np.testing.assert_array_equal(gating.select_blocks(q[:, 2:3], k, 3, per_head=per_head), expected)
    gate = gating.block_gate(q[:, 2:3], k, 3, per_head=per_head)
    np.testing.assert_array_equal(gate, (expected[..., None] == np.arange(6)).any(-2))

  def test_ties_go_to_the_lower_index(self):
    q = jnp.ones((1, 4, 1, 2))
    np.testing.assert_array_equal(gating.select_blocks(q, q, 2)[0, 0], [[0, 1]] * 4)
    np.testing.assert_array_equal(gating.block_gate(q, q, 2)[0, 0], [[True, True, False, False]] * 4)

  @parameterized.product(per_head=[False, True], force_self=[False, True], masked=[False, True])
  def test_the_gate_is_the_list_for_every_count_from_one_program(self, per_head, force_self, masked):
    q, k = pooled()
    options = {"per_head": per_head, "force_self": force_self}
    options["block_mask"] = jnp.array([[True] * 4 + [False] * 2]) if masked else None
    traces = []

    @jax.jit
    def gate(q, k, count):
      traces.append(count)
      return gating.block_gate(q, k, count, **options)

    for count in range(1, 7):
      kept = gating.select_blocks(q, k, count, **options)
      np.testing.assert_array_equal(gate(q, k, count), (kept[..., None] == jnp.arange(6)).any(-2))
    self.assertLen(traces, 1)

  def test_all_blocks_kept_is_every_index(self):
    q, k = pooled()
    np.testing.assert_array_equal(gating.select_blocks(q, k, 6), np.broadcast_to(np.arange(6), (2, 1, 6, 6)))

  def test_differentiation_does_not_enter_the_selection(self):
    q, k = pooled()
    select = lambda q, k: gating.select_blocks(q, k, 2)  # noqa: E731
    plain = str(jax.make_jaxpr(select)(q, k)).count("dot_general")
    differentiated = str(jax.make_jaxpr(lambda q, k: jax.jvp(select, (q, k), (q, k)))(q, k)).count("dot_general")
    self.assertEqual((plain, differentiated), (1, 1))

  def test_bad_input(self):
    q, k = pooled()
    for message, call in (
      (r"num_kept: expected 1..6 of 6 blocks, got 0", lambda: gating.select_blocks(q, k, 0)),
      (r"num_kept: expected 1..6 of 6 blocks, got 7", lambda: gating.select_blocks(q, k, 7)),
      (r"q_blocks, k_blocks: expected arrays .* \(2, 6, 2, 4\)$", lambda: gating.select_blocks(q, k[:, :, 1:], 2)),
      (r"force_self: .* the 5 key blocks, got 6", lambda: gating.select_blocks(q, k[:, 1:], 2, force_self=True)),
      (r"block_mask: expected \[2 or 1, 6\]", lambda: gating.select_blocks(q, k, 2, block_mask=jnp.ones((2, 5), bool))),
      (r"sparsity: expected a share of dropped blocks in \[0, 1\), got 1.0", lambda: gating.num_kept(4, 1.0)),
      (r"num_blocks: expected at least 1", lambda: gating.num_kept(0, 0.5)),
      (r"indices in 0..5, got \[0, 6\] in row \(1,\)", lambda: gating.check_kept([[0, 1], [6, 0]], 6)),
      (r"at most once in a list, got \[2, 2\] in row \(0,\)", lambda: gating.check_kept([[2, 2], [0, 1]], 6)),
    ):
      with self.assertRaisesRegex(ValueError, message):
        call()


if __name__ == "__main__":
  absltest.main()
