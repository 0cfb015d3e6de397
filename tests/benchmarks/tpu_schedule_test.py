"""Counting the bundles of a TPU schedule: what runs in every step, what may, and what loops."""

import importlib.util
import pathlib

from absl.testing import absltest

_PATH = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "tpu_schedule.py"
_SPEC = importlib.util.spec_from_file_location("tpu_schedule", _PATH)
tpu_schedule = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tpu_schedule)

SCHEDULE = """
= control target key start
     0   :  { %7 = vsyncpa [#allocation3], 0  ;;  %s0 = inlined_call_operand.hbm [shape: bf16[256,128], index: 0]
   0x1   :  { %9 = vsyncpa [#allocation3 + $0x1], 0 }
   0x2 LB: > { %s1 = sadd.s32 1, %s2 }
   0x3   : > { %5 = sbr.rel (%p1) target = $region4 }
   0x4   : > { %6 = dma.hbm_to_vmem [thread:$0]  %s3 /*
base_bounds: (16, 1) */ }
   0x5 PF: > { %v1 = vld [vmem:[%s3]] }
   0x6   : > { %7 = sbr.rel (%p2) target = $region8 }
   0x7   : > { %v2 = vld [vmem:[%s4]] }
   0x8 LB: >> { %v3 = vld [vmem:[%s5]] }
   0x9   : >> { %8 = sbr.rel (!%p3) target = $region9 }
   0xa   : > { %v4 = vld [vmem:[%s6]] }
   0xb PF: > { %v5 = vld [vmem:[%s7]] }
   0xc   : > { %v6 = vld [vmem:[%s8]] }
   0xd   : > { %18 = sbr.rel (!%p4) target = $region2 }
   0xe   :  {}
"""


class TpuScheduleTest(absltest.TestCase):
  def test_counts(self):
    schedule = tpu_schedule.read(SCHEDULE)
    self.assertEqual(schedule.straight, 7)
    self.assertEqual(schedule.regions, (tpu_schedule.Region(1, ()), tpu_schedule.Region(2, (2,))))
    self.assertEqual(schedule.every_step(), 8)
    self.assertEqual(schedule.main_path(), 9)
    self.assertEqual(schedule.long_regions(trips=10), 22)

  def test_long_conditional_code_is_told_from_copies(self):
    bundle = "   0x7   : > { %v2 = vld [vmem:[%s4]] }\n"
    for times, every_step, apart in ((60, 67, 2), (100, 7, 102)):
      copies = SCHEDULE.replace("   0x5 PF", bundle * (times - 1) + "   0x5 PF")
      schedule = tpu_schedule.read(copies)
      self.assertEqual(schedule.every_step(), every_step)
      self.assertEqual(schedule.long_regions(trips=0), apart)


if __name__ == "__main__":
  absltest.main()
