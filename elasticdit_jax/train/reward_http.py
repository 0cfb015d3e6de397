"""Rewards from a server of their own: one JSON request per batch, pictures as PNG.

  GET  URL   ->  {"rewards": ["geneval_strict", "geneval_partial"]}                       which scores there are
  POST URL   {"rewards": [...], "prompts": [...], "metadata": [{...}, ...], "images": [base64 of PNG, ...]}
             ->  {"scores": {"geneval_strict": [0.0, 1.0, ...], ...}}                      one number per picture

Detectors and large language models want libraries that do not live in one environment with JAX; docs/rewards.md holds a
server for GenEval's detector. Answers are parsed as JSON and nothing else: unlike pickle, a reply can be wrong but it
cannot run code here. Requests go straight to the server, whatever proxy the environment names.
"""

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

_MOST_BYTES = 2**26  # of an answer; scores are a few bytes each
_AWAY = (429, 502, 503, 504)  # a proxy or a server that is loading its model
_LOG_EVERY = 60.0  # seconds


class _Away(Exception):
  """The server does not answer, or says that it cannot yet."""


class _Failed(Exception):
  """The server answered that it failed (HTTP 500 and its like)."""


class HttpReward:
  """A source of scores, see train.rewards, that asks a server; blocks while the server is away."""

  def __init__(
    self,
    url: str,
    names: Sequence[str],
    *,
    batch_size: int = 64,
    timeout: float = 120.0,
    retries: int = 3,
    patience: float = 86400.0,
    backoff: tuple[float, float] = (1.0, 30.0),
    sleep: Callable[[float], None] = time.sleep,
  ):
    """Asks nothing yet.

    Args:
      url: of the server, http or https.
      names: of the scores it shall compute.
      batch_size: most pictures in one request.
      timeout: seconds without a byte after which a request counts as unanswered.
      retries: how often a request is repeated that the server answers with an error of its own.
      patience: seconds to wait for a server that is away before the run gives up.
      backoff: first and longest pause between attempts, seconds; each pause is twice the one before.
      sleep: how to wait.

    Raises:
      ValueError: in one line naming the field.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
      raise ValueError(f"rewards.servers: expected a URL like http://127.0.0.1:18085, got {url!r}")
    for field, value, least in (("batch_size", batch_size, 1), ("retries", retries, 0), ("patience", patience, 0)):
      if value < least:
        raise ValueError(f"rewards.{field}: expected at least {least}, got {value}")
    if not timeout > 0:
      raise ValueError(f"rewards.timeout: expected a positive number of seconds, got {timeout}")
    self.url, self.names, self.batch_size, self.timeout = url, tuple(names), batch_size, timeout
    self._retries, self._patience, self._backoff, self._sleep = retries, patience, backoff, sleep
    self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

  def check(self, timeout: float = 5.0) -> None:
    """Asks for the names; does not wait for a server that is away, because one may start it after the run.

    Raises:
      ValueError: what answers is no reward server, or has no score of that name.
    """
    try:
      answer = self._ask(urllib.request.Request(self.url), timeout)
    except (_Away, _Failed) as e:
      logging.warning("reward server %s does not answer yet (%s); the run will wait for it", self.url, e)
      return
    known = answer.get("rewards")
    if not isinstance(known, list) or not all(isinstance(name, str) for name in known):
      raise ValueError(
        f'reward server {self.url}: expected {{"rewards": [names]}} as the answer to GET, got {answer!r:.200}'
      )
    missing = [name for name in self.names if name not in known]
    if missing:
      raise ValueError(
        f"rewards.servers: {self.url} has no reward {', '.join(map(repr, missing))}; it has {', '.join(known)}"
      )

  def __call__(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
  ) -> dict[str, np.ndarray]:
    """Scores of B pictures.

    Args:
      images: uint8 [B, H, W, 3].
      prompts: B.
      metadata: B mappings that JSON can hold.

    Returns:
      name -> float32 [B].

    Raises:
      ValueError: the answer is no JSON, lacks a score, has another number of them, or the server kept failing.
      ConnectionError: the server was away for longer than `patience`.
    """
    parts = []
    for start in range(0, len(images), self.batch_size):
      rows = slice(start, start + self.batch_size)
      parts.append(self._scores(images[rows], prompts[rows], metadata[rows]))
    return {name: np.concatenate([part[name] for part in parts]) for name in self.names}

  def _scores(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> dict:
    body = {"rewards": self.names, "prompts": list(prompts), "metadata": [dict(row) for row in metadata]}
    try:
      data = json.dumps(body | {"images": [_png(image) for image in images]}, allow_nan=False).encode()
    except (TypeError, ValueError) as e:
      raise ValueError(f"reward server {self.url}: metadata: expected what JSON can hold ({e})") from e
    request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"}, method="POST")
    scores = self._persist(request).get("scores")
    if not isinstance(scores, dict):
      raise ValueError(f'reward server {self.url}: expected {{"scores": {{name: numbers}}}}, got no "scores"')
    return {name: self._column(name, scores, len(images)) for name in self.names}

  def _column(self, name: str, scores: Mapping[str, Any], count: int) -> np.ndarray:
    if name not in scores:
      raise ValueError(f"reward server {self.url}: no scores of {name!r}, got {', '.join(scores) or 'none'}")
    values = scores[name]
    if not isinstance(values, list) or len(values) != count:
      got = f"{len(values)}" if isinstance(values, list) else repr(values)[:80]
      raise ValueError(f"reward server {self.url}: expected {count} scores of {name!r}, one per picture, got {got}")
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong:
      raise ValueError(f"reward server {self.url}: expected numbers as scores of {name!r}, got {wrong[0]!r:.80}")
    return np.asarray(values, np.float32)

  def _persist(self, request: urllib.request.Request) -> dict:
    """The answer, however long the server is away; errors of its own are bounded by `retries`."""
    begin, failures, pauses, said = time.monotonic(), 0, 0, None
    while True:
      try:
        answer = self._ask(request, self.timeout)
      except _Failed as e:
        failures += 1
        if failures > self._retries:
          raise ValueError(f"reward server {self.url}: failed {failures} times on one batch: {e}") from e
        logging.warning("reward server %s failed (%s); retry %d of %d", self.url, e, failures, self._retries)
      except _Away as e:
        away = time.monotonic() - begin
        if away > self._patience:
          raise ConnectionError(
            f"reward server {self.url}: away for {away:.0f} s ({e}); start it and give the same command again"
          ) from e
        if said is None or away - said > _LOG_EVERY:
          said = away
          logging.warning("reward server %s is away (%s); the run waits for it and then goes on by itself", self.url, e)
      else:
        if said is not None:
          logging.info("reward server %s is back after %.0f s", self.url, time.monotonic() - begin)
        return answer
      first, longest = self._backoff
      self._sleep(min(longest, first * 2**pauses))
      pauses = min(pauses + 1, 30)

  def _ask(self, request: urllib.request.Request, timeout: float) -> dict:
    try:
      with self._opener.open(request, timeout=timeout) as response:
        kind, text = response.headers.get("Content-Type", ""), response.read(_MOST_BYTES)
        if response.length and len(text) < _MOST_BYTES:  # a read with a limit does not say so itself
          raise _Away(f"hung up {response.length} bytes before the end of its answer")
    except urllib.error.HTTPError as e:
      self._refused(e)
    except TimeoutError as e:
      raise _Away(
        f"no answer within {timeout:g} s; where it is only slow, lower rewards.batch_size or raise rewards.timeout"
      ) from e
    except (OSError, http.client.HTTPException) as e:
      reason = getattr(e, "reason", None) or e
      raise _Away(f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__) from e
    try:
      answer = json.loads(text)
    except ValueError as e:
      what = "HTML" if "html" in kind or text.lstrip()[:1] == b"<" else f"{kind or 'something'} that is no JSON"
      raise ValueError(
        f"reward server {self.url}: expected JSON, got {what}: {_excerpt(text)!r}; is this the address of the server?"
      ) from e
    if not isinstance(answer, dict):
      raise ValueError(f"reward server {self.url}: expected a JSON object, got {answer!r:.80}")
    return answer

  def _refused(self, error: urllib.error.HTTPError) -> None:
    """Raises what an HTTP status other than 200 means."""
    with error:
      try:
        said = _excerpt(error.read(2000))
      except (OSError, http.client.HTTPException) as e:
        said = f"{type(e).__name__} in the middle of its message"
    status = f"HTTP {error.code} {error.reason}"
    if error.code in _AWAY:
      raise _Away(status) from error
    if error.code >= 500:
      raise _Failed(f"{status}: {said}") from error
    raise ValueError(f"reward server {self.url}: refused the request with {status}: {said}") from error


def _png(image: np.ndarray) -> str:
  file = io.BytesIO()
  Image.fromarray(image).save(file, format="PNG", compress_level=1)
  return base64.b64encode(file.getvalue()).decode()


def _excerpt(text: bytes) -> str:
  return " ".join(text.decode(errors="replace").split())[:160]
