"""Checkpoints: bit-exact round trips, damage, foreign models, full disks."""

import glob
import os
import shutil
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.train import checkpoint, optim

_OPTIMIZER = {
  "name": "muon",
  "learning_rate": 1.0,
  "warmup_steps": 0,
  "decay_fraction": 0.0,
  "weight_decay": 0.0,
  "b1": 0.9,
  "b2": 0.99,
  "clip_norm": 1.0,
}


def _state(seed=0, width=16):
  key = jax.random.key(seed)
  params = {
    "block_00": {"mlp": {"kernel": jax.random.normal(key, (width, 64)), "bias": jnp.zeros(64)}},
    "half": jax.random.normal(key, (5,), jnp.bfloat16),
  }
  tx = optim.make(_OPTIMIZER, params, 1e-2)
  state = {"params": params, "opt_state": tx.init(params), "ema": params, "step": jnp.int32(seed)}
  return state | {"key": jax.random.fold_in(key, 7), "kept": jnp.array([True, False])}


def _assert_same(test, got, want):
  test.assertEqual(jax.tree.structure(got), jax.tree.structure(want))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    test.assertEqual(a.dtype, b.dtype)
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    test.assertEqual(np.asarray(a).tobytes(), np.asarray(b).tobytes())


class CheckpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = self.enterContext(tempfile.TemporaryDirectory())

  def _save(self, *steps, **options):
    with checkpoint.Checkpointer(self.workdir, **options) as saver:
      for step in steps:
        saver.save(step, _state(step), {"data_step": step, "phase": "warm-up", "share": 0.1 + 0.2})

  def _restore(self, template=None):
    with checkpoint.Checkpointer(self.workdir) as saver:
      return saver.restore_latest(_state() if template is None else template)

  def test_round_trip_is_bit_exact_with_keys_and_json(self):
    self.assertIsNone(self._restore())
    self._save(3)
    state, meta = self._restore()
    _assert_same(self, state, _state(3))
    self.assertEqual(meta, {"data_step": 3, "phase": "warm-up", "share": 0.1 + 0.2})
    np.testing.assert_array_equal(jax.random.normal(state["key"]), jax.random.normal(_state(3)["key"]))

  def test_shapes_are_template_enough(self):
    self._save(3)
    _assert_same(self, self._restore(jax.eval_shape(_state))[0], _state(3))

  def test_one_process_at_a_time(self):
    with checkpoint.Checkpointer(self.workdir) as saver:
      with self.assertRaisesRegex(ValueError, f"another process is training in {self.workdir}; .* another --workdir"):
        checkpoint.Checkpointer(self.workdir)
      saver.save(1, _state(1), {})
    _assert_same(self, self._restore()[0], _state(1))

  def test_keeps_the_newest_and_the_chosen(self):
    self._save(1, 2, 3, 4, 5, keep=2, keep_steps=(2,))
    with checkpoint.Checkpointer(self.workdir) as saver:
      self.assertEqual(saver.steps, [2, 4, 5])
      self.assertEqual(saver.latest, 5)

  def test_arrays_may_be_donated_once_save_returns(self):
    overwrite = jax.jit(lambda x: -x, donate_argnums=0)
    with checkpoint.Checkpointer(self.workdir) as saver:
      big = jnp.arange(2**20, dtype=jnp.float32)
      saver.save(1, {"x": big}, {})
      for _ in range(20):
        big = overwrite(big)
    state, _ = self._restore({"x": jax.ShapeDtypeStruct((2**20,), jnp.float32)})
    np.testing.assert_array_equal(state["x"], np.arange(2**20))

  def _largest_file(self, step):
    files = [f for f in glob.glob(f"{self.workdir}/checkpoints/{step}/state/**/*", recursive=True) if os.path.isfile(f)]
    return max(files, key=os.path.getsize)

  def _damage(self, kind, step):
    path = self._largest_file(step)
    with open(path, "r+b") as f:
      if kind == "truncated":
        f.truncate(os.path.getsize(path) // 2)
      elif kind == "zeroed":
        f.write(bytes(os.path.getsize(path)))
      elif kind == "bit":
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 4]))
    if kind == "deleted":
      os.remove(path)
    if kind == "empty directory":
      shutil.rmtree(f"{self.workdir}/checkpoints/{step}")
      os.makedirs(f"{self.workdir}/checkpoints/{step}")

  @parameterized.parameters("truncated", "zeroed", "deleted", "bit", "empty directory")
  def test_a_damaged_step_is_passed_over_kept_and_replaced_by_a_new_save(self, kind):
    self._save(10, 20, keep=1, keep_steps=(10,))
    self._damage(kind, 20)
    with checkpoint.Checkpointer(self.workdir, keep=1) as saver:
      with self.assertLogs(level="WARNING") as logs:
        state, meta = saver.restore_latest(_state())
      self.assertIn("step 20 in", "".join(logs.output))
      _assert_same(self, state, _state(10))
      self.assertEqual(meta["data_step"], 10)
      saver.save(15, _state(15), {"data_step": 15})
      saver.wait()
      self.assertTrue(os.path.isdir(f"{self.workdir}/checkpoints/20"))
      self.assertEqual(saver.steps, [15])
      saver.save(20, _state(20), {"data_step": 20})
    state, meta = self._restore()
    _assert_same(self, state, _state(20))
    self.assertEqual(meta["data_step"], 20)

  def test_only_damaged_steps_is_an_error_and_deletes_nothing(self):
    self._save(10)
    self._damage("truncated", 10)
    with self.assertRaisesRegex(ValueError, r"none of the steps \[10\]"):
      self._restore()
    self.assertTrue(os.path.isdir(f"{self.workdir}/checkpoints/10"))

  def test_another_model_is_refused_instead_of_falling_back(self):
    self._save(10)
    with self.assertRaisesRegex(ValueError, r"another model.*\(16, 64\).* -> .*\(32, 64\)") as caught:
      self._restore(_state(width=32))
    self.assertNotIn("\n", str(caught.exception))

  def test_a_state_with_nan_is_named_and_not_saved(self):
    self._save(1)
    bad = _state(2)
    bad["params"] = bad["params"] | {"half": bad["params"]["half"].at[3].set(jnp.nan)}
    with checkpoint.Checkpointer(self.workdir) as saver:
      with self.assertRaisesRegex(FloatingPointError, "params/half .*step 2.*step 1"):
        saver.save(2, bad, {})
      self.assertEqual(saver.steps, [1])

  def test_a_full_disk_is_noticed_before_anything_is_written(self):
    self._save(1)
    with checkpoint.Checkpointer(self.workdir) as saver:
      with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=1000)):
        with self.assertRaisesRegex(OSError, "make room .*step 1"):
          saver.save(2, _state(2), {})
      saver.save(2, _state(2), {"data_step": 2})
    _assert_same(self, self._restore()[0], _state(2))

  def test_fingerprints_see_every_bit_and_every_exchange(self):
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    seen = {checkpoint.fingerprints_of({"x": jnp.asarray(x)})["x"][0]}
    for bit in range(32):
      y = x.copy()
      y.view(np.uint32)[2, 5] ^= np.uint32(1 << bit)
      seen.add(checkpoint.fingerprints_of({"x": jnp.asarray(y)})["x"][0])
    y = x.copy()
    y[0, 1], y[3, 4] = x[3, 4], x[0, 1]
    seen.add(checkpoint.fingerprints_of({"x": jnp.asarray(y)})["x"][0])
    seen.add(checkpoint.fingerprints_of({"x": jnp.asarray(x.T)})["x"][0])
    self.assertLen(seen, 35)


if __name__ == "__main__":
  absltest.main()
