"""The training loop of every task: step, log, guard, save, stop.

  global step k  =  completed updates  =  position in the data

  start --> [hook k] --> batch k --> step_fn --> k + 1 --> log, guard --> save --> ... --> stop --> [hook stop]

A checkpoint at step k holds the state before the hook at k, and a run that starts at k runs that hook. So a hook (the
boundary of a phase: analysis, pictures, a change of state) happens again where it was interrupted, and never twice in a
run that was not.
"""

import collections
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from elasticdit_jax.train import checkpoint as checkpoint_lib
from elasticdit_jax.train import writer as writer_lib

State = Any
Metrics = Mapping[str, jax.Array]
_RUN_AHEAD = 2  # steps queued on the device: enough to hide the host, few enough to stop soon


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a run reports and saves.

  Attributes:
    stop: total number of steps.
    log_every: steps between log lines.
    save_every: steps between checkpoints.
    batch_size: images per step over all hosts, for img/s.
    resume_command: what the user types to go on after an interruption.
    phase: update number, from 0 -> the name shown in its log line: "uwco/2-hybrid".
    meta: completed updates -> JSON values stored with that checkpoint (phase, routes); "data_step" is added.
  """

  stop: int
  log_every: int
  save_every: int
  batch_size: int
  resume_command: str
  phase: Callable[[int], str] = lambda step: "train"
  meta: Callable[[int], dict[str, Any]] = lambda step: {}

  def __post_init__(self):
    for field in ("log_every", "save_every", "batch_size"):
      if getattr(self, field) < 1:
        raise ValueError(f"{field}: expected a positive number, got {getattr(self, field)}")


def run(
  state: State,
  make_batches: Callable[[int], Iterator[Any]],
  step_fn: Callable[[State, Any, int], tuple[State, Metrics]],
  settings: Settings,
  *,
  start: int = 0,
  checkpoint: checkpoint_lib.Checkpointer | None = None,
  writer: writer_lib.Writer | None = None,
  hooks: Mapping[int, Callable[[State], State]] | None = None,
) -> State:
  """Trains from step `start` to step `settings.stop`.

  Args:
    state: any tree of arrays; `step_fn` may donate it.
    make_batches: called once with `start`; the batches from that step on.
    step_fn: (state, batch, step) -> (state, scalar metrics by name). It chooses its compiled function by step.
    settings: see `Settings`.
    start: completed steps, as restored.
    checkpoint: where to save; None saves nothing.
    writer: where the logged numbers go as well.
    hooks: by global step; see the module docstring. A checkpoint is saved before each.

  Raises:
    FloatingPointError: naming the metric and the step that turned NaN or infinite; nothing is saved over.
    KeyboardInterrupt: after Ctrl-C, once the step is finished and saved.
    SystemExit: with code 0, after SIGTERM, likewise.
    Exception: what `make_batches` and its batches raise, once the steps before are saved.
    OSError: where the disk has no room for a checkpoint at the start or at the end; one between is tried again later.
  """
  hooks = hooks or {}
  if checkpoint is not None:
    checkpoint.check_space(state)
  progress = _Progress(settings, start, checkpoint, writer)
  with _Signals() as signals:
    batches = make_batches(start) if start < settings.stop else iter(())
    for step in range(start, settings.stop + 1):
      if step in hooks:
        if step > start:
          progress.save(step, state, wait=True)
        try:
          state = signals.immediately(lambda step=step, state=state: hooks[step](state))
        except (KeyboardInterrupt, SystemExit):
          progress.say_how_to_resume(step)
          raise
        progress.restart_clock()
      if step == settings.stop:
        break
      try:
        batch = progress.fetch(batches)
      except Exception:  # no more data: a folder may turn out to be broken after days
        if step > start:
          progress.save(step, state, wait=True)
          progress.say_how_to_resume(step)
        raise
      state, metrics = step_fn(state, batch, step)
      progress.after(step + 1, state, metrics)
      if signals.received:
        progress.save(step + 1, state, required=True)
        progress.say_how_to_resume(step + 1)
        signals.leave()
    if settings.stop > start:
      progress.save(settings.stop, state, required=True)
  return state


class _Progress:
  """Everything around the steps: clocks, means, the guard against NaN, log lines, saves."""

  def __init__(
    self,
    settings: Settings,
    start: int,
    checkpoint: checkpoint_lib.Checkpointer | None,
    writer: writer_lib.Writer | None,
  ):
    self._settings, self._start = settings, start
    self._checkpoint, self._writer = checkpoint, writer
    self._unread: collections.deque[tuple[int, Metrics]] = collections.deque()
    self._values: dict[str, list[float]] = {}
    self._seconds: list[float] = []  # per step since the last log line
    self._waited = 0.0
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves out of the step times whatever happened since the last step."""
    self._mark = time.perf_counter()

  def fetch(self, batches: Iterator[Any]) -> Any:
    """The next batch; the time it takes counts as data wait."""
    begin = time.perf_counter()
    batch = next(batches)
    self._waited += time.perf_counter() - begin
    return batch

  def after(self, step: int, state: State, metrics: Metrics) -> None:
    """Books a dispatched step; `step` updates are now complete."""
    self._unread.append((step, metrics))
    first = step == self._start + 1
    if first or len(self._unread) > _RUN_AHEAD:
      jax.block_until_ready(self._unread[-1 if first else -1 - _RUN_AHEAD][1])
    self._seconds.append(time.perf_counter() - self._mark)
    self.restart_clock()
    if first:
      logging.info("%s: first step in %.1f s with compilation", self._settings.phase(step - 1), self._seconds[0])
    if step % self._settings.log_every == 0 or step == self._settings.stop:
      self._log(step)
    elif first:
      self._seconds, self._waited = [], 0.0  # compilation belongs to no rate
    if step % self._settings.save_every == 0 and step < self._settings.stop:
      self.save(step, state)

  def save(self, step: int, state: State, *, wait: bool = False, required: bool = False) -> None:
    """Saves a step unless its metrics are not finite; a full disk ends the run only where `required`."""
    self._read_metrics()
    if self._checkpoint is None:
      return
    try:
      self._checkpoint.save(step, state, self._settings.meta(step) | {"data_step": step})
      if wait or required:
        self._checkpoint.wait()
    except OSError as e:
      if required:
        raise
      logging.error("%s; training goes on, the next try is at step %d", e, step + self._settings.save_every)
    self.restart_clock()

  def say_how_to_resume(self, step: int) -> None:
    """The last line of an interrupted run."""
    saved = self._checkpoint.latest if self._checkpoint else None
    where = "nothing is saved" if saved is None else f"step {saved} is saved"
    logging.warning("stopped at step %d, %s; go on with: %s", step, where, self._settings.resume_command)

  def _read_metrics(self) -> None:
    steps = [step for step, _ in self._unread]
    fetched = jax.device_get([metrics for _, metrics in self._unread])
    self._unread.clear()
    for step, metrics in zip(steps, fetched, strict=True):
      for name, value in metrics.items():
        if not np.isfinite(value):
          last = self._checkpoint.latest if self._checkpoint else None
          raise FloatingPointError(
            f"{self._settings.phase(step - 1)}: {name} is {value} at step {step}; the last checkpoint is of step"
            f" {last}; try a lower config.optimizer.learning_rate in another --workdir"
          )
        self._values.setdefault(name, []).append(float(value))

  def _log(self, step: int) -> None:
    self._read_metrics()
    means = {name: float(np.mean(values)) for name, values in self._values.items()}
    total = max(sum(self._seconds), 1e-9)
    rate = max(len(self._seconds), 1) / total
    # The median leaves out the steps that compiled.
    left = (self._settings.stop - step) * float(np.median(self._seconds or [0.0]))
    saved = self._checkpoint.latest if self._checkpoint else None
    logging.info(
      "%s %d/%d %s | %.1f img/s %.3g s/step data %.0f%% ETA %s ckpt %s",
      self._settings.phase(step - 1),
      step,
      self._settings.stop,
      " ".join(f"{name} {value:.4g}" for name, value in means.items()),
      rate * self._settings.batch_size,
      1 / rate,
      100 * self._waited / total,
      _clock(left),
      "-" if saved is None else saved,
    )
    if self._writer is not None:
      speed = {"time/images_per_second": rate * self._settings.batch_size, "time/data_wait": self._waited / total}
      self._writer.scalars(step, means | speed)
    self._values, self._seconds, self._waited = {}, [], 0.0


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Signals:
  """Turns Ctrl-C and SIGTERM into a request to stop after the step; a second Ctrl-C stops at once.

  Handlers exist only in the main thread of a process; elsewhere nothing is installed.
  """

  def __init__(self):
    self.received: int | None = None
    self._at_once = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "_Signals":
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, unused_frame: Any) -> None:
    again = self.received is not None
    self.received = number
    if self._at_once or again:
      self.leave()
    logging.warning("finishing this step, then saving; once more stops at once")

  def immediately(self, work: Callable[[], State]) -> State:
    """Runs work that has nothing to save: a signal stops it at once."""
    self._at_once = True
    try:
      if self.received is not None:
        self.leave()
      return work()
    finally:
      self._at_once = False

  def leave(self) -> None:
    """Raises what the signal asks for."""
    raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(0)
