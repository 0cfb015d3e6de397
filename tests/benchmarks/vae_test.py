"""The benchmark of the autoencoders: compute within one percent of the paper's table, and turns of timing."""

import os
import sys
from unittest import mock

from absl.testing import absltest, parameterized

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "benchmarks"))
import vae  # noqa: E402


class ComputeTest(parameterized.TestCase):
  @parameterized.parameters(*vae.PAPER)
  def test_within_one_percent_of_the_paper(self, name):
    published = vae.PAPER[name][1]
    self.assertAlmostEqual(vae.teraflops(name, fused=False, attention=False) / published, 1.0, delta=0.01)

  @parameterized.parameters(("tdvae1-f8", 3.02), ("tdvae2-f8", 1.46))
  def test_fused(self, name, expected):
    self.assertAlmostEqual(vae.teraflops(name, fused=True, attention=True), expected, delta=0.01)

  def test_true_count_has_the_products_of_attention(self):
    # Encoder and decoder: q k^T and weights v over 16384 positions of 512 channels.
    counts = [vae.teraflops("flux", fused=False, attention=a) for a in (True, False)]
    self.assertAlmostEqual(counts[0] - counts[1], 2 * 4 * 16384**2 * 512 / 1e12, places=3)


class TimingTest(absltest.TestCase):
  def test_the_fastest_turn_counts_and_the_first_does_not(self):
    clock = iter([0, 1, 1, 11, 11, 14, 14, 19])
    with mock.patch.object(vae.time, "perf_counter", lambda: next(clock)):
      times = vae.measure({"a": lambda: None}, 3)
    self.assertEqual(times["a"][1], 3)


if __name__ == "__main__":
  absltest.main()
