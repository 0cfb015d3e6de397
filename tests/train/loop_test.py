"""The loop: exact resume, hooks, interruption, the NaN guard, log lines, events."""

import functools
import glob
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.train import checkpoint, guard, loop, throughput, writer

_STOP = 12


def _initial():
  return {"w": jnp.zeros(4), "mu": jnp.zeros(4), "key": jax.random.key(0)}


@functools.partial(jax.jit, donate_argnums=0)
def _train(state, batch):
  key, noise = jax.random.split(state["key"])
  mu = 0.9 * state["mu"] + batch + 0.1 * jax.random.normal(noise, (4,))
  return {"w": state["w"] - 0.1 * mu, "mu": mu, "key": key}, {"loss": jnp.sum(mu**2)}


def step_fn(state, batch, step):
  del step
  return _train(state, batch)


def make_batches(start):
  return (jnp.full(4, float(step)) for step in itertools.count(start))


def _settings(**changes):
  return loop.Settings(
    **{"stop": _STOP, "log_every": 4, "save_every": 5, "batch_size": 8, "resume_command": "python -m x"} | changes
  )


def start_or_resume(workdir, step=step_fn, settings=None, **options):
  """What a task does: restore, then run; returns (state, meta)."""
  with checkpoint.Checkpointer(workdir, keep=20) as saver:
    restored = saver.restore_latest(_initial())
    state, meta = restored or (_initial(), {"data_step": 0})
    state = loop.run(
      state, make_batches, step, settings or _settings(), start=meta["data_step"], checkpoint=saver, **options
    )
  return state, meta


def _bytes(state):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(state | {"key": jax.random.key_data(state["key"])})]


def _stop_at(step_number, how):
  def step(state, batch, number):
    if number == step_number:
      how()
    return step_fn(state, batch, number)

  return step


def _die_after_commit(workdir):
  while not os.path.isdir(f"{workdir}/checkpoints/5"):  # saves go on in the background
    time.sleep(0.01)
  os.kill(os.getpid(), signal.SIGKILL)


class LoopTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = self.enterContext(tempfile.TemporaryDirectory())
    self.straight = loop.run(_initial(), make_batches, step_fn, _settings())

  def _steps(self):
    return sorted(int(s) for s in os.listdir(f"{self.workdir}/checkpoints") if s.isdigit())

  @parameterized.parameters((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit))
  def test_interrupted_run_saves_says_how_to_resume_and_resumes_bit_exactly(self, number, exception):
    before = signal.getsignal(number)
    with self.assertLogs(level="WARNING") as logs, self.assertRaises(exception) as caught:
      start_or_resume(self.workdir, _stop_at(6, lambda: os.kill(os.getpid(), number)))
    if exception is SystemExit:
      self.assertEqual(caught.exception.code, 0)
    self.assertEqual(signal.getsignal(number), before)
    self.assertEqual(self._steps(), [5, 7])
    self.assertIn("stopped at step 7, step 7 is saved; go on with: python -m x", logs.output[-1])
    state, meta = start_or_resume(self.workdir)
    self.assertEqual(meta["data_step"], 7)
    self.assertEqual(_bytes(state), _bytes(self.straight))
    self.assertEqual(self._steps(), [5, 7, 10, 12])

  def test_a_resumed_run_finds_its_programs(self):
    update = jax.jit(_train)
    for settings in (_settings(stop=6), _settings()):
      start_or_resume(self.workdir, lambda state, batch, _: update(state, batch), settings)
    self.assertEqual(update._cache_size(), 1)

  def test_a_run_that_raises_resumes_from_the_last_interval(self):
    def fail():
      raise RuntimeError("device lost")

    with self.assertRaisesRegex(RuntimeError, "device lost"):
      start_or_resume(self.workdir, _stop_at(8, fail))
    state, meta = start_or_resume(self.workdir)
    self.assertEqual(meta["data_step"], 5)
    self.assertEqual(_bytes(state), _bytes(self.straight))

  def test_data_that_gives_up_loses_no_step(self):
    original = make_batches

    def batches(start):
      yield from itertools.islice(original(start), 8)
      raise ValueError("data.path: 3 of 20 pictures are broken")

    with mock.patch.dict(globals(), make_batches=batches), self.assertLogs(level="WARNING") as logs:
      with self.assertRaisesRegex(ValueError, "3 of 20 pictures"):
        start_or_resume(self.workdir)
    self.assertIn("stopped at step 8, step 8 is saved", logs.output[-1])
    state, meta = start_or_resume(self.workdir)
    self.assertEqual(meta["data_step"], 8)
    self.assertEqual(_bytes(state), _bytes(self.straight))

  def test_a_killed_process_resumes_bit_exactly(self):
    code = (
      "import sys; from tests.train import loop_test as t;"
      "t.start_or_resume(sys.argv[1], t._stop_at(8, lambda: t._die_after_commit(sys.argv[1])))"
    )
    killed = subprocess.run([sys.executable, "-c", code, self.workdir], capture_output=True, check=False)
    self.assertEqual(killed.returncode, -signal.SIGKILL, killed.stderr)
    state, meta = start_or_resume(self.workdir)
    self.assertEqual(meta["data_step"], 5)
    self.assertEqual(_bytes(state), _bytes(self.straight))

  def test_second_signal_stops_within_the_step(self):
    def twice():
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)

    with self.assertRaises(KeyboardInterrupt):
      start_or_resume(self.workdir, _stop_at(6, twice))
    self.assertEqual(self._steps(), [5])

  def test_a_finished_run_takes_no_more_steps(self):
    start_or_resume(self.workdir)
    state, meta = start_or_resume(self.workdir, _stop_at(0, self.fail))
    self.assertEqual(meta["data_step"], _STOP)
    self.assertEqual(_bytes(state), _bytes(self.straight))

  def test_hooks_run_at_their_step_before_it_and_change_the_state(self):
    seen = []

    def hook(state):
      seen.append(self._steps())
      return state | {"w": state["w"] + 100}

    state, _ = start_or_resume(self.workdir, hooks={0: lambda s: s, 7: hook, _STOP: lambda s: s | {"mu": s["mu"] * 0}})
    self.assertEqual(seen, [[5, 7]])  # the state before the hook is on disk
    np.testing.assert_allclose(state["w"], self.straight["w"] + 100, rtol=1e-5)
    np.testing.assert_array_equal(state["mu"], 0)

  def test_an_interrupted_hook_runs_again_from_the_state_before_it(self):
    def interrupted(state):
      del state
      os.kill(os.getpid(), signal.SIGINT)
      self.fail("the hook went on")

    with self.assertLogs(level="WARNING") as logs, self.assertRaises(KeyboardInterrupt):
      start_or_resume(self.workdir, hooks={7: interrupted})
    self.assertIn("stopped at step 7, step 7 is saved", logs.output[-1])
    calls = []
    state, _ = start_or_resume(self.workdir, hooks={7: lambda s: calls.append(7) or s})
    self.assertEqual(calls, [7])
    self.assertEqual(_bytes(state), _bytes(self.straight))

  def test_nan_is_named_and_not_saved(self):
    def step(state, batch, number):
      state, metrics = step_fn(state, batch, number)
      return state, metrics | {"loss": jnp.where(number == 8, jnp.nan, metrics["loss"])}

    with self.assertRaisesRegex(FloatingPointError, "train: loss is nan at step 9; the last checkpoint is of step 5"):
      start_or_resume(self.workdir, step)
    self.assertEqual(self._steps(), [5])

  def _poisoned(self, state, batch, number):
    """A step that batch 8 turns into NaN, and all after it."""
    state, metrics = step_fn(state, batch + jnp.where(batch == 8, jnp.nan, 0), number)
    return state, metrics

  def test_a_rollback_goes_back_to_the_last_checkpoint_and_passes_over_the_batches_since(self):
    told = []
    settings = _settings(guard=guard.Guard(rollbacks=1), restored=told.append)
    with self.assertLogs(level="WARNING") as logs:
      start_or_resume(self.workdir, self._poisoned, settings)
    self.assertIn("loss is nan at step 9; ", logs.output[0])
    self.assertIn("back to step 5, passing over batches 5 to 8", logs.output[0])
    want = _initial()
    for batch in [*range(5), *range(9, 16)]:
      want, _ = _train(want, jnp.full(4, float(batch)))
    with checkpoint.Checkpointer(self.workdir) as saver:
      state, meta = saver.restore_latest(_initial())
    self.assertEqual(_bytes(state), _bytes(want))
    self.assertEqual((meta["data_step"], meta["skipped"]), (16, 4))
    self.assertEqual([m["data_step"] for m in told], [5])
    # Another start goes on from there with the data of there.
    settings = _settings(stop=14)
    with checkpoint.Checkpointer(self.workdir) as saver:
      state = loop.run(state, make_batches, step_fn, settings, start=12, skipped=meta["skipped"], checkpoint=saver)
    for batch in (16, 17):
      want, _ = _train(want, jnp.full(4, float(batch)))
    self.assertEqual(_bytes(state), _bytes(want))

  def test_rollbacks_end(self):
    def always(state, batch, number):
      state, metrics = step_fn(state, batch, number)
      return state, metrics | {"loss": jnp.where(number >= 7, jnp.inf, metrics["loss"])}

    with self.assertRaisesRegex(FloatingPointError, "loss is inf at step 8; the last checkpoint is of step 5"):
      start_or_resume(self.workdir, always, _settings(guard=guard.Guard(rollbacks=2)))
    with tempfile.TemporaryDirectory() as other, self.assertRaisesRegex(FloatingPointError, "is of step None"):
      start_or_resume(other, always, _settings(guard=guard.Guard(rollbacks=2), save_every=100))

  def test_updates_left_out_belong_to_no_mean_and_too_many_end_the_run(self):
    def step(state, batch, number):
      left_out = 4 <= number < 8
      return state, {"loss": np.nan if left_out else 2.0, "skipped": float(left_out)}

    events = mock.Mock()
    with self.assertLogs(level="WARNING") as logs:
      loop.run(_initial(), make_batches, step, _settings(log_every=6), writer=events)
    self.assertIn("update 5 is left out, loss nan", logs.output[0])
    (_, values), _ = events.scalars.call_args_list[0]
    self.assertEqual(values["loss"], 2.0)
    self.assertAlmostEqual(values["skipped"], 2 / 6)
    with self.assertRaisesRegex(FloatingPointError, "3 updates in a row are left out, loss nan, at step 7"):
      loop.run(_initial(), make_batches, step, _settings(guard=guard.Guard(most_skipped=3)))

  def test_flops_are_asked_for_where_the_peak_is_known(self):
    with mock.patch.object(throughput, "peak_flops", return_value=1e3), self.assertLogs(level="INFO") as logs:
      loop.run(_initial(), make_batches, step_fn, _settings(flops=lambda n: 1.0))
    self.assertRegex("".join(logs.output), r"s/step MFU [\d.]+% data")
    with mock.patch.object(throughput, "peak_flops", return_value=None):
      loop.run(_initial(), make_batches, step_fn, _settings(flops=self.fail))

  def test_log_lines_hold_means_rates_and_the_last_checkpoint(self):
    with self.assertLogs(level="INFO") as logs:
      start_or_resume(self.workdir, settings=_settings(phase=lambda s: "a" if s < 8 else "b"))
    lines = [r.getMessage() for r in logs.records if "img/s" in r.getMessage()]
    self.assertLen(lines, 3)
    speed = r"[\d.]+ img/s [\d.e-]+ s/step data \d+% mem [\d.]+ GB ETA \d+:\d\d ckpt (-|\d+)"
    for line in lines:
      self.assertRegex(line, rf"^(a|b) \d+/12 loss [\d.e+]+ \| {speed}$")
    self.assertEqual([re.sub(" loss.*", "", line) for line in lines], ["a 4/12", "a 8/12", "b 12/12"])
    self.assertEndsWith(lines[0], "ckpt -")
    self.assertEndsWith(lines[1], "ckpt 5")

  def test_metrics_that_come_and_go_are_averaged_over_their_own_steps(self):
    def step(state, batch, number):
      return state, {"even" if number % 2 == 0 else "odd": float(number)}

    events = mock.Mock()
    loop.run(_initial(), make_batches, step, _settings(), writer=events)
    (number, values), _ = events.scalars.call_args_list[0]
    self.assertEqual(number, 4)
    self.assertEqual((values["even"], values["odd"]), (1.0, 2.0))

  def test_a_line_for_every_step_has_sober_rates(self):
    with self.assertLogs(level="INFO") as logs:
      loop.run(_initial(), make_batches, step_fn, _settings(stop=2, log_every=1))
    rates = [float(re.search(r"([\d.]+) img/s", line)[1]) for line in logs.output if "img/s" in line]
    self.assertLen(rates, 2)
    self.assertLess(rates[0], 1e7)

  def test_no_room_for_the_first_checkpoint_stops_before_training(self):
    with mock.patch.object(checkpoint.shutil, "disk_usage", return_value=mock.Mock(free=10)):
      with self.assertRaisesRegex(OSError, "make room"):
        start_or_resume(self.workdir, _stop_at(0, self.fail))

  def test_a_disk_that_fills_up_on_the_way_does_not_end_the_run(self):
    free = {"now": 10**9}

    def step(state, batch, number):
      free["now"] = 10 if 3 <= number <= 6 else 10**9
      return step_fn(state, batch, number)

    with mock.patch.object(checkpoint.shutil, "disk_usage", side_effect=lambda _: mock.Mock(free=free["now"])):
      with self.assertLogs(level="ERROR") as logs:
        state, _ = start_or_resume(self.workdir, step)
    self.assertIn("the next try is at step 10", logs.output[0])
    self.assertEqual(_bytes(state), _bytes(self.straight))
    self.assertEqual(self._steps(), [10, 12])

  def test_events_are_written(self):
    with writer.Writer(self.workdir) as events:
      start_or_resume(self.workdir, writer=events)
      events.image(12, "grid", np.zeros((8, 8, 3), np.uint8))
      events.text(12, "report", "| a | b |")
      with self.assertRaisesRegex(ValueError, "'grid': expected uint8"):
        events.image(12, "grid", np.zeros((8, 8, 3)))
    (path,) = glob.glob(f"{self.workdir}/events.out.tfevents.*")
    with open(path, "rb") as f:
      content = f.read()
    for word in (b"loss", b"time/images_per_second", b"grid", b"| a | b |"):
      self.assertIn(word, content)

  def test_bad_settings_are_named(self):
    with self.assertRaisesRegex(ValueError, "log_every: expected a positive number, got 0"):
      _settings(log_every=0)


if __name__ == "__main__":
  absltest.main()
