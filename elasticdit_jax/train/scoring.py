"""Scores of pictures that lie on several hosts: each host asks its own rewards, all get all scores.

  together: what one process cannot do, none goes on without
  settle:  every few seconds all processes meet --> all scored: go on | an error: all raise | a stop: all stop
  gather:  settle, then the scores in the order of the pictures, the same on every process

Nobody waits in silence, or for ever: process 0 names the hosts whose rewards are missing, a host that does not come to
a meeting is named after distributed.WAIT_SECONDS, and a signal ends the wait, also where there is one process only.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from absl import logging

from elasticdit_jax import distributed
from elasticdit_jax.train import interrupt
from elasticdit_jax.train.rewards import Pending, Reward, Scores

T = TypeVar("T")
ROUND_SECONDS = 5.0
_LOG_SECONDS = 60.0


def settle(reward: Reward, pending: Sequence[Pending]) -> list[Scores]:
  """Waits until every process has the scores of its own pictures; all must call it together.

  Args:
    reward: scores.
    pending: what its `submit` returned, of this process; may be empty.

  Returns:
    name -> float32 [B] for each of `pending`.

  Raises:
    interrupt.StopError: a stop is asked for while scores are missing, on any process.
    ValueError: see Reward.collect; or another process has raised one.
    OSError: another process has failed in another way.
    TimeoutError: another process hangs or is gone; see distributed.exchange.
  """
  begin = said = time.monotonic()
  while True:
    error, scores = None, None
    try:
      if reward.wait(pending, ROUND_SECONDS):
        scores = [reward.collect(each) for each in pending]
    except Exception as e:
      error = e
    late = _meet(scores is not None, error)
    if not late:
      return scores
    now = time.monotonic()
    if distributed.several() and jax.process_index() == 0 and now - said > _LOG_SECONDS:
      said = now
      logging.warning(
        "waiting for the rewards of %s, %.0f s by now; see the log there for a server that is away or slow; the run"
        " goes on by itself when they come, and SIGTERM saves and stops it",
        distributed.described(late),
        now - begin,
      )
    if interrupt.requested():
      raise interrupt.StopError


def together(make: Callable[[], T]) -> T:
  """What `make` returns; all processes must call it together, and where it raises on one of them it raises on all."""
  made, error = None, None
  try:
    made = make()
  except Exception as e:
    error = e
  _meet(True, error)
  return made


def _meet(done: bool, error: Exception | None) -> list[int]:
  """Processes that are not done; raises the error of this process or else of the first that has one."""
  told = {"done": done}
  if error is not None:
    text = str(error).strip().splitlines()
    told |= {"error": text[0] if text else type(error).__name__, "usage": isinstance(error, ValueError)}
  said = [json.loads(text) for text in distributed.exchange("rewards", json.dumps(told))]
  if error is not None:
    raise error
  for number, other in enumerate(said):
    if "error" in other:
      kind = ValueError if other["usage"] else OSError
      raise kind(f"{distributed.described([number])} failed: {other['error']}")
  return [number for number, other in enumerate(said) if not other["done"]]


def gather(reward: Reward, pending: Sequence[Pending], numbers: Sequence[np.ndarray], count: int) -> Scores:
  """The scores of all pictures on every process; all must call it together.

  Args:
    reward: scores.
    pending: what its `submit` returned, of this process; may be empty.
    numbers: the pictures of each of `pending`, of 0 .. count - 1; no picture is of two processes.
    count: of the pictures of all processes.

  Returns:
    name -> float32 [count], finite, bit for bit the same everywhere.

  Raises:
    ValueError, OSError, TimeoutError, interrupt.StopError: see `settle`.
  """
  own = settle(reward, pending)
  rows = [int(number) for part in numbers for number in part]
  told = {"rows": rows} | {name: [float(v) for part in own for v in part[name]] for name in reward.names}
  # JSON holds every float32 exactly, and unlike a collective on devices this wait has an end.
  said = [json.loads(text) for text in distributed.exchange("scores", json.dumps(told))]
  found = {name: np.full(count, np.nan, np.float32) for name in reward.names}
  for other in said:
    for name, values in found.items():
      values[other["rows"]] = other[name]
  return found
