"""Attention split over devices is attention on one; in its own process, because devices are counted when JAX starts."""

from absl.testing import absltest, parameterized

from tests.multi_device import attention_cases, reports

_TOLERANCE = 1e-5


class SplitAttentionTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.report = reports.read("attention_cases")

  @parameterized.product(text=attention_cases.TEXTS, per_head=(0, 1))
  def test_sparse_attention_with_lists_of_every_kind(self, text, per_head):
    self.assertLess(self.report[f"sparse {text} {per_head}"], _TOLERANCE)

  @parameterized.product(name=tuple(attention_cases.SPLITS), per_head=(0, 1))
  def test_explicit_axes_need_not_be_named(self, name, per_head):
    apart, specs = self.report[f"explicit {per_head}"][name]
    self.assertLess(apart, _TOLERANCE)
    batch, _, heads = (*attention_cases.SPLITS[name], None, None, None)[:3]
    for spec in specs["tokens"]:
      self.assertEqual((*spec, None, None, None)[:3], (batch, None, heads))
    self.assertEqual((*specs["lists"], None, None)[:2], (batch, heads if per_head else None))

  @parameterized.product(
    axes=("explicit", "mixed"),
    call=("sparse", "dense"),
    case=("mesh not set", "one axis named", "inside a partial shard_map"),
  )
  def test_explicit_axes_beside_others(self, axes, call, case):
    apart, gathers = self.report[axes][f"{call}, {case}"]
    self.assertLess(apart, _TOLERANCE)
    self.assertEqual(gathers, 0)

  @parameterized.parameters(*attention_cases.MASKS)
  def test_dense_attention_of_many_tokens_needs_no_other_device(self, mask):
    apart, gathers = self.report[f"dense {mask}"]
    self.assertLess(apart, _TOLERANCE)
    self.assertEqual(gathers, 0)


if __name__ == "__main__":
  absltest.main()
