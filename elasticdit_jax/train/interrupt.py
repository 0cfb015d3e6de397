"""Ctrl-C and SIGTERM: a request to stop after the step.

In one process Python's handlers note it. Of several processes only one may be told, and all must stop after the same
step: there JAX's coordination service notes SIGTERM and finds the step (distributed.stop_requested).
"""

import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
from absl import logging

from elasticdit_jax import distributed

T = TypeVar("T")
_open: list["Signals"] = []


class StopError(Exception):
  """Ends a step, or what happens between two, that waits while a stop is asked for; it has changed nothing yet."""


class FailedError(Exception):
  """Ends a step with the error that is its cause, on all processes alike; it has changed nothing yet."""


def requested() -> bool:
  """Whether the run is asked to stop, for a step that waits; of several processes all must ask equally often."""
  return distributed.stop_requested() or any(signals.received for signals in _open)


class Signals:
  """Turns Ctrl-C and SIGTERM into a request to stop after the step; a second Ctrl-C stops at once.

  Handlers exist only in the main thread of a process; elsewhere nothing is installed.
  """

  def __init__(self):
    self._received: int | None = None
    self._at_once = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    _open.append(self)
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    _open.remove(self)
    for number, handler in self._before.items():
      signal.signal(number, handler)

  @property
  def received(self) -> bool:
    """Whether a signal asks for a stop."""
    return self._received is not None

  def _handle(self, number: int, unused_frame: Any) -> None:
    again = self.received
    self._received = number
    if self._at_once or again:
      self.leave()
    logging.warning("finishing this step, then saving; once more stops at once")

  def stop_now(self) -> bool:
    """Whether to stop now that a step is complete; every process asks after every step."""
    if distributed.stop_requested():
      self._received = signal.SIGTERM
    return self.received

  def immediately(self, work: Callable[[], T]) -> T:
    """Runs work that has nothing to save: a signal stops it at once."""
    self._at_once = True
    try:
      if self.received:
        self.leave()
      return work()
    except StopError:
      self.leave()
    finally:
      self._at_once = False

  def leave(self) -> NoReturn:
    """Raises what the signal asks for."""
    raise KeyboardInterrupt if self._received == signal.SIGINT else SystemExit(0)
