"""An epoch of alignment over 8 devices is the epoch on one; in its own process, because devices are counted early."""

import numpy as np
from absl.testing import absltest

from tests.multi_device import reports

# Relative to the largest value of an array, in float32: sums in another order.
_TOLERANCE = 1e-5
_KERNEL = "block_00/image_mlp/down/kernel"


class ShardedEpochTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.report = reports.read("grpo_cases")

  def test_draws_and_scores_what_one_device_does(self):
    self.assertGreater(np.std(self.report["advantage"]), 0.5)
    for name, apart in self.report["drawn"].items():
      # A picture that rounds the other way moves its score by 1 / 255 / numbers of a picture; the group magnifies it.
      self.assertLess(apart, 1e-3 if name == "advantage" else _TOLERANCE, name)

  def test_learns_what_one_device_does(self):
    self.assertGreater(self.report["moved"], 0)
    self.assertLess(self.report["state"], _TOLERANCE)
    for name in ("kl", "anchor"):
      self.assertGreater(self.report["metrics"][name][1], 1e-5, name)
    for name, (got, want) in self.report["metrics"].items():
      np.testing.assert_allclose(got, want, rtol=_TOLERANCE, atol=1e-6, err_msg=name)

  def test_adapters_reference_and_rows_are_split_and_stay_where_they_are(self):
    self.assertTrue(self.report["stays"])
    parts = self.report["parts"]
    self.assertEqual(parts[f"reference/{_KERNEL}"], 1 / 4)  # fsdp 2 x tensor 2
    for owner in ("params", "ema", "opt_state/0/trace"):
      self.assertEqual([parts[f"{owner}/{_KERNEL}/{part}"] for part in "ab"], [1 / 2, 1 / 2], owner)
    self.assertEqual(self.report["rows"], 1 / 4)  # data 2 x fsdp 2


if __name__ == "__main__":
  absltest.main()
