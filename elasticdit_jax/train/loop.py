"""The training loop of every task: step, log, guard, save, stop.

  global step k  =  completed updates  =  position in the data, less the batches that rollbacks passed over

  start --> [hook k] --> batch k --> step_fn --> k + 1 --> log, guard --> save --> ... --> stop --> [hook stop]

A checkpoint at step k holds the state before the hook at k, and a run that starts at k runs that hook. So a hook (the
boundary of a phase: analysis, pictures, a change of state) happens again where it was interrupted, and never twice in a
run that was not.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging

from elasticdit_jax.train import checkpoint as checkpoint_lib
from elasticdit_jax.train import guard as guard_lib
from elasticdit_jax.train import interrupt, progress
from elasticdit_jax.train import writer as writer_lib

State = Any
Metrics = Mapping[str, jax.Array]
Hooks = Mapping[int, Callable[[State], State]]


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
    meta: completed updates -> JSON values stored with that checkpoint (phase, routes); "data_step" and "skipped" are
      added.
    restored: what to do with those values when a rollback went back to that checkpoint.
    flops: update number, from 0 -> its FLOPs over all devices, for MFU; asked only where the peak is known.
    guard: see guard.Guard.
    profile: (first, stop) steps to profile, or None.
    profile_dir: where to.
  """

  stop: int
  log_every: int
  save_every: int
  batch_size: int
  resume_command: str
  phase: Callable[[int], str] = lambda step: "train"
  meta: Callable[[int], dict[str, Any]] = lambda step: {}
  restored: Callable[[dict[str, Any]], None] = lambda meta: None
  flops: Callable[[int], float] | None = None
  guard: guard_lib.Guard = guard_lib.Guard()
  profile: tuple[int, int] | None = None
  profile_dir: str = "profile"

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
  skipped: int = 0,
  checkpoint: checkpoint_lib.Checkpointer | None = None,
  writer: writer_lib.Writer | None = None,
  hooks: Hooks | None = None,
) -> State:
  """Trains from step `start` to step `settings.stop`.

  Args:
    state: any tree of arrays; `step_fn` may donate it.
    make_batches: called with a position in the data, `start + skipped`; the batches from there on.
    step_fn: (state, batch, step) -> (state, scalar metrics by name). It chooses its compiled function by step. Where it
      waits for something outside, it may raise interrupt.StopError or FailedError before it has changed anything.
    settings: see `Settings`.
    start: completed steps, as restored.
    skipped: batches passed over by rollbacks so far, as restored.
    checkpoint: where to save; None saves nothing.
    writer: where the logged numbers go as well.
    hooks: by global step; see the module docstring. A checkpoint is saved before each.

  Raises:
    FloatingPointError: naming the metric and the step that turned NaN or infinite; nothing is saved over. With
      settings.guard.rollbacks, only once these are used up.
    KeyboardInterrupt: after Ctrl-C, once the step is finished and saved.
    SystemExit: with code 0, after SIGTERM, likewise.
    Exception: what `make_batches` and its batches raise, or the cause of a FailedError, once the steps before are
      saved.
    OSError: where the disk has no room for a checkpoint at the start or at the end; one between is tried again later.
  """
  if checkpoint is not None:
    checkpoint.check_space(state)
  state = jax.tree.map(_tied, state)
  template, left = jax.tree.map(_shape, state), settings.guard.rollbacks
  with guard_lib.Watchdog(settings.guard.hang_seconds) as watchdog:
    way = _Run(make_batches, step_fn, settings, checkpoint, writer, hooks or {}, watchdog)
    while True:
      try:
        return way.train(state, start, skipped)
      except guard_lib.DivergedError as e:
        if not left or checkpoint is None:
          raise
        what, end = str(e), e.step + skipped
      # Out here nothing holds the state that diverged: there is room for one only.
      del state
      restored = checkpoint.restore_latest(template)
      if restored is None:
        raise guard_lib.DivergedError(what, end)
      state, meta = restored
      start, left = meta["data_step"] - meta["skipped"], left - 1
      logging.warning("%s; back to step %d, passing over batches %d to %d", what, start, meta["data_step"], end - 1)
      skipped = end - start
      settings.restored(meta)


def _tied(x: Any) -> Any:
  """x, committed to where it is, as restored arrays are: else a resumed run would compile every step again."""
  return x if not isinstance(x, jax.Array) or x.committed else jax.device_put(x, x.sharding)


def _shape(x: Any) -> Any:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x


@dataclasses.dataclass(frozen=True)
class _Run:
  """One way from a step to the end; see `run`."""

  make_batches: Callable[[int], Iterator[Any]]
  step_fn: Callable[[State, Any, int], tuple[State, Metrics]]
  settings: Settings
  checkpoint: checkpoint_lib.Checkpointer | None
  writer: writer_lib.Writer | None
  hooks: Hooks
  watchdog: guard_lib.Watchdog

  def train(self, state: State, start: int, skipped: int) -> State:
    """Steps `start` to the end."""
    stop = self.settings.stop
    booked = progress.Progress(self.settings, start, skipped, self.checkpoint, self.writer)
    profile = guard_lib.ProfileWindow(self.settings.profile, self.settings.profile_dir)
    with interrupt.Signals() as signals:
      batches = self.make_batches(start + skipped) if start < stop else iter(())
      try:
        for step in range(start, stop):
          state = self._hook(state, step, start, booked, signals)
          profile.before(step, booked.unfinished)
          batch = self._fetch(batches, state, step, start, booked)
          state, metrics = self._step(state, batch, step, start, booked, signals)
          booked.after(step + 1, state, metrics)
          self.watchdog.beat(f"step {step + 1}")
          if signals.stop_now():
            booked.save(step + 1, state, required=True)
            booked.say_how_to_resume(step + 1)
            signals.leave()
        profile.before(stop, booked.unfinished)
        state = self._hook(state, stop, start, booked, signals)
      finally:
        booked.clear()
        profile.close()
        if hasattr(batches, "close"):
          batches.close()
      if stop > start:
        booked.save(stop, state, required=True)
    return state

  def _step(
    self, state: State, batch: Any, step: int, start: int, booked: progress.Progress, signals: interrupt.Signals
  ) -> tuple[State, Metrics]:
    try:
      return self.step_fn(state, batch, step)
    except (interrupt.StopError, interrupt.FailedError) as e:
      if step > start:
        booked.save(step, state, required=True)
      booked.say_how_to_resume(step)
      if isinstance(e, interrupt.FailedError):
        raise e.__cause__ from None
      signals.leave()

  def _hook(self, state: State, step: int, start: int, booked: progress.Progress, signals: interrupt.Signals) -> State:
    if step not in self.hooks:
      return state
    if step > start:
      booked.save(step, state, wait=True)
    booked.clear()
    try:
      state = signals.immediately(lambda: self.hooks[step](state))
    except (KeyboardInterrupt, SystemExit):
      booked.say_how_to_resume(step)
      raise
    booked.restart_clock()
    self.watchdog.beat(f"what happens at step {step}")
    return state

  def _fetch(self, batches: Iterator[Any], state: State, step: int, start: int, booked: progress.Progress) -> Any:
    try:
      return booked.fetch(batches)
    except Exception:  # no more data: a folder may turn out to be broken after days
      # Of several processes the others go on with their step: a save, which takes all, would wait for ever.
      if step > start and jax.process_count() == 1:
        booked.save(step, state, wait=True)
        booked.say_how_to_resume(step)
      raise
