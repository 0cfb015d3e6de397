"""The benchmark of sparse attention: its table on tiny shapes, its ideal, and that its dense baseline is attention."""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import attention_baselines  # noqa: E402
import sparse_attention  # noqa: E402

OPTIONS = argparse.Namespace(baselines="chunked", repeats=1, calls=1, devices=1, max_mib=100.0)


def cells(line):
  return [cell.strip() for cell in line.strip("|").split("|")]


class TableTest(absltest.TestCase):
  def test_one_line_per_case_under_the_header(self):
    cases = [sparse_attention.Case(256, rho, "float32", True, heads=1, head_dim=8, text=64) for rho in (0.5, 0.75)]
    header, rule, *lines = sparse_attention.run(cases, OPTIONS, header=True)
    self.assertEqual(len(cells(header)), len(cells(rule)))
    self.assertLen(lines, 2)
    for case, line in zip(cases, lines, strict=True):
      row = dict(zip(cells(header), cells(line), strict=True))
      self.assertEqual(row["kept"], str(case.kept))
      self.assertEqual(row["pass"], "forward+backward")
      cpu, wall = map(float, row["ours"].split(" / "))
      self.assertGreater(wall, 0)
      self.assertGreaterEqual(cpu, 0)
      self.assertEqual(row["dot_product_attention"], "–")  # not asked for
      self.assertTrue(row["of ideal"].endswith("%"))

  def test_candidates_beyond_the_memory_limit_are_left_out(self):
    limited = argparse.Namespace(**{**vars(OPTIONS), "max_mib": 0.0})
    qkv = [np.zeros((1, 64, 8), np.float32)] * 3
    options = {"backward": False, "args": limited, "dtype": "float32"}
    candidate = sparse_attention._jax_candidate(qkv, attention_baselines.chunked, **options)
    self.assertIsNone(candidate.call)
    self.assertIn("MiB", candidate.cell())

  def test_ideal_counts_text(self):
    case = sparse_attention.Case(4096, 0.75, "float32", False, heads=8)
    self.assertEqual(case.kept, 16)
    self.assertAlmostEqual(case.ideal, 4224**2 / (4096 * (128 + 1024) + 128 * 4224))


class ChunkedTest(parameterized.TestCase):
  @parameterized.parameters((False, None), (True, None), (False, 64))
  def test_equals_dot_product_attention_with_gradients(self, upcast, most_rows):
    self.assertEqual(attention_baselines.chunk_rows(192, most_rows), most_rows or 192)
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(1, 192, 2, 8)), jnp.float32) for _ in range(3)]

    def run(attend):
      return jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv))), (0, 1, 2))(*qkv)

    found = run(lambda *qkv: attention_baselines.chunked(*qkv, upcast=upcast, most_rows=most_rows))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(run(jax.nn.dot_product_attention)), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


if __name__ == "__main__":
  absltest.main()
