"""A step over 8 devices is the step on one; in its own process, because devices are counted when JAX starts."""

from absl.testing import absltest, parameterized

from tests.multi_device import reports, step_cases

# Relative to the largest value of an array after two steps in float32: sums in another order.
_TOLERANCE = 1e-5
_QKV = "block_00/attention/image/qkv/kernel"


class ShardedStepTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.report = reports.read("step_cases")

  @parameterized.parameters(*step_cases.CASES)
  def test_equals_the_step_on_one_device(self, name):
    found = self.report[name]
    self.assertLess(found["state"], _TOLERANCE)
    self.assertLess(found["metrics"], _TOLERANCE)
    self.assertEqual(found["traces"], 1, "the state should leave a step as it came")

  @parameterized.parameters(("data", 1), ("fsdp", 1 / 8), ("tensor", 1 / 2), ("mix", 1 / 4))
  def test_parameters_optimiser_average_and_teacher_are_split_alike(self, name, share):
    parts = self.report[name]["parts"]
    owners = [path.removesuffix(_QKV) for path in parts if path.endswith(_QKV)]
    self.assertLen(owners, 0 if share == 1 else 4, owners)
    for path in owners:
      self.assertEqual(parts[path + _QKV], share)

  def test_frozen_blocks_do_not_move(self):
    self.assertEqual(self.report["frozen"], 0.0)

  def test_muon_shares_its_work_within_a_slice(self):
    found = self.report["muon"]
    self.assertLess(found["apart"], _TOLERANCE)
    # Two shapes, two axes, there and back; gathered everywhere instead, every device would multiply all of them.
    self.assertEqual(found["exchanges"], 2 * 2 * 2)
    self.assertEqual(found["across"], [], "weights are the same along data: nothing needs to be sent")

  def test_the_layout_is_told(self):
    self.assertEqual(self.report["mix"]["described"], "8 devices (cpu): data 2 x fsdp 2 x tensor 2; 1 processes")


if __name__ == "__main__":
  absltest.main()
