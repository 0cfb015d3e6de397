"""What the compiler's text is read for, the roofline, and the table of docs/pods.md; nothing is compiled here."""

import argparse
import pathlib
import sys

from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT / "benchmarks"))

import accelerators  # noqa: E402
import aot_pods  # noqa: E402
import hlo_collectives  # noqa: E402
import pods_table  # noqa: E402

_RESULT = {
  "chips": 256,
  "chip": "TPU v5 lite",
  "layout": "256 devices",
  "trace_s": 10.0,
  "compile_s": 300.0,
  "batch": 1024,
  "hbm": {"argument": 2**30, "output": 2**30, "temp": 6 * 2**30, "generated_code": 0},
  "total": 7 * 2**30,
  "fits": True,
  "flops": 197e12,
  "model_flops": 150e12,
  "hbm_traffic": 819e9 / 2,
  "collectives": {"all-gather": {"count": 3, "bytes": 4e9, "ici": 20e9, "dcn": 0.0}},
}


def _one(line, devices, slices=1):
  ((_, found),) = hlo_collectives.count(line, devices, slices).items()
  return found


class CollectivesTest(parameterized.TestCase):
  @parameterized.parameters(
    ("  %x = f32[16,64]{1,0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add", 4096, 2 * 4096 * 3 / 4),
    ("  %x = bf16[16,64] all-gather(%a), replica_groups=[1,4]<=[4], dimensions={0}", 2048, 2048 * 3 / 4),
    ("  ROOT %x = f32[4,64] reduce-scatter(%a), replica_groups=[2,2]<=[4], to_apply=%add", 1024, 2048 / 2),
    ("  %x = (f32[4], f32[16]) all-gather-start(%a), replica_groups=[1,4]<=[4], dimensions={0}", 64, 64 * 3 / 4),
    ("  %x = ((f32[4], f32[8]), (f32[16], f32[32])) all-gather-start(%a, %b), replica_groups=[1,4]<=[4]", 192, 144),
    ("  %x = (f32[4], f32[8]) all-reduce(%a, %b), replica_groups=[1,4]<=[4], to_apply=%add", 48, 2 * 48 * 3 / 4),
    ("  %x = f32[8] collective-permute(%a), source_target_pairs={{0,1},{1,0}}", 32, 32),
    (
      "  %x = f32[8] all-reduce(%a), replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a','b'}, x={}",
      32,
      32,
    ),
    ("  %x = f32[8] all-reduce(%a), replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}, x={}", 32, 32),
    ("  %x = f32[8] all-reduce(%a), replica_groups=[4,1]<=[4], to_apply=%add", 32, 0),
  )
  def test_bytes_and_what_goes_over_the_wires(self, line, size, sent):
    found = _one(line, 4)
    self.assertEqual((found["count"], found["bytes"], found["dcn"]), (1, size, 0))
    self.assertAlmostEqual(found["ici"], sent)

  def test_between_slices_the_runtime_reduces_what_it_is_sent(self):
    line = (
      "  %send.38 = (f32[2,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%bitcast.77, %after-all.38), channel_id=60,"
      ' frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    ((kind, found),) = hlo_collectives.count(line, 32, 2).items()
    self.assertEqual(kind, "all-reduce between slices")
    self.assertEqual(found, {"count": 1, "bytes": 8192, "ici": 0.0, "dcn": 8192.0})  # half of it there, half back

  def test_without_groups_all_devices_of_a_slice_take_part(self):
    self.assertAlmostEqual(_one("%x = f32[1024] all-gather(%a), dimensions={0}", 8, 2)["ici"], 4096 * 3 / 4)

  def test_kinds_add_up_and_other_lines_do_not_count(self):
    text = "\n".join(
      [
        "  %a = f32[2] all-reduce(%x), replica_groups=[1,2]<=[2], to_apply=%add",
        "  %b = f32[2] all-reduce-start(%x), replica_groups=[1,2]<=[2], to_apply=%add",
        "  %c = f32[2] all-reduce-done(%b)",
        "  %all-gather.3 = f32[2] fusion(%c)",
      ]
    )
    found = hlo_collectives.count(text, 2)
    self.assertEqual(list(found), ["all-reduce"])
    self.assertEqual((found["all-reduce"]["count"], found["all-reduce"]["bytes"]), (2, 16))


class RooflineTest(absltest.TestCase):
  def test_every_part_at_its_peak(self):
    got = aot_pods.roofline(_RESULT, accelerators.CHIPS["TPU v5 lite"])
    self.assertEqual(got, {"compute": 1.0, "hbm": 0.5, "ici": 0.1, "dcn": 0.0})

  def test_report_says_estimate_and_whether_it_fits(self):
    case = aot_pods.Case("v5e-256", "L", 1024, 4, 16, 1, 0.8416, "full", "tdvae2", "adamw", "O1")
    text = "\n".join(aot_pods.report(case, _RESULT | {"roofline": {"compute": 1.0, "ici": 0.25}}))
    self.assertIn("7.00 GiB of 16.00: fits", text)
    self.assertIn("an estimate: compute 1000 ms, ici 250 ms; 1000 ms if all overlap, 1250 ms if nothing does", text)
    self.assertIn("MFU by that estimate: 76% and 61%", text)
    self.assertIn("FAILED: no room", aot_pods.report(case, {"error": "no room"})[1])

  def test_cases_of_the_command_line(self):
    args = argparse.Namespace(topologies="v5e-256,v5p-512", sizes="S,L", pixels="512,1024", per_chip=4, fsdp=16)
    args.__dict__.update(tensor=1, rho=0.8, remat="full", vae="tdvae2", optimizer="adamw", level="O1")
    found = aot_pods.cases(args)
    self.assertLen(found, 8)
    self.assertEqual({(c.pixels, c.per_chip) for c in found}, {(512, 16), (1024, 4)})  # as many tokens


class TableTest(absltest.TestCase):
  def _case(self, **changes):
    return {"size": "L", "pixels": 1024, "topology": "v5e-256", "per_chip": 4} | changes

  def test_lines_are_replaced_added_and_sorted(self):
    text = f"before\n{pods_table.BEGIN}\n{pods_table.END}\nafter\n"
    result = _RESULT | {"roofline": {"compute": 1.0, "ici": 0.25}}
    for case in (self._case(), self._case(size="S"), self._case(pixels=512, per_chip=16)):
      text = pods_table.merge(text, case, result)
    text = pods_table.merge(text, self._case(), result | {"total": 20 * 2**30, "fits": False})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    self.assertEqual([line[2:].split(" | ")[:2] for line in lines[2:]], [["S", "1024"], ["L", "512"], ["L", "1024"]])
    self.assertIn("20.0 **too much** | 16.0 | 1.00 | 197.0 | 20.0 | – | 1000–1250 | 300 |", lines[-1])
    self.assertLen({line.count("|") for line in lines}, 1)
    self.assertTrue(text.startswith("before\n") and text.endswith("after\n"))

  def test_a_program_that_does_not_compile_has_a_line_too(self):
    line = pods_table.row(self._case(), {"error": "RESOURCE_EXHAUSTED"})
    self.assertIn("does not compile: RESOURCE_EXHAUSTED", line)
    self.assertEqual(line.count("|"), pods_table.HEADER.count("|"))

  def test_the_page_has_a_table(self):
    text = (_ROOT / "docs" / "pods.md").read_text()
    inside = text.split(pods_table.BEGIN)[1].split(pods_table.END)[0].strip().splitlines()
    self.assertEqual(inside[0], pods_table.HEADER)
    self.assertIn("compiles for TPU, not run on TPU", text)

  def test_a_file_without_a_place_for_it_is_refused(self):
    with self.assertRaisesRegex(ValueError, "--table: the file needs the lines <!-- aot_pods: begin"):
      pods_table.merge("nothing", self._case(), _RESULT)


if __name__ == "__main__":
  absltest.main()
