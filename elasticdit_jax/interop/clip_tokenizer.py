"""CLIP's byte-pair tokens from the model's own files, through the package `tokenizers` (extra: rewards)."""

import importlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Tokenize = Callable[[Sequence[str]], np.ndarray]
_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def load(directory: str | os.PathLike, length: int) -> Tokenize:
  """Reads tokenizer.json, or else vocab.json and merges.txt.

  Args:
    directory: of the model.
    length: L, tokens per text; longer texts are cut, the end token stays.

  Returns:
    A function from B texts to ids int32 [B, L], padded with the end token, which CLIP does not read.

  Raises:
    ValueError: in one line: the files are missing or damaged, or the package `tokenizers` is.
  """
  try:
    library = importlib.import_module("tokenizers")
  except ImportError as e:
    raise ValueError(f"CLIP: tokens need the package tokenizers ({e}); pip install elasticdit_jax[rewards]") from e
  path = os.path.join(directory, "tokenizer.json")
  try:
    tokenizer = library.Tokenizer.from_file(path) if os.path.isfile(path) else _from_vocabulary(library, directory)
  except ValueError:
    raise
  except Exception as e:  # the library has no exceptions of its own
    raise ValueError(f"CLIP: the tokenizer in {os.fspath(directory)} cannot be read ({e}); download it again") from e
  end = tokenizer.token_to_id(_END)
  if end is None:
    raise ValueError(f"CLIP: the tokenizer in {os.fspath(directory)} has no {_END}; is it another model's?")
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=end, pad_token=_END)

  def tokenize(texts: Sequence[str]) -> np.ndarray:
    return np.array([row.ids for row in tokenizer.encode_batch(list(texts))], np.int32).reshape(len(texts), length)

  return tokenize


def _from_vocabulary(library: Any, directory: str | os.PathLike) -> Any:
  """The tokenizer of Radford et al. 2021: lower case, words apart from digits and signs, pairs merged within words."""
  files = [os.path.join(directory, name) for name in ("vocab.json", "merges.txt")]
  missing = [file for file in files if not os.path.isfile(file)]
  if missing:
    raise ValueError(f"CLIP: neither tokenizer.json nor {' and '.join(map(os.path.basename, missing))} in {directory}")
  with open(files[0]) as f:
    vocabulary = json.load(f)
  with open(files[1]) as f:
    lines = [line for line in f.read().splitlines() if line and not line.startswith("#version")]
  merges = [tuple(line.split()) for line in lines]
  normalizers, pre_tokenizers = library.normalizers, library.pre_tokenizers
  model = library.models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=_END)
  tokenizer = library.Tokenizer(model)
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(library.Regex(r"\s+"), " "), normalizers.Lowercase()]
  )
  words = pre_tokenizers.Split(library.Regex(_SPLIT), behavior="removed", invert=True)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
  tokenizer.add_special_tokens([_START, _END])
  ends = [(token, vocabulary[token]) for token in (_END, _START)]
  tokenizer.post_processor = library.processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
  return tokenizer
