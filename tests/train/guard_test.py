"""Spikes, watchdog, profile window, the bar of a terminal."""

import dataclasses
import glob
import io
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.train import guard, progress, state, step


def _state(value, mean=0.0):
  x = {"w": jnp.full(3, float(value))}
  return state.TrainState(jnp.int32(value), x, {"mu": x["w"]}, x, jax.random.key(0), loss_mean=jnp.float32(mean))


def _update(mean, loss, norm=1.0):
  """The state and metrics after an update from weights 1 to weights 2."""
  metrics = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}
  return step._without_spike(_state(1, mean), dataclasses.replace(_state(2), loss_mean=None), metrics, 3.0)


class SpikeTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.0, 5.0, 1.0, False, 5.0),  # the first loss is the mean
    (1.0, 2.9, 1.0, False, 1 + 0.02 * 1.9),
    (1.0, 3.1, 1.0, True, 1 + 0.02 * 2.0),
    (1.0, np.inf, 1.0, True, 1.0),
    (1.0, np.nan, 1.0, True, 1.0),
    (1.0, 1.0, np.nan, True, 1.0),
    (0.0, np.nan, 1.0, True, 0.0),
  )
  def test_an_update_far_above_the_mean_or_not_finite_is_left_out(self, mean, loss, norm, left_out, moved):
    new, metrics = _update(mean, loss, norm)
    kept = 1.0 if left_out else 2.0
    for tree in (new.params, new.opt_state, new.ema):
      np.testing.assert_array_equal(jax.tree.leaves(tree)[0], np.full(3, kept))
    self.assertEqual(int(new.step), 2)  # the data go on
    self.assertEqual(float(metrics["skipped"]), float(left_out))
    self.assertAlmostEqual(float(new.loss_mean), moved, places=5)

  def test_a_loss_that_stays_high_passes_in_the_end(self):
    mean, left_out = 1.0, 0
    for _ in range(200):
      new, metrics = _update(mean, 10.0)
      mean, left_out = float(new.loss_mean), left_out + int(metrics["skipped"])
    self.assertBetween(left_out, 20, 50)
    self.assertEqual(int(metrics["skipped"]), 0)


class WatchdogTest(absltest.TestCase):
  def test_stacks_of_a_step_that_hangs_are_told(self):
    with self.assertLogs(level="ERROR") as logs, guard.Watchdog(0.1) as watchdog:
      watchdog.beat("step 7")
      self._hang()
    self.assertIn("after step 7 on process 0 of 1", logs.output[0])
    self.assertIn("in _hang", logs.output[0])

  def _hang(self):
    time.sleep(0.5)

  def test_steps_that_end_and_no_watchdog_are_silent(self):
    for seconds in (0.0, 5.0):
      with self.assertNoLogs(level="ERROR"), guard.Watchdog(seconds) as watchdog:
        watchdog.beat("step 1")


class ProfileTest(parameterized.TestCase):
  def test_the_steps_of_the_window_are_profiled(self):
    directory = self.enterContext(tempfile.TemporaryDirectory())
    window = guard.ProfileWindow((2, 4), directory)
    with mock.patch.object(jax.profiler, "stop_trace", wraps=jax.profiler.stop_trace) as stop:
      for number in range(6):
        window.before(number, [jnp.ones(3)])
        self.assertEqual(stop.call_count, int(number >= 4))
      window.close()
    self.assertEqual(stop.call_count, 1)
    self.assertLen(glob.glob(f"{directory}/**/*.xplane.pb", recursive=True), 1)

  @parameterized.parameters(("", None), ("100:110", (100, 110)))
  def test_window(self, text, expected):
    self.assertEqual(guard.parse_window(text, "f"), expected)

  @parameterized.parameters("5", "5:", ":5", "5:5", "7:5", "a:b", "-1:5")
  def test_bad_window_is_named(self, text):
    with self.assertRaisesRegex(ValueError, f"config.train.profile: expected 'FIRST:STOP' .* got '{text}'"):
      guard.parse_window(text, "config.train.profile")


class BarTest(absltest.TestCase):
  def _shown(self, terminal):
    out = io.StringIO()
    out.isatty = lambda: terminal
    with mock.patch.object(progress.sys, "stderr", out):
      bar = progress.Bar(200)
      bar.show(50, "uwco 2-warmup", 65.0)
      bar.show(51, "uwco 2-warmup", 64.0)  # too soon after the one before
      bar.clear()
    return out.getvalue()

  def test_a_terminal_has_one_and_nothing_else_does(self):
    text = self._shown(True)
    self.assertStartsWith(text, "\ruwco 2-warmup [#######.......................] 50/200 ETA 1:05")
    self.assertEndsWith(text, "\r\x1b[K")
    self.assertNotIn("51/200", text)
    self.assertEqual(self._shown(False), "")


if __name__ == "__main__":
  absltest.main()
