"""Waiting for scores: a stop ends it, and the run goes on from there later; errors come through."""

import os
import signal
import tempfile
import threading
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from elasticdit_jax.train import checkpoint, interrupt, loop, rewards, scoring

_PICTURE = np.zeros((1, 8, 8, 3), np.uint8)


def _reward(source):
  return rewards.Reward({("red",): source}, {"red": 1.0})


def _count(images, prompts, metadata):
  del metadata
  return {"red": [len(images) + len(prompt) / 3 for prompt in prompts]}


class _Server:
  """A source that stays away until it is told otherwise; the first to ask gets `asked` noticed."""

  def __init__(self):
    self.asked, self.back = threading.Event(), threading.Event()

  def __call__(self, images, prompts, metadata):
    self.asked.set()
    self.back.wait()
    return _count(images, prompts, metadata)


class ScoringTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(scoring, "ROUND_SECONDS", 0.05))

  def test_scores_come_in_the_order_of_the_pictures(self):
    reward = _reward(_count)
    pending = [reward.submit(np.repeat(_PICTURE, 2, axis=0), ["a", "abcdefg"]), reward.submit(_PICTURE, [""])]
    found = scoring.gather(reward, pending, [np.array([2, 0]), np.array([1])], 3)
    np.testing.assert_array_equal(found["red"], np.float32([2 + 7 / 3, 1, 2 + 1 / 3]))
    self.assertEqual(scoring.gather(reward, [], [], 0)["red"].shape, (0,))

  def test_an_error_does_not_wait_for_a_server_that_is_away(self):
    server = _Server()
    self.addCleanup(server.back.set)

    def wrong(images, prompts, metadata):
      del images, prompts, metadata
      raise ValueError("no such prompt")

    reward = rewards.Reward({("red",): server, ("blue",): wrong}, {"red": 1.0, "blue": 1.0})
    with self.assertRaisesRegex(ValueError, "no such prompt"):
      scoring.settle(reward, [reward.submit(_PICTURE, ["a"])])

  def test_what_one_process_cannot_do_none_goes_on_without(self):
    self.assertEqual(scoring.together(lambda: 3), 3)
    with self.assertRaisesRegex(ValueError, "no such server"):
      scoring.together(mock.Mock(side_effect=ValueError("no such server")))
    told = ['{"done": true}', '{"done": true, "error": "no such server", "usage": true}']
    described = mock.patch.object(scoring.distributed, "described", str)
    with described, mock.patch.object(scoring.distributed, "exchange", return_value=told):
      with self.assertRaisesRegex(ValueError, "1.* failed: no such server"):
        scoring.together(lambda: 3)

  def _train(self, workdir, server, away=0):
    """Five steps that add their scores up; from step `away` on the server is gone, and SIGTERM comes meanwhile."""
    reward = _reward(server)

    def step(state, batch, number):
      del batch
      if number == away:
        server.back.clear()
        server.asked.clear()
        threading.Thread(target=lambda: (server.asked.wait(), os.kill(os.getpid(), signal.SIGTERM))).start()
      pending = reward.submit(_PICTURE, ["a" * number])
      (scores,) = scoring.settle(reward, [pending])
      return {"sum": state["sum"] * 1.1 + scores["red"][0]}, {"loss": 0.0}

    settings = loop.Settings(5, log_every=5, save_every=5, batch_size=1, resume_command="again")
    with checkpoint.Checkpointer(workdir) as saver:
      state, meta = saver.restore_latest({"sum": jnp.float32(0)}) or ({"sum": jnp.float32(0)}, {"data_step": 0})
      start = meta["data_step"]
      try:
        return loop.run(state, lambda n: iter(range(n, 9)), step, settings, start=start, checkpoint=saver), start
      except SystemExit as e:
        return e.code, saver.latest

  def test_sigterm_while_the_server_is_away_saves_and_leaves_and_the_run_goes_on(self):
    folder, server = self.enterContext(tempfile.TemporaryDirectory()), _Server()
    server.back.set()
    self.addCleanup(server.back.set)
    whole, _ = self._train(f"{folder}/whole", server, away=-1)
    with self.assertLogs(level="WARNING") as logs:
      self.assertEqual(self._train(f"{folder}/run", server, away=3), (0, 3))
    self.assertIn("stopped at step 3, step 3 is saved; go on with: again", logs.output[-1])
    server.back.set()
    state, start = self._train(f"{folder}/run", server, away=-1)
    self.assertEqual(start, 3)
    self.assertEqual(np.asarray(state["sum"]).tobytes(), np.asarray(whole["sum"]).tobytes())
    # Before the first step there is nothing to save.
    self.assertEqual(self._train(f"{folder}/new", server, away=0), (0, None))

  def test_nobody_asks_nobody_stops(self):
    self.assertFalse(interrupt.requested())


if __name__ == "__main__":
  absltest.main()
