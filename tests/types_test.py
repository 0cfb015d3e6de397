"""The nouns: pytrees with checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.types import Batch, Text, to_float


def _batch():
  text = Text(np.zeros((2, 5, 8), np.float32), np.ones((2, 5), bool))
  return Batch(np.zeros((2, 16, 24, 3), np.uint8), text, np.zeros(2, np.int32))


class TypesTest(parameterized.TestCase):
  def test_good_values_pass_and_travel_through_jit(self):
    batch = _batch()
    batch.validate()
    self.assertLen(jax.tree.leaves(batch), 4)
    out = jax.jit(lambda b: jax.tree.map(lambda a: a[:1], b))(batch)
    self.assertIsInstance(out, Batch)
    self.assertIsInstance(out.text, Text)
    out.validate()
    self.assertEqual((out.image.shape, out.text.mask.shape, out.bad.shape), ((1, 16, 24, 3), (1, 5), (1,)))
    with self.assertRaises(dataclasses.FrozenInstanceError):
      batch.bad = None

  @parameterized.parameters(
    ("embedding", (2, 5), "float32", r"Text.embedding: expected \[B, L, D\], got shape \(2, 5\)"),
    ("mask", (2, 4), "bool", r"Text.mask: expected shape \(2, 5\), got \(2, 4\)"),
    ("mask", (2, 5), "int32", r"Text.mask: expected bool, got int32"),
  )
  def test_text_messages(self, field, shape, dtype, message):
    text = dataclasses.replace(_batch().text, **{field: np.zeros(shape, dtype)})
    for value in (text, dataclasses.replace(_batch(), text=text)):
      with self.assertRaisesRegex(ValueError, message):
        value.validate()

  @parameterized.parameters(
    ("image", (2, 16, 24), "uint8", r"Batch.image: expected \[B, H, W, 3\], got shape \(2, 16, 24\)"),
    ("image", (2, 16, 24, 4), "uint8", r"Batch.image: expected \[B, H, W, 3\]"),
    ("image", (2, 16, 24, 3), "float32", r"Batch.image: expected uint8, got float32"),
    ("image", (3, 16, 24, 3), "uint8", r"Batch.text: expected 3 rows like the images, got 2"),
    ("bad", (2, 1), "int32", r"Batch.bad: expected shape \(2,\), got \(2, 1\)"),
  )
  def test_batch_messages(self, field, shape, dtype, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(_batch(), **{field: np.zeros(shape, dtype)}).validate()

  def test_to_float(self):
    levels = np.arange(256, dtype=np.uint8)
    for values in (to_float(levels), to_float(jnp.asarray(levels))):
      self.assertEqual(values.dtype, np.float32)
      np.testing.assert_allclose([values[0], values[255]], [-1.0, 1.0])
      np.testing.assert_allclose(np.diff(values), np.full(255, 2 / 255), atol=1e-6)


if __name__ == "__main__":
  absltest.main()
