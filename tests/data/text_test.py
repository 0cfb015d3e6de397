import dataclasses
import json
import subprocess
import sys

import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.data import text

WORDS = ("a", "red", "blue", "purple", "circle", "circles", "two", "of", "left")


class WordEncoderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.encoder = text.WordEncoder(WORDS, length=5, dim=64)

  def test_rows_are_the_vectors_of_the_words_and_of_those_before_them(self):
    out = self.encoder.encode(["Two RED circles!", "a circle", ""])
    out.validate()
    self.assertEqual(out.embedding.shape, (3, 5, 64))
    self.assertEqual(out.embedding.dtype, np.float32)
    np.testing.assert_array_equal(out.mask.sum(1), [3, 2, 0])
    two, red, circles, a, circle = (text.word_vector(w, 64) for w in ("two", "red", "circles", "a", "circle"))
    expected = [two, red + np.roll(two, 1), circles + np.roll(red, 1)]
    np.testing.assert_allclose(out.embedding[0, :3], expected, rtol=1e-6)
    np.testing.assert_allclose(out.embedding[1, :2], [a, circle + np.roll(a, 1)], rtol=1e-6)
    np.testing.assert_array_equal(out.embedding[~out.mask], 0.0)

  def test_a_word_tells_who_came_before_it(self):
    out = self.encoder.encode(["red circle left of blue", "blue circle left of red"]).embedding
    differ = np.any(out[0] != out[1], axis=-1)
    np.testing.assert_array_equal(differ, [True, True, False, False, True])

  def test_vectors_have_unit_variance_and_are_nearly_orthogonal(self):
    table = np.stack([text.word_vector(w, 64) for w in WORDS])
    gram = table @ table.T / 64
    np.testing.assert_allclose(np.diag(gram), 1.0, atol=1e-6)
    self.assertLess(np.abs(gram - np.diag(np.diag(gram))).max(), 0.5)

  def test_vectors_never_change(self):
    # Shipped weights were trained with these numbers.
    np.testing.assert_allclose(text.word_vector("red", 4), [-0.97385108, 1.0091343, 1.4064554, -0.23482996], atol=2e-6)
    code = "from elasticdit_jax.data import text; print(text.word_vector('circle', 8).tobytes().hex())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    self.assertEqual(other, text.word_vector("circle", 8).tobytes().hex())

  def test_vector_of_a_word_is_independent_of_the_vocabulary(self):
    other = text.WordEncoder(("zebra", "red"), length=5, dim=64)
    np.testing.assert_array_equal(other.encode(["red"]).embedding, self.encoder.encode(["red"]).embedding)

  def test_unknown_words_are_named_with_close_ones_in_one_line(self):
    with self.assertRaisesRegex(ValueError, "'purpel'.*'purple'.*'xylophone'") as caught:
      self.encoder.encode(["a purpel xylophone"])
    self.assertNotIn("\n", str(caught.exception))

  def test_too_long_and_single_string(self):
    with self.assertRaisesRegex(ValueError, "at most 5 words, got 6"):
      self.encoder.encode(["a a a a a a"])
    with self.assertRaisesRegex(ValueError, "list"):
      self.encoder.encode("a red circle")

  def test_signs_alone_are_no_prompt(self):
    with self.assertRaisesRegex(ValueError, "prompt '!!!': holds no word"):
      self.encoder.encode(["a circle", "!!!"])
    self.assertFalse(self.encoder.encode([" "]).mask.any())

  def test_clip_gives_what_encode_accepts(self):
    clipped = self.encoder.clip("A red unicorn, left of two blue circles and more")
    self.assertEqual(clipped, "a red left of two")
    self.encoder.encode([clipped])

  def test_json_round_trip(self):
    back = text.WordEncoder.from_json(json.loads(json.dumps(self.encoder.to_json())))
    self.assertEqual(back, self.encoder)
    self.assertEqual(hash(back), hash(self.encoder))
    broken = dict(self.encoder.to_json(), kind="t5")
    with self.assertRaisesRegex(ValueError, "kind"):
      text.WordEncoder.from_json(broken)

  def test_frozen(self):
    with self.assertRaises(dataclasses.FrozenInstanceError):
      self.encoder.length = 3

  @parameterized.parameters(
    {"words": (), "length": 4, "dim": 4},
    {"words": ("Red",), "length": 4, "dim": 4},
    {"words": ("two words",), "length": 4, "dim": 4},
    {"words": ("red", "red"), "length": 4, "dim": 4},
    {"words": ("red",), "length": 0, "dim": 4},
    {"words": ("red",), "length": 4, "dim": 2.5},
  )
  def test_invalid_encoders_are_refused(self, **fields):
    with self.assertRaisesRegex(ValueError, "WordEncoder"):
      text.WordEncoder(**fields)


class VocabularyTest(absltest.TestCase):
  def test_most_frequent_first_and_capped(self):
    captions = ["The cat's hat", "the dog", "The hat, a dog"]
    self.assertEqual(text.build_vocabulary(captions, 10), ("the", "dog", "hat", "a", "cats"))
    self.assertEqual(text.build_vocabulary(captions, 2), ("the", "dog"))

  def test_accents_and_punctuation(self):
    self.assertEqual(text.split_words("Piñata—über_cool 3\u00d7!"), ["piñata", "über", "cool", "3"])

  def test_nothing_to_build_from(self):
    with self.assertRaisesRegex(ValueError, "at least one word"):
      text.build_vocabulary(["", "!!"], 10)
    with self.assertRaisesRegex(ValueError, "max_words"):
      text.build_vocabulary(["a"], 0)


if __name__ == "__main__":
  absltest.main()
