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

from elasticdit_jax.train import distributed

T = TypeVar("T")


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
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, unused_frame: Any) -> None:
    again = self._received is not None
    self._received = number
    if self._at_once or again:
      self.leave()
    logging.warning("finishing this step, then saving; once more stops at once")

  def stop_after(self, step: int) -> bool:
    """Whether to stop now that `step` updates are complete; every process asks after every step."""
    if distributed.stop_requested(step):
      self._received = signal.SIGTERM
    return self._received is not None

  def immediately(self, work: Callable[[], T]) -> T:
    """Runs work that has nothing to save: a signal stops it at once."""
    self._at_once = True
    try:
      if self._received is not None:
        self.leave()
      return work()
    finally:
      self._at_once = False

  def leave(self) -> NoReturn:
    """Raises what the signal asks for."""
    raise KeyboardInterrupt if self._received == signal.SIGINT else SystemExit(0)
