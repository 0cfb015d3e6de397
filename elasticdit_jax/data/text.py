"""WordEncoder: captions to `Text` without a language model, for the embedded data and small folders.

  token of "circle" in "a red circle":   v("circle") + roll(v("red"), 1)

Every word has one fixed vector of unit variance derived from a cryptographic hash of its spelling; rolled by one
feature it says "the word before me" (the permutation that codes order in hyperdimensional computing, Kanerva 2009). It
stands in for the context that a language model would give: without it, who is left of whom is an interaction of three
things (word, order, place) that training does not find. The vectors are not trained and the model's shape does not
depend on the vocabulary, so a checkpoint reads any vocabulary; the vocabulary itself only serves to refuse words the
model has never seen. The model adds positions.
"""

import collections
import dataclasses
import difflib
import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from elasticdit_jax.types import Text

_APOSTROPHES = re.compile("['\u2019\u02bc]")
_WORD = re.compile(r"[^\W_]+")
_KIND = "words-in-order"


def split_words(caption: str) -> list[str]:
  """Lower-case words of a caption; apostrophes vanish, any other punctuation separates ("T-shirt!" -> "t", "shirt")."""
  return _WORD.findall(_APOSTROPHES.sub("", unicodedata.normalize("NFKC", caption).lower()))


def word_vector(word: str, dim: int) -> np.ndarray:
  """The vector of a word, float32 [dim] of length sqrt(dim).

  The same on every machine and in every version of numpy.

  Normal deviates by Box-Muller from the raw PCG64 stream: numpy keeps the bit stream stable across releases, but not
  what `Generator.standard_normal` makes of it.
  """
  seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=16).digest(), "little")
  raw = np.random.PCG64(seed).random_raw(2 * dim).reshape(2, dim)
  u, v = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
  normal = np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)
  return (normal * (np.sqrt(dim) / np.linalg.norm(normal))).astype(np.float32)


def build_vocabulary(captions: Iterable[str], max_words: int) -> tuple[str, ...]:
  """The `max_words` most frequent words of the captions, most frequent first, ties in alphabetical order.

  Raises:
    ValueError: where `max_words` is not positive or the captions hold no word at all.
  """
  if max_words < 1:
    raise ValueError(f"max_words: expected at least 1, got {max_words}")
  counts = collections.Counter(word for caption in captions for word in split_words(caption))
  if not counts:
    raise ValueError("captions: expected at least one word to build a vocabulary from, found none")
  ranked = sorted(counts, key=lambda word: (-counts[word], word))
  return tuple(ranked[:max_words])


@dataclasses.dataclass(frozen=True)
class WordEncoder:
  """Captions to fixed vectors of words and of the words before them.

  Attributes:
    words: the vocabulary; lower-case, without punctuation, no duplicates.
    length: L, the most words a caption may have.
    dim: D, features of each word vector.
  """

  words: tuple[str, ...]
  length: int
  dim: int

  def __post_init__(self):
    object.__setattr__(self, "words", tuple(self.words))
    if not self.words:
      raise ValueError("WordEncoder.words: expected at least one word, got none")
    odd = [word for word in self.words if not isinstance(word, str) or split_words(word) != [word]]
    if odd:
      raise ValueError(f"WordEncoder.words: expected single lower-case words without punctuation, got {odd[:5]}")
    if len(set(self.words)) != len(self.words):
      twice = [word for word, count in collections.Counter(self.words).items() if count > 1]
      raise ValueError(f"WordEncoder.words: expected each word once, got {twice[:5]} more than once")
    for name in ("length", "dim"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"WordEncoder.{name}: expected a positive int, got {value!r}")

  @functools.cached_property
  def _rows(self) -> dict[str, int]:
    return {word: row for row, word in enumerate(self.words, start=1)}

  @functools.cached_property
  def _table(self) -> np.ndarray:
    """float32 [1 + words, D]: the words alone; row 0 is the absent token."""
    absent = np.zeros(self.dim, np.float32)
    return np.stack([absent] + [word_vector(word, self.dim) for word in self.words])

  def encode(self, captions: Sequence[str]) -> Text:
    """Encodes B captions; "" gives the null prompt, a row without any token.

    Returns:
      Text with numpy arrays: embedding float32 [B, L, D], zero where absent; mask bool [B, L].

    Raises:
      ValueError: for words outside the vocabulary (with the closest known ones) or more than L words.
    """
    if isinstance(captions, str):
      raise ValueError(f"captions: expected a list of captions, got the single string {captions!r}; wrap it in a list")
    token = np.zeros((len(captions), self.length), np.int64)
    for row, caption in zip(token, captions, strict=True):
      words = split_words(caption)
      self._check(caption, words)
      row[: len(words)] = [self._rows[word] for word in words]
    embedding, mask = self._table[token], token > 0
    before = np.roll(embedding[:, :-1], 1, axis=-1)
    embedding[:, 1:] += np.where(mask[:, 1:, None], before, 0)
    return Text(embedding=embedding, mask=mask)

  def clip(self, caption: str) -> str:
    """The caption reduced to what `encode` accepts: known words only, at most L of them.

    For captions that people wrote, whose rare words a capped vocabulary leaves out.
    """
    return " ".join([word for word in split_words(caption) if word in self._rows][: self.length])

  def _check(self, caption: str, words: list[str]) -> None:
    if caption.strip() and not words:
      raise ValueError(f"prompt {caption!r}: holds no word; use words, or '' for the null prompt")
    unknown = [word for word in dict.fromkeys(words) if word not in self._rows]
    if unknown:
      named = ", ".join(self._hint(word) for word in unknown)
      some = ", ".join(self.words[:40]) + (", ..." if len(self.words) > 40 else "")
      raise ValueError(f"prompt {caption!r}: unknown words: {named}; use the {len(self.words)} known words: {some}")
    if len(words) > self.length:
      raise ValueError(f"prompt {caption!r}: expected at most {self.length} words, got {len(words)}; shorten it")

  def _hint(self, word: str) -> str:
    close = difflib.get_close_matches(word, self.words, n=3, cutoff=0.6)
    return f"{word!r} (did you mean {' or '.join(map(repr, close))}?)" if close else repr(word)

  def to_json(self) -> dict:
    """A JSON-ready dict; `from_json` restores an equal encoder."""
    return {"kind": _KIND, "words": list(self.words), "length": self.length, "dim": self.dim}

  @classmethod
  def from_json(cls, table: Mapping) -> "WordEncoder":
    """The encoder that `to_json` described.

    Raises:
      ValueError: where fields are missing, unknown or of another kind of encoder.
    """
    expected = {"kind", "words", "length", "dim"}
    if not isinstance(table, Mapping) or set(table) != expected or table["kind"] != _KIND:
      raise ValueError(f"text encoder: expected the fields {sorted(expected)} with kind {_KIND!r}, got {table!r:.120}")
    if not isinstance(table["words"], (list, tuple)):
      raise ValueError(f"text encoder: expected a list of words, got {table['words']!r:.120}")
    return cls(words=tuple(table["words"]), length=table["length"], dim=table["dim"])
