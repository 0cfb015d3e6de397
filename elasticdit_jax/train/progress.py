"""Everything around the steps of the loop: clocks, means, log lines, the bar of a terminal, saves."""

import collections
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from elasticdit_jax.train import checkpoint as checkpoint_lib
from elasticdit_jax.train import guard as guard_lib
from elasticdit_jax.train import throughput
from elasticdit_jax.train import writer as writer_lib

State = Any
Metrics = Mapping[str, jax.Array]
_RUN_AHEAD = 2  # steps queued on the device: enough to hide the host, few enough to stop soon
_BAR_SECONDS = 0.2


class Progress:
  """Books the steps of a run from `start` on, having passed over `skipped` batches; see loop.run for the others."""

  def __init__(
    self,
    settings: Any,
    start: int,
    skipped: int,
    checkpoint: checkpoint_lib.Checkpointer | None,
    writer: writer_lib.Writer | None,
  ):
    self._settings, self._start, self._skipped = settings, start, skipped
    self._checkpoint, self._writer = checkpoint, writer
    self._unread: collections.deque[tuple[int, Metrics]] = collections.deque()
    self._values: dict[str, list[float]] = {}
    self._seconds: list[float] = []  # per step since the last log line
    self._waited, self._flops = 0.0, 0.0
    self._left_out = 0  # updates in a row
    self._peak = throughput.peak_flops() if settings.flops else None
    self._bar = Bar(settings.stop)
    self.restart_clock()

  @property
  def unfinished(self) -> list[Metrics]:
    """Metrics of steps that may still be running."""
    return [metrics for _, metrics in self._unread]

  def restart_clock(self) -> None:
    """Leaves out of the step times whatever happened since the last step."""
    self._mark = time.perf_counter()

  def clear(self) -> None:
    """Takes the bar off the terminal, for other lines."""
    self._bar.clear()

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
    if self._peak:
      self._flops += self._settings.flops(step - 1)
      self.restart_clock()  # the first call of a kind traces a program
    if first:
      logging.info("%s: first step in %.1f s with compilation", self._settings.phase(step - 1), self._seconds[0])
    if step % self._settings.log_every == 0 or step == self._settings.stop:
      self._log(step)
    elif first:
      self._seconds, self._waited, self._flops = [], 0.0, 0.0  # compilation belongs to no rate
    self._bar.show(step, self._settings.phase(step - 1), self._left(step))
    if step % self._settings.save_every == 0 and step < self._settings.stop:
      self.save(step, state)

  def save(self, step: int, state: State, *, wait: bool = False, required: bool = False) -> None:
    """Saves a step unless its metrics are not finite; a full disk ends the run only where `required`."""
    self._read_metrics()
    if self._checkpoint is None:
      return
    meta = self._settings.meta(step) | {"data_step": step + self._skipped, "skipped": self._skipped}
    try:
      self._checkpoint.save(step, state, meta)
      if wait or required:
        self._checkpoint.wait()
    except FloatingPointError as e:
      raise guard_lib.DivergedError(str(e), step) from e
    except OSError as e:
      if required:
        raise
      logging.error("%s; training goes on, the next try is at step %d", e, step + self._settings.save_every)
    self.restart_clock()

  def say_how_to_resume(self, step: int) -> None:
    """The last line of an interrupted run."""
    self.clear()
    saved = self._checkpoint.latest if self._checkpoint else None
    where = "nothing is saved" if saved is None else f"step {saved} is saved"
    logging.warning("stopped at step %d, %s; go on with: %s", step, where, self._settings.resume_command)

  def _read_metrics(self) -> None:
    steps = [step for step, _ in self._unread]
    fetched = jax.device_get(self.unfinished)
    self._unread.clear()
    for step, metrics in zip(steps, fetched, strict=True):
      if metrics.get("skipped"):
        self._leave_out(step, metrics)
        continue
      self._left_out = 0
      for name, value in metrics.items():
        if not np.isfinite(value):
          raise self._diverged(step, f"{name} is {value}")
        self._values.setdefault(name, []).append(float(value))

  def _leave_out(self, step: int, metrics: Metrics) -> None:
    """An update that was left out: its loss belongs to no mean."""
    self._left_out += 1
    self._values.setdefault("skipped", []).append(1.0)
    logging.warning("%s: update %d is left out, loss %.4g", self._settings.phase(step - 1), step, metrics["loss"])
    if self._left_out >= self._settings.guard.most_skipped:
      raise self._diverged(step, f"{self._left_out} updates in a row are left out, loss {metrics['loss']:.4g},")

  def _diverged(self, step: int, what: str) -> guard_lib.DivergedError:
    self.clear()
    last = self._checkpoint.latest if self._checkpoint else None
    return guard_lib.DivergedError(
      f"{self._settings.phase(step - 1)}: {what} at step {step}; the last checkpoint is of step {last}; try a lower"
      " config.optimizer.learning_rate in another --workdir",
      step,
    )

  def _left(self, step: int) -> float:
    """Seconds to the end; the median leaves out the steps that compiled."""
    return (self._settings.stop - step) * float(np.median(self._seconds[-20:] or [0.0]))

  def _log(self, step: int) -> None:
    self._read_metrics()
    means = {name: float(np.mean(values)) for name, values in self._values.items()}
    total = max(sum(self._seconds), 1e-9)
    rate = max(len(self._seconds), 1) / total
    left = (self._settings.stop - step) * float(np.median(self._seconds or [0.0]))
    saved = self._checkpoint.latest if self._checkpoint else None
    speed = {
      "time/images_per_second": rate * self._settings.batch_size,
      "time/data_wait": self._waited / total,
      "time/memory_gb": throughput.memory_gb(),
    }
    if self._peak:
      speed["time/mfu"] = self._flops / total / self._peak
    self.clear()
    logging.info(
      "%s %d/%d %s | %.1f img/s %.3g s/step%s data %.0f%% mem %.1f GB ETA %s ckpt %s",
      self._settings.phase(step - 1),
      step,
      self._settings.stop,
      " ".join(f"{name} {value:.4g}" for name, value in means.items()),
      speed["time/images_per_second"],
      1 / rate,
      f" MFU {100 * speed['time/mfu']:.1f}%" if self._peak else "",
      100 * speed["time/data_wait"],
      speed["time/memory_gb"],
      clock(left),
      "-" if saved is None else saved,
    )
    if self._writer is not None:
      self._writer.scalars(step, means | speed)
    self._values, self._seconds, self._waited, self._flops = {}, [], 0.0, 0.0


class Bar:
  """One line of a terminal that is written over; nothing anywhere else, nor on other processes than the first.

  Args:
    stop: total number of steps.
  """

  def __init__(self, stop: int):
    self._stop = stop
    self._on = sys.stderr is not None and sys.stderr.isatty() and jax.process_index() == 0
    self._shown = False
    self._next = 0.0

  def show(self, step: int, phase: str, left: float) -> None:
    """Draws it anew, a few times a second at most.

    Args:
      step: completed updates.
      phase: what is shown before the bar.
      left: seconds to the end.
    """
    now = time.monotonic()
    if not self._on or now < self._next:
      return
    self._next, self._shown = now + _BAR_SECONDS, True
    done = 30 * step // self._stop
    sys.stderr.write(f"\r{phase} [{'#' * done}{'.' * (30 - done)}] {step}/{self._stop} ETA {clock(left)}\x1b[K")
    sys.stderr.flush()

  def clear(self) -> None:
    """Takes it off."""
    if self._shown:
      self._shown = False
      sys.stderr.write("\r\x1b[K")
      sys.stderr.flush()


def clock(seconds: float) -> str:
  """Seconds as "4:05" or "1:02:03"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
