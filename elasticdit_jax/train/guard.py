"""What watches over a run: numbers that stop being numbers, steps that do not end, and a window to look into.

NaN and infinity are seen when metrics are read, at every log line and before every save: nothing waits for a step. With
`Guard.rollbacks`, the loop goes back to the last checkpoint and passes over the batches since.
"""

import dataclasses
import sys
import threading
import time
import traceback
from typing import Any

import jax
from absl import logging


@dataclasses.dataclass(frozen=True)
class Guard:
  """Attributes:
  rollbacks: times a start of the run may go back to the last checkpoint after NaN or infinity; 0 stops at once.
  hang_seconds: without a step, before the stacks of all threads go to the log; 0 for never.
  most_skipped: updates left out in a row (step.make_step's `spike`) that count as divergence.
  """

  rollbacks: int = 0
  hang_seconds: float = 0.0
  most_skipped: int = 50


class DivergedError(FloatingPointError):
  """Numbers stopped being finite. `step`: completed updates by then."""

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step


class Watchdog:
  """Writes the stacks of all threads to the log where no step ends for a while; use it as a context manager.

  It ends nothing: a step that compiles, or an evaluation, may take its time.

  Args:
    seconds: until then; 0 starts nothing.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True) if seconds else None
    self.beat("the start")

  def __enter__(self) -> "Watchdog":
    if self._thread:
      self._thread.start()
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self._stop.set()
    if self._thread:
      self._thread.join()

  def beat(self, what: Any) -> None:
    """Something ended: a step, by its number, or what the text says."""
    self._last, self._what = time.monotonic(), what

  def _watch(self) -> None:
    while not self._stop.wait(min(self._seconds / 4, 10.0)):
      if time.monotonic() - self._last > self._seconds:
        logging.error(
          "nothing ended for %.0f s after %s on process %d of %d: it hangs, compiles or evaluates; its stacks:\n%s",
          self._seconds,
          self._what,
          jax.process_index(),
          jax.process_count(),
          _stacks(),
        )
        self._last = time.monotonic()


def _stacks() -> str:
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  parts = []
  for ident, frame in sys._current_frames().items():
    if ident != threading.get_ident():
      parts.append(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
  return "\n".join(parts)


class ProfileWindow:
  """Profiles the steps of a window, on process 0, for XProf or TensorBoard.

  Args:
    window: (first, stop) steps; None profiles nothing.
    directory: where the profile goes.
  """

  def __init__(self, window: tuple[int, int] | None, directory: str):
    self._window = window if jax.process_index() == 0 else None
    self._directory = directory
    self._on = False

  def before(self, step: int, unfinished: Any) -> None:
    """Starts or ends the profile at the window's borders.

    Args:
      step: the step that comes next.
      unfinished: results of the steps before, waited for at a border.
    """
    if self._window is None or (step != self._window[0] and not (self._on and step >= self._window[1])):
      return
    jax.block_until_ready(unfinished)
    self.close()
    if step == self._window[0]:
      jax.profiler.start_trace(self._directory)
      self._on = True

  def close(self) -> None:
    """Ends a profile that is on."""
    if self._on:
      self._on = False
      jax.profiler.stop_trace()
      logging.info("profile of steps %d to %d: xprof --logdir=%s", *self._window, self._directory)


def parse_window(text: str, field: str) -> tuple[int, int] | None:
  """ "100:110" -> (100, 110); None for "".

  Raises:
    ValueError: naming `field` for anything else.
  """
  if not text:
    return None
  first, colon, stop = text.partition(":")
  if colon and first.isdecimal() and stop.isdecimal() and int(first) < int(stop):
    return int(first), int(stop)
  raise ValueError(f"{field}: expected 'FIRST:STOP' like '100:110', or '' for none, got {text!r}")
