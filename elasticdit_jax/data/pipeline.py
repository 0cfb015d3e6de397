"""Sources of captioned pictures to a stream of `Batch`; every batch is a pure function of (seed, step, host).

    keys of examples: shuffle, repeat, mix (grain.MapDataset)                cheap, O(1) seek to any step
      -> keys of a batch -> the rows of this host -> [start_step:]
      -> read the rows (render or decode), drop captions, encode             in prefetch threads

Only keys flow through grain until a whole batch is known, so scenes are rendered vectorised. Host h of n holds rows
h*B/n..(h+1)*B/n of the global batch: the global batch is the same on any number of hosts, and a run resumes from its
step counter alone.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np

from elasticdit_jax.data import scene_prompts, scenes
from elasticdit_jax.data.folder import FolderSource
from elasticdit_jax.data.text import WordEncoder, build_vocabulary
from elasticdit_jax.types import Batch

SOURCES = ("scenes", "folder")
_NO_WORDS = ("picture",)  # an encoder needs a word; captions of "" never use it
_STREAM = 1 << 31  # scenes per order seed; the ranges of different seeds do not overlap


class Source(Protocol):
  """Captioned pictures under random access.

  Attributes:
    size: S, side of the square pictures in pixels.
    free_text: people wrote the captions: words that the encoder does not know or has no room for are left out instead
      of refused.
  """

  size: int
  free_text: bool

  def order(self, seed: int | None) -> grain.MapDataset:
    """Endless int keys for `read`, in natural order where `seed` is None."""
    ...

  def read(self, keys: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
    """For keys int64 [N]: image uint8 [N, S, S, 3], N captions, and int32 [N] unreadable pictures passed over."""
    ...


@dataclasses.dataclass(frozen=True)
class ScenesSource:
  """The embedded rendered scenes.

  Attributes:
    seed: names the world; training and validation use different ones.
    size: side of the pictures in pixels.
    split: "train", "unseen" or "any": which combinations appear (see `scenes.render`).
    task_weights: relative frequency of the tasks.
  """

  seed: int
  size: int = 128
  split: str = "train"
  task_weights: tuple[float, ...] = scenes.TASK_WEIGHTS
  free_text = False

  def order(self, seed: int | None) -> grain.MapDataset:
    """Consecutive scenes from a start that depends on the seed (31 bits); scenes need no shuffle."""
    first = 0 if seed is None else (seed + 1) * _STREAM
    return grain.MapDataset.range(_STREAM).map(lambda i: first + i).repeat()

  def read(self, keys: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Renders all rows in one call; see `Source.read`."""
    made = scenes.render(keys, seed=self.seed, size=self.size, split=self.split, task_weights=self.task_weights)
    return made.image, list(made.caption), np.zeros(len(keys), np.int32)


@dataclasses.dataclass(frozen=True)
class Mix:
  """Several sources in fixed proportions, for example 8:2 of photographs and rendered pictures (ElasticDiT 3.1).

  Attributes:
    sources: sources of one picture size.
    weights: one positive number per source; proportions are exact over each short run of examples, not only on average.
  """

  sources: tuple[Source, ...]
  weights: tuple[float, ...]

  def __post_init__(self):
    if not self.sources or len(self.weights) != len(self.sources) or not all(w > 0 for w in self.weights):
      raise ValueError(f"Mix.weights: expected one positive number for each of {len(self.sources)}, got {self.weights}")
    sizes = [source.size for source in self.sources]
    if len(set(sizes)) > 1:
      raise ValueError(f"Mix.sources: expected pictures of one size, got {sizes}; give every source the same size")


class Batches(Iterator[Batch]):
  """The stream of batches from one step on; `close` (or leaving a `with` block) stops its threads.

  Attributes:
    step: the step whose batch comes next; give it as `start_step` to continue elsewhere.
  """

  def __init__(self, dataset: grain.MapDataset, start_step: int, threads: int, prefetch: int):
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    self._iterator = iter(dataset[start_step:].to_iter_dataset(options))
    self.step = start_step

  def __next__(self) -> Batch:
    try:
      batch = next(self._iterator)
    except BaseException:
      self.close()
      raise
    self.step += 1
    return batch

  def close(self) -> None:
    """Stops prefetching; the stream cannot be read afterwards."""
    self._iterator.close()

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def make_batches(
  source: Source | Mix,
  encoder: WordEncoder,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  caption_dropout: float = 0.1,
  host_index: int = 0,
  host_count: int = 1,
  threads: int = 2,
  prefetch: int = 4,
) -> Batches:
  """Training batches without end.

  Args:
    source: where pictures and captions come from.
    encoder: turns captions into `Text`.
    batch_size: B, examples of the global batch; this host yields B / host_count of them.
    seed: of the order of examples and of caption dropout.
    start_step: first step to yield; costs nothing to reach.
    caption_dropout: share of captions replaced by the null prompt, for classifier-free guidance.
    host_index: which host this is.
    host_count: number of hosts that share the global batch.
    threads: prefetching threads; 0 reads in the caller's thread.
    prefetch: batches to hold ready.

  Raises:
    ValueError: for arguments outside their range, and while iterating where a source gives up (too many broken files).
  """
  if start_step < 0:
    raise ValueError(f"start_step: expected 0 or more, got {start_step}")
  if not 0.0 <= caption_dropout <= 1.0:
    raise ValueError(f"data.caption_dropout: expected a share in [0, 1], got {caption_dropout}")
  maker = _BatchMaker(source, encoder, batch_size, seed, caption_dropout, host_index, host_count)
  return Batches(maker.dataset(), start_step, threads, prefetch if threads else 0)


