"""Rewards of pictures: what they are called, how they add up, and scoring beside sampling.

  reward = rewards.from_config(config.rewards)
  pending = reward.submit(images, prompts, metadata)      # returns at once; sample the next batch meanwhile
  scores = reward.collect(pending)                        # {name: float32 [B]}, every name of reward.names
  total = rewards.combine(scores, reward.weights)         # float32 [B]

A source of scores is any function of (images uint8 [B, H, W, 3], prompts, metadata) that returns {name: [B] numbers}:
of this process (train.reward_local, and evals.preference for those with weights) or of a server (train.reward_http).
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from elasticdit_jax.evals import preference
from elasticdit_jax.train import reward_http, reward_local

Scores = dict[str, np.ndarray]
Source = Callable[[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]], Mapping[str, Any]]
Pending = list[tuple[tuple[str, ...], int, futures.Future]]

DEFAULTS = {
  "weights": "scene_strict=1",
  "models": "",
  "servers": "",
  "batch_size": 64,
  "timeout": 120.0,
  "retries": 3,
  "patience": 86400.0,
  "threads": 2,
}


LOCAL: dict[tuple[str, ...], Source] = {
  reward_local.SCENE: reward_local.scene_scores,
  ("jpeg_size",): reward_local.jpeg_scores,
}


class Reward:
  """Named scores of pictures, computed in threads of their own.

  Attributes:
    names: of the scores that a call returns, in the order of the weights.
    weights: name -> weight; a score of weight 0 is measured without being rewarded.
  """

  def __init__(self, sources: Mapping[tuple[str, ...], Source], weights: Mapping[str, float], threads: int = 2):
    """Starts no thread before the first `submit`.

    Args:
      sources: names -> the function that computes those scores.
      weights: see `parse_weights`.
      threads: how many sources or batches are scored at a time.

    Raises:
      ValueError: weights of unknown names, negative or not finite; fewer than one thread.
    """
    known = [name for names in sources for name in names]
    self.weights = parse_weights(weights, known)
    if threads < 1:
      raise ValueError(f"rewards.threads: expected at least 1, got {threads}")
    self.names = tuple(self.weights)
    self._sources = {names: source for names, source in sources.items() if set(names) & set(self.names)}
    self._threads = threads
    self._tasks: queue.SimpleQueue | None = None

  def __call__(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
  ) -> Scores:
    """Scores of B pictures; arguments, result and errors of `submit` and `collect`."""
    return self.collect(self.submit(images, prompts, metadata))

  def submit(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
  ) -> Pending:
    """Begins to score and returns at once; several batches may be under way.

    Args:
      images: uint8 [B, H, W, 3]; not to be changed before `collect`.
      prompts: B.
      metadata: B mappings that a source may read; empty ones where None.

    Raises:
      ValueError: the arguments do not fit together.
    """
    images, prompts = np.asarray(images), list(prompts)
    metadata = [{} for _ in prompts] if metadata is None else list(metadata)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
      raise ValueError(f"images: expected uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
    if not len(images) == len(prompts) == len(metadata):
      raise ValueError(
        f"rewards: got {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; expected as many"
      )
    if self._tasks is None:
      self._tasks = _start_threads(self._threads)
    pending = []
    for names, source in self._sources.items():
      future: futures.Future = futures.Future()
      self._tasks.put((future, source, (images, prompts, metadata)))
      pending.append((names, len(images), future))
    return pending

  def wait(self, pending: Sequence[Pending], seconds: float) -> bool:
    """Whether all of several `submit`s are scored, after at most `seconds`; raises what a source has raised."""
    every = [future for each in pending for *_, future in each]
    done, left = futures.wait(every, seconds, futures.FIRST_EXCEPTION)
    for future in every:
      if future in done:
        future.result()
    return not left

  def collect(self, pending: Pending) -> Scores:
    """Waits for the scores of one `submit`.

    Returns:
      name -> float32 [B], all finite, one entry for each of `names`.

    Raises:
      ValueError: a reward is missing, not finite or not one number per picture; the message names it. Errors of a
        source come through as they are.
    """
    scores: Scores = {}
    for names, count, future in pending:
      got = future.result()
      for name in (name for name in names if name in self.weights):
        scores[name] = _checked(name, got, count)
    return {name: scores[name] for name in self.names}


def _start_threads(count: int) -> queue.SimpleQueue:
  """Daemons, unlike those of ThreadPoolExecutor: one that waits for a dead server must not keep the program alive."""
  tasks: queue.SimpleQueue = queue.SimpleQueue()
  for number in range(count):
    threading.Thread(target=_serve, args=(tasks,), name=f"reward-{number}", daemon=True).start()
  return tasks


def _serve(tasks: queue.SimpleQueue) -> None:
  while True:
    future, source, args = tasks.get()
    try:
      future.set_result(source(*args))
    except BaseException as e:
      future.set_exception(e)


def _checked(name: str, scores: Mapping[str, Any], count: int) -> np.ndarray:
  if name not in scores:
    raise ValueError(f"reward {name!r}: its source returned {', '.join(map(repr, scores)) or 'nothing'} instead")
  values = np.asarray(scores[name], np.float32)
  if values.shape != (count,):
    raise ValueError(f"reward {name!r}: expected one number for each of {count} pictures, got shape {values.shape}")
  wrong = np.flatnonzero(~np.isfinite(values))
  if wrong.size:
    raise ValueError(
      f"reward {name!r}: {wrong.size} of {count} values are not finite, the first is {values[wrong[0]]} for picture"
      f" {wrong[0]}; correct the reward, training on it would ruin the model"
    )
  return values


def parse_weights(weights: str | Mapping[str, float], known: Sequence[str]) -> dict[str, float]:
  """Weights of the sum.

  Args:
    weights: "scene_strict=1,jpeg_size=0.1", or the same as a mapping; 0 measures without rewarding.
    known: names there are.

  Raises:
    ValueError: for a name that is unknown or given twice, a weight that is negative or no number, or no positive one.
  """
  pairs = _pairs("weights", weights, "scene_strict=1") if isinstance(weights, str) else list(weights.items())
  parsed: dict[str, float] = {}
  for name, value in pairs:
    if name not in known:
      hint = f"; give its weights with rewards.models={name}=DIRECTORY" if name in preference.KINDS else ""
      raise ValueError(f"rewards.weights: unknown reward {name!r}; there are {', '.join(known)}{hint}")
    try:
      parsed[name] = float(value)
    except (TypeError, ValueError):
      raise ValueError(f"rewards.weights: {name}: expected a number like {name}=1, got {value!r}") from None
    if not 0 <= parsed[name] < np.inf:
      raise ValueError(
        f"rewards.weights: {name}: expected a finite weight of at least 0, got {value}; 0 measures without rewarding"
      )
  if not any(parsed.values()):
    raise ValueError("rewards.weights: expected at least one weight above 0, got none")
  return parsed


def _pairs(field: str, text: str, example: str) -> list[tuple[str, str]]:
  """ "a=x,b=y" as [("a", "x"), ("b", "y")]."""
  pairs = [tuple(part.strip() for part in item.partition("=")[::2]) for item in text.split(",") if item.strip()]
  wrong = [name for name, value in pairs if not name or not value]
  if wrong or not pairs:
    raise ValueError(f"rewards.{field}: expected name=value like {example}, got {text!r}")
  names = [name for name, _ in pairs]
  twice = [name for name in names if names.count(name) > 1]
  if twice:
    raise ValueError(f"rewards.{field}: {twice[0]!r} is given twice")
  return pairs


def combine(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
  """The weighted sum, float32 [B]; no reward is normalised by itself.

  Raises:
    ValueError: a weighted reward has no scores.
  """
  missing = [name for name in weights if name not in scores]
  if missing or not weights:
    raise ValueError(f"rewards: no scores of {', '.join(missing) or 'any reward'}; got {', '.join(scores) or 'none'}")
  return np.sum([np.float32(weight) * scores[name] for name, weight in weights.items()], axis=0, dtype=np.float32)


def from_config(config: Mapping[str, Any]) -> Reward:
  """The rewards of a run: reads their models and asks their servers for names, computes nothing yet.

  Args:
    config: fields left out have the values of DEFAULTS. weights: see `parse_weights`; models: "name=DIRECTORY", several
      separated by commas, of those in evals.preference; servers: "name=URL" likewise, of rewards computed elsewhere;
      batch_size, timeout, retries and patience: see reward_http.HttpReward; threads: how many sources or batches are
      scored at a time.

  Raises:
    ValueError: in one line naming the field.
  """
  fields = dict(config.items())
  unknown = sorted(set(fields) - set(DEFAULTS))
  if unknown:
    raise ValueError(f"rewards.{unknown[0]}: unknown field; there are {', '.join(DEFAULTS)}")
  fields = DEFAULTS | fields
  models, servers = preference.directories(fields["models"], "rewards.models"), _servers(fields)
  known = [*(name for names in [*LOCAL, *servers] for name in names), *models]
  weights = parse_weights(fields["weights"], known)
  # Only now, because reading a model takes a while.
  read = {(name,): preference.load(name, path) for name, path in models.items() if name in weights}
  for names, server in servers.items():
    if set(names) & set(weights):
      server.check()
  return Reward(LOCAL | read | servers, weights, fields["threads"])


def _servers(fields: Mapping[str, Any]) -> dict[tuple[str, ...], reward_http.HttpReward]:
  """One source for each address, whatever number of rewards it computes."""
  if not fields["servers"].strip():
    return {}
  local = {name for names in LOCAL for name in names} | set(preference.KINDS)
  by_url: dict[str, list[str]] = {}
  for name, url in _pairs("servers", fields["servers"], "geneval_strict=http://127.0.0.1:18085"):
    if name in local:
      raise ValueError(f"rewards.servers: {name!r} is a reward of this library; give the server's another name")
    by_url.setdefault(url, []).append(name)
  settings = {key: fields[key] for key in ("batch_size", "timeout", "retries", "patience")}
  return {tuple(names): reward_http.HttpReward(url, names, **settings) for url, names in by_url.items()}
