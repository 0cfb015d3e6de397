"""The benchmark of the training step: its table on a small backbone, its FLOPs, and that steps train."""

import argparse
import pathlib
import sys
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import train_step  # noqa: E402

from elasticdit_jax.models import dit  # noqa: E402

_OPTIONS = argparse.Namespace(
  size="small",
  depth=0,
  skip=1,
  pixels=64,
  vae_factors="8",
  vae="",
  batch=2,
  rho=0.0,
  text=4,
  dtype="float32",
  remat="none",
  repeats=1,
  no_torch=True,
)


_ROUTES = train_step._routes


class TrainStepTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    cfg = dit.DiTConfig(32, 3, 16, text_dim=8, text_length=4, block_side=2)
    self.enterContext(mock.patch.dict(dit.SIZES, {"small": cfg}))

  def test_one_line_per_step_under_the_header(self):
    with mock.patch.object(train_step, "_routes", lambda *_: _ROUTES(*_)[:1]):  # one program is enough
      _, _, header, rule, line = train_step.run(_OPTIONS)
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in (header, rule, line)]
    self.assertLen({len(row) for row in cells}, 1)
    row = dict(zip(cells[0], cells[2], strict=True))
    self.assertEqual((row["step"], row["of ideal"]), ("max-f8", "100.0%"))
    self.assertGreater(float(row["images/s"]), 0)
    self.assertGreater(float(row["MiB"]), 0)

  def test_ratios_are_those_of_the_least_cpu_time(self):
    def timed(name, seconds, full="", share=0.0):
      return train_step.Timed(name, lambda: None, 2e9, lambda: None, full, share, seconds)

    lines = train_step.table(
      [
        timed("max-f8", [(4.0, 3.0), (2.0, 9.0)], "max-f8", 1.0),
        timed("lite-f8", [(1.5, 1.0)], "max-f8", 0.5),
        timed(train_step.TORCH, [(3.0, 2.0)]),
      ],
      batch=6,
      peaks=[1e9, 4e9],
    )
    full, lite, torch = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    self.assertEqual(full, ["max-f8", "2.00", "2000", "3000", "0.002", "25.0%", "–", "100.0%", "1.50"])
    self.assertEqual(lite[-2:], ["150.0%", "–"])
    self.assertEqual(torch[-2:], ["–", "–"])

  def test_flops_are_three_times_a_forward_pass(self):
    """Matrices of a block times its tokens, attention over all pairs, twice again for the gradients."""
    cfg = train_step.config(_OPTIONS)
    batch, codecs = train_step._batch(cfg, _OPTIONS), {8: train_step.Averaged(8)}
    flow = train_step.step.FlowConfig(0.0, 1.0, 3.0, 16)
    full, lite, both = (
      train_step.model_flops(cfg, flow, dit.init_shapes(cfg), codecs, batch, group)
      for group in train_step._routes(cfg, _OPTIONS)
    )
    width, text, image, images = 32, 4, 16, 2
    matrices = 2 * (3 + 1 + 8) * width * width * images
    attention = 4 * width * (text + image) ** 2 * images
    # The middle block has both streams complete; lite skips it.
    self.assertAlmostEqual((full - lite) / (3 * (matrices * (text + image) + attention)), 1.0, delta=0.02)
    self.assertEqual(both, full + lite)

  def test_sparse_routes_beside_dense_ones(self):
    options = argparse.Namespace(**{**vars(_OPTIONS), "rho": 0.5, "vae_factors": "8,16"})
    groups = train_step._routes(train_step.config(options), options)
    self.assertLen(groups, 12)
    self.assertEqual([r.name for r in groups[-1]], ["sparse-max-f16", "sparse-lite-f16"])
    self.assertEqual(groups[-1][0].sparsity, (0.5,) * 3)

  def test_stand_in_for_a_vae(self):
    image = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    got = train_step.Averaged(8).encode(jax.numpy.asarray(image))
    self.assertEqual(got.shape, (2, 2, 3, 16))
    np.testing.assert_allclose(got[1, 1, 2, 4], image[1, 8:, 16:, 1].mean(), rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