def validation_batch(
  source: Source | Mix,
  encoder: WordEncoder,
  batch_size: int,
  count: int,
  *,
  host_index: int = 0,
  host_count: int = 1,
) -> list[Batch]:
  """The first `count` batches of a source in natural order, captions kept: always the same pictures.

  A folder with fewer than batch_size * count pictures starts again from its first one.
  """
  dataset = _BatchMaker(source, encoder, batch_size, None, 0.0, host_index, host_count).dataset()
  return [dataset[i] for i in range(count)]


@dataclasses.dataclass(frozen=True)
class _BatchMaker:
  """Maps keys to one host's share of a batch."""

  source: Source | Mix
  encoder: WordEncoder
  batch_size: int
  seed: int | None
  caption_dropout: float
  host_index: int
  host_count: int

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.host_count:
      raise ValueError(
        f"data.batch_size: expected a positive multiple of the {self.host_count} hosts, got {self.batch_size}"
      )
    if not 0 <= self.host_index < self.host_count:
      raise ValueError(f"host_index: expected 0..{self.host_count - 1}, got {self.host_index}")

  @property
  def parts(self) -> tuple[Source, ...]:
    return self.source.sources if isinstance(self.source, Mix) else (self.source,)

  def dataset(self) -> grain.MapDataset:
    """One element per step: this host's `Batch`."""
    keys = [_tag(part.order(_derive(self.seed, which)), which) for which, part in enumerate(self.parts)]
    mixed = grain.MapDataset.mix(keys, self.source.weights) if isinstance(self.source, Mix) else keys[0]
    rows = self.batch_size // self.host_count
    batched = mixed.batch(rows, drop_remainder=True, batch_fn=lambda pairs: np.array(pairs, np.int64))
    return batched[self.host_index :: self.host_count].map_with_index(self._read)

  def _read(self, step: int, keys: np.ndarray) -> Batch:
    """keys int64 [rows, 2]: which source, which of its examples."""
    rows = len(keys)
    image = np.empty((rows, self.parts[0].size, self.parts[0].size, 3), np.uint8)
    captions = np.full(rows, "", object)
    bad = np.zeros(rows, np.int32)
    for which in np.unique(keys[:, 0]):
      part, here = self.parts[which], keys[:, 0] == which
      image[here], texts, bad[here] = part.read(keys[here, 1])
      captions[here] = [self.encoder.clip(text) for text in texts] if part.free_text else texts
    captions[self._dropped(step)] = ""
    return Batch(image=image, text=self.encoder.encode(list(captions)), bad=bad)

  def _dropped(self, step: int) -> np.ndarray:
    """bool [rows]; drawn for the global batch, so that it does not depend on the number of hosts."""
    rows = self.batch_size // self.host_count
    if not self.caption_dropout:
      return np.zeros(rows, bool)
    draws = np.random.default_rng([_derive(self.seed, "captions"), step]).random(self.batch_size)
    return draws[self.host_index * rows :][:rows] < self.caption_dropout


def _tag(keys: grain.MapDataset, which: int) -> grain.MapDataset:
  return keys.map(lambda key: (which, key))


def _derive(seed: int | None, *purpose: int | str) -> int | None:
  """A 31-bit seed for one purpose; None stays None."""
  if seed is None:
    return None
  digest = hashlib.blake2b(repr((int(seed), *purpose)).encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little") >> 1


def source_from_config(data) -> tuple[Source, Source, WordEncoder]:
  """The sources that a config asks for.

  Args:
    data: object with the fields source, path, size, caption_field, seed, max_bad_fraction, text_length, text_dim and
      max_words; for scenes perhaps `split` ("train" without) and `tasks` ("counting=7,position=5": how often training
      shows each). A folder with caption_field "" is read without captions: for tasks that need none.

  Returns:
    Training source, validation source (other scenes, or held-out files) and the encoder of their captions.

  Raises:
    ValueError: for an unknown source, a folder without a path or a path without its source, and everything that is
      wrong with the folder.
  """
  if data.source not in SOURCES:
    raise ValueError(f"data.source: unknown source {data.source!r}; expected one of {', '.join(SOURCES)}")
  if data.source == "scenes" and data.path:
    raise ValueError(f"data.path: source 'scenes' reads no folder, got {data.path!r}; add --config.data.source=folder")
  if data.source == "scenes":
    split, tasks = getattr(data, "split", "train"), getattr(data, "tasks", "")
    validation = ScenesSource(_derive(data.seed, "validation"), data.size, split)
    train = dataclasses.replace(validation, seed=_derive(data.seed, "train"))
    if tasks:
      named = scene_prompts.parse_weights(tasks, scenes.TASKS, "data.tasks")
      train = dataclasses.replace(train, task_weights=tuple(named.get(task, 0.0) for task in scenes.TASKS))
    if data.text_length < scenes.MAX_WORDS:
      raise ValueError(f"data.text_length: scenes need at least {scenes.MAX_WORDS} words, got {data.text_length}")
    try:  # what cannot be rendered is refused now, not by a thread at the first step
      train.read(np.zeros(0, np.int64))
    except ValueError as e:
      raise ValueError(f"data.{e}") from None
    return train, validation, WordEncoder(scenes.VOCABULARY, data.text_length, data.text_dim)
  if not data.path:
    raise ValueError("data.path: source 'folder' needs a folder of pictures, got ''; add --config.data.path=DIR")
  folder = FolderSource(data.path, data.size, data.caption_field, max_bad_fraction=data.max_bad_fraction)
  train, validation = folder.split()
  if not data.caption_field:
    return train, validation, WordEncoder(_NO_WORDS, data.text_length, data.text_dim)
  try:
    words = build_vocabulary(folder.captions, data.max_words)
  except ValueError as e:
    raise ValueError(f"data.path: {data.path}: {e}") from None
  return train, validation, WordEncoder(words, data.text_length, data.text_dim)
