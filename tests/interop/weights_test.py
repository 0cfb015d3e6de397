"""Weight files: round trips, damage, and messages that name what does not fit."""

import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.interop import weights


def _tree():
  rng = np.random.default_rng(0)
  return {
    "block_00": {"mlp": {"kernel": rng.normal(size=(3, 4)).astype(np.float32)}, "scale": np.float32(0.5)},
    "out": {"bias": np.arange(4, dtype=np.float32), "ids": np.arange(3, dtype=np.int32)},
  }


class WeightsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "dit.safetensors")

  def test_round_trip_is_exact_and_keeps_shapes_and_metadata(self):
    tree = _tree()
    weights.save_tree(self.path, tree, metadata={"command": "train", "seed": "3"})
    loaded = weights.load_tree(self.path)
    self.assertEqual(jax.tree.structure(loaded), jax.tree.structure(tree))
    for name, leaf in weights.flatten(tree).items():
      got = weights.flatten(loaded)[name]
      self.assertEqual(got.shape, np.shape(leaf), name)
      self.assertEqual(got.dtype, np.asarray(leaf).dtype, name)
      np.testing.assert_array_equal(got, leaf)
    self.assertEqual(weights.load_metadata(self.path), {"command": "train", "seed": "3"})
    self.assertEqual(os.listdir(os.path.dirname(self.path)), ["dit.safetensors"])

  def test_names_are_joined_by_slashes(self):
    self.assertEqual(list(weights.flatten(_tree())), ["block_00/mlp/kernel", "block_00/scale", "out/bias", "out/ids"])

  def test_float16_halves_the_file_and_loads_as_float32(self):
    tree = {"kernel": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    weights.save_tree(self.path, tree)
    full = os.path.getsize(self.path)
    weights.save_tree(self.path, tree, dtype="float16")
    self.assertLess(os.path.getsize(self.path), 0.55 * full)
    loaded = weights.load_tree(self.path)["kernel"]
    self.assertEqual(loaded.dtype, np.float32)
    np.testing.assert_array_equal(loaded, tree["kernel"].astype(np.float16).astype(np.float32))

  def test_bfloat16_and_transposed_arrays_keep_their_values(self):
    kernel = jnp.arange(6.0).reshape(2, 3)
    weights.save_tree(self.path, {"a": kernel.astype(jnp.bfloat16), "b": np.asarray(kernel).T})
    loaded = weights.load_tree(self.path)
    self.assertEqual(loaded["a"].dtype, np.float32)
    np.testing.assert_array_equal(loaded["a"], kernel)
    np.testing.assert_array_equal(loaded["b"], kernel.T)

  @parameterized.parameters(
    ({"dtype": "int8"}, {"a": np.ones(2)}, "dtype"),
    ({"metadata": {"seed": 3}}, {"a": np.ones(2)}, "metadata"),
    ({"dtype": "float16"}, {"a": {"b": np.float32([1e6])}}, "a/b"),
    ({}, {"a": np.float32([np.nan])}, "a holds"),
    ({}, {"a/b": np.ones(2)}, "string keys"),
    ({}, {"a": [np.ones(2)]}, "string keys"),
  )
  def test_refuses_what_it_cannot_store_and_writes_nothing(self, options, tree, message):
    with self.assertRaisesRegex(ValueError, message):
      weights.save_tree(self.path, tree, **options)
    self.assertEmpty(os.listdir(os.path.dirname(self.path)))

  def test_a_failed_save_leaves_the_old_file_alone(self):
    weights.save_tree(self.path, {"a": np.ones(2, np.float32)})
    with self.assertRaises(ValueError):
      weights.save_tree(self.path, {"a": np.float32([np.inf])})
    np.testing.assert_array_equal(weights.load_tree(self.path)["a"], [1, 1])

  def test_missing_and_damaged_files_are_named_in_one_line(self):
    with self.assertRaisesRegex(ValueError, "no file .*dit.safetensors"):
      weights.load_tree(self.path)
    weights.save_tree(self.path, _tree())
    content = pathlib.Path(self.path).read_bytes()
    for size in (0, 5, 40, len(content) - 1):
      pathlib.Path(self.path).write_bytes(content[:size])
      with self.assertRaisesRegex(ValueError, f"dit.safetensors .{size} bytes. is truncated") as caught:
        weights.load_tree(self.path)
      self.assertNotIn("\n", str(caught.exception))

  def test_check_tree_accepts_shapes_and_names_the_differences(self):
    tree = _tree()
    weights.check_tree(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree)), tree)
    other = _tree()
    other["block_00"]["mlp"]["kernel"] = np.ones((3, 5))
    del other["out"]["bias"]
    other["block_01"] = {"scale": np.ones(())}
    with self.assertRaises(ValueError) as caught:
      weights.check_tree(tree, other, source="dit.safetensors")
    message = str(caught.exception)
    self.assertStartsWith(message, "dit.safetensors: 3 of 4 tensors do not fit")
    self.assertIn("out/bias is missing", message)
    self.assertIn("block_01/scale is not part of the model", message)
    self.assertIn("block_00/mlp/kernel has shape (3, 5) where the model has (3, 4)", message)

  def test_check_tree_shortens_a_long_list(self):
    tree = {f"w{i}": np.ones(1) for i in range(20)}
    with self.assertRaisesRegex(ValueError, "and 16 more"):
      weights.check_tree(tree, {})


if __name__ == "__main__":
  absltest.main()
