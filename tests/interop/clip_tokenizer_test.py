"""Tokens of CLIP from either kind of files, against transformers and by hand."""

import json
import os
import sys
import tempfile
import unittest

import numpy as np
from absl.testing import absltest

from elasticdit_jax.interop import clip_tokenizer

try:
  import tokenizers
except ImportError:
  tokenizers = None
try:
  import torch  # noqa: F401 (transformers without it is not worth its seconds)
  import transformers
except ImportError:
  transformers = None

_MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("t", "w"), ("tw", "o</w>")]
_TEXTS = [
  "cat", "Two  CATS!", "a dog's 24\ncats, élan", "", "cat dog two cat dog two cat dog", "<|endoftext|> dog", "e\u0301",
]  # fmt: skip


def vocabulary():
  """Bytes as the byte-level alphabet writes them, alone and at the end of a word, the merges, both special tokens."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in _MERGES), "<|startoftext|>", "<|endoftext|>"]
  return {word: number for number, word in enumerate(words)}


def write_vocabulary(directory):
  with open(os.path.join(directory, "vocab.json"), "w") as f:
    json.dump(vocabulary(), f)
  with open(os.path.join(directory, "merges.txt"), "w") as f:
    f.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in _MERGES))


@unittest.skipUnless(tokenizers, "needs tokenizers")
class ClipTokenizerTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.enterContext(tempfile.TemporaryDirectory())
    write_vocabulary(self.directory)

  def test_by_hand(self):
    table = vocabulary()
    ids = clip_tokenizer.load(self.directory, 7)(["Two CAT!", "", "cat dog two cat dog two cat"])
    start, end = table["<|startoftext|>"], table["<|endoftext|>"]
    two, cat, dog = table["two</w>"], table["cat</w>"], table["dog</w>"]
    self.assertEqual(ids.dtype, np.int32)
    self.assertEqual(
      ids.tolist(),
      [
        [start, two, cat, table["!</w>"], end, end, end],
        [start, end, end, end, end, end, end],
        [start, cat, dog, two, cat, dog, end],
      ],
    )
    self.assertEqual(clip_tokenizer.load(self.directory, 7)([]).shape, (0, 7))

  @unittest.skipUnless(transformers, "needs transformers")
  def test_like_transformers_and_tokenizer_json_gives_the_same(self):
    original = transformers.CLIPTokenizer(vocab=vocabulary(), merges=_MERGES)
    expected = original(_TEXTS, padding="max_length", truncation=True, max_length=9)["input_ids"]
    np.testing.assert_array_equal(clip_tokenizer.load(self.directory, 9)(_TEXTS), expected)
    with tempfile.TemporaryDirectory() as other:
      original.save_pretrained(other)
      self.assertIn("tokenizer.json", os.listdir(other))
      np.testing.assert_array_equal(clip_tokenizer.load(other, 9)(_TEXTS), expected)

  def test_missing_and_damaged_files(self):
    os.remove(os.path.join(self.directory, "merges.txt"))
    with self.assertRaisesRegex(ValueError, "CLIP: neither tokenizer.json nor merges.txt in "):
      clip_tokenizer.load(self.directory, 7)
    with open(os.path.join(self.directory, "tokenizer.json"), "w") as f:
      f.write("{}")
    with self.assertRaisesRegex(ValueError, "CLIP: the tokenizer in .* cannot be read"):
      clip_tokenizer.load(self.directory, 7)


class WithoutTheLibraryTest(absltest.TestCase):
  def test_the_remedy_is_named(self):
    with absltest.mock.patch.dict(sys.modules, {"tokenizers": None}):
      with self.assertRaisesRegex(ValueError, r"pip install elasticdit_jax\[rewards\]"):
        clip_tokenizer.load("nowhere", 7)


if __name__ == "__main__":
  absltest.main()
