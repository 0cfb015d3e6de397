"""When an alignment run should stop, on made-up records."""

from absl.testing import absltest

from elasticdit_jax.train import watch

LIMITS = watch.Limits(loss=0.05, diversity=0.5, patience=2)


def records(*rows):
  """(held-out reward, training reward, loss, diversity) of one route each."""
  return [
    {
      "step": 10 * i,
      "reward": reward,
      "training_reward": training,
      "routes": {"max-f8": {"loss": loss, "diversity": diversity}, "lite-f8": {"loss": 0.3, "diversity": 0.2}},
    }
    for i, (reward, training, loss, diversity) in enumerate(rows)
  ]


class JudgeTest(absltest.TestCase):
  def test_a_run_that_improves_goes_on(self):
    rows = records((0.5, None, 0.3, 0.2), (0.6, 0.55, 0.301, 0.19), (0.65, 0.6, 0.31, 0.18))
    self.assertEqual(watch.judge(rows, LIMITS), watch.Verdict(2, ""))
    self.assertEqual(watch.judge(rows[:1], LIMITS), watch.Verdict(0, ""))

  def test_held_out_reward_that_falls_while_the_training_reward_rises(self):
    rows = records((0.5, None, 0.3, 0.2), (0.6, 0.6, 0.3, 0.2), (0.55, 0.7, 0.3, 0.2), (0.58, 0.8, 0.3, 0.2))
    self.assertEqual(watch.judge(rows[:3], LIMITS), watch.Verdict(1, ""))
    verdict = watch.judge(rows, LIMITS)
    self.assertEqual(verdict.best, 1)
    self.assertIn("below that of step 10 2 times while the training reward rose", verdict.stop)

  def test_held_out_reward_that_only_falls(self):
    rows = records((0.5, None, 0.3, 0.2), (0.45, 0.6, 0.3, 0.2), (0.4, 0.7, 0.3, 0.2), (0.35, 0.8, 0.3, 0.2))
    self.assertEqual(watch.judge(rows[:3], LIMITS), watch.Verdict(0, ""))
    verdict = watch.judge(rows, LIMITS)
    self.assertEqual(verdict.best, 0)
    self.assertIn("below that of step 0 2 times while the training reward rose", verdict.stop)
    rows[3]["training_reward"] = 0.6
    self.assertEqual(watch.judge(rows, LIMITS), watch.Verdict(0, ""))

  def test_both_rewards_that_fall_are_noise_or_a_low_point(self):
    rows = records((0.5, None, 0.3, 0.2), (0.6, 0.6, 0.3, 0.2), (0.55, 0.5, 0.3, 0.2), (0.58, 0.55, 0.3, 0.2))
    self.assertEqual(watch.judge(rows, LIMITS).stop, "")

  def test_quality_leaves_the_band(self):
    rows = records((0.5, None, 0.3, 0.2), (0.6, 0.6, 0.31, 0.2), (0.9, 0.9, 0.316, 0.2))
    verdict = watch.judge(rows, LIMITS)
    self.assertEqual(verdict.best, 1)
    self.assertEqual(verdict.stop, "the held-out flow-matching loss of max-f8 is 0.3160, above the limit 0.3150")
    thin = watch.judge(records((0.5, None, 0.3, 0.2), (0.6, 0.6, 0.3, 0.09)), LIMITS)
    self.assertEqual((thin.best, thin.stop), (0, "the diversity of max-f8 is 0.0900, below the limit 0.1000"))

  def test_numbers_that_are_none_are_in_no_band(self):
    for loss, diversity in ((float("nan"), 0.2), (0.3, float("nan"))):
      verdict = watch.judge(records((0.5, None, 0.3, 0.2), (0.9, 0.9, loss, diversity)), LIMITS)
      self.assertEqual(verdict.best, 0)
      self.assertIn("is nan", verdict.stop)

  def test_of_looks_that_chance_may_have_ordered_the_last_one_counts(self):
    rows = records((0.5, None, 0.3, 0.2), (0.62, 0.6, 0.3, 0.2), (0.605, 0.7, 0.3, 0.2), (0.59, 0.8, 0.3, 0.2))
    for row in rows:
      row["error"] = 0.02
    self.assertEqual(watch.judge(rows, LIMITS), watch.Verdict(2, ""))
    rows[3]["routes"]["max-f8"]["loss"], rows[3]["reward"] = 0.4, 0.61  # beyond its limits
    self.assertEqual(watch.judge(rows, LIMITS).best, 2)
    for row in rows:
      del row["error"]
    self.assertEqual(watch.judge(rows[:3], LIMITS).best, 1)

  def test_given_weights_that_nothing_has_beaten_stay(self):
    rows = records((0.5, None, 0.3, 0.2), (0.51, 0.6, 0.3, 0.2), (0.495, 0.7, 0.3, 0.2))
    for row in rows:
      row["error"] = 0.02
    self.assertEqual(watch.judge(rows, LIMITS).best, 1)  # the last one is below what was given
    rows[1]["reward"] = 0.5
    self.assertEqual(watch.judge(rows, LIMITS).best, 0)

  def test_given_weights_that_are_broken_are_no_start(self):
    with self.assertRaisesRegex(ValueError, "config.init: the given weights are no start: .*max-f8 is nan"):
      watch.judge(records((0.5, None, float("nan"), 0.2)), LIMITS)

  def test_equal_rewards_keep_the_earlier_model(self):
    rows = records((0.6, None, 0.3, 0.2), (0.6, 0.55, 0.3, 0.2))
    self.assertEqual(watch.judge(rows, LIMITS).best, 0)


if __name__ == "__main__":
  absltest.main()
