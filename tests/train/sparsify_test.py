"""From a finished model to sparse routes over its weights: measured, allocated, saved, drawn, and trained on."""

import json
import os
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from configs import sparsify as sparsify_config
from elasticdit_jax import elastic
from elasticdit_jax.data import pipeline as data_pipeline
from elasticdit_jax.evals import profile, validation
from elasticdit_jax.generate import Pipeline, parse_routes
from elasticdit_jax.interop import model_dir, weights
from elasticdit_jax.train import importance, sparsify, uwco
from tests.evals import tiny_model
from tests.train import small


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def _losses(model):
  (batch,) = data_pipeline.validation_batch(data_pipeline.ScenesSource(1, 64), model.encoder, 2, 1)
  return validation.make_validation(model.cfg, model.codecs, batch, bins=1)


class SensitivityTest(parameterized.TestCase):
  def test_curves_come_from_one_program_and_are_those_of_the_routes(self):
    model = tiny_model.make((8,))
    losses, base = _losses(model), model.routes["lite-f8"]
    before = validation._by_time._cache_size()
    found = importance.measure_sensitivity(losses, model.params, base)
    self.assertEqual(validation._by_time._cache_size() - before, 1)
    self.assertEqual(found.num_blocks, 4)
    self.assertEqual([sorted(curve) for curve in found.curves], [[1, 2, 4]] * 2)
    self.assertAlmostEqual(found.base, losses.loss(model.params, base), places=4)
    route = elastic.sparse_route(base, (4, 1), 4)
    self.assertAlmostEqual(found.curves[1][1], losses.loss(model.params, route), places=4)
    self.assertNotAlmostEqual(found.curves[1][1], found.base, places=4)

  @parameterized.parameters((16, 1, (1, 2, 4, 8)), (16, 2, (2, 4, 8)), (6, 1, (1, 2, 4)), (2, 1, (1,)), (1, 1, ()))
  def test_levels(self, blocks, least, expected):
    self.assertEqual(importance.kept_levels(blocks, least), expected)

  def test_bad_levels(self):
    model = tiny_model.make((8,))
    for levels in ((), (0,), (4,)):
      with self.assertRaisesRegex(ValueError, r"levels: expected counts in 1..3 of the 4 blocks of 'max-f8'"):
        importance.measure_sensitivity(_losses(model), model.params, model.routes["max-f8"], levels)


class _Fake:
  """Losses in which every dropped block of layer i costs 10 ** i, on a grid of 16 blocks."""

  cfg = tiny_model.make(()).cfg

  def num_blocks(self, route):
    return 16

  def loss(self, params, route, bypass=(), kept=None):
    return float(sum(10**i * (16 - kept[i]) for i in route.active))


class StudyTest(absltest.TestCase):
  base = elastic.standard_routes(3, [1])["max-f8"]

  def test_three_routes(self):
    found = sparsify.study(_Fake(), None, self.base)
    # 8 of 48 blocks for 84.16 %; the last layer needs them most.
    self.assertEqual(found.kept, {"max-f8": (16,) * 3, "d3-s75-f8": (4, 4, 4), "d3-s83-f8": (1, 1, 6)})
    self.assertAlmostEqual(found.realised("d3-s83-f8"), 40 / 48)
    self.assertEqual(profile.kept_blocks(found.aware, (8, 8), 2), (1, 1, 6))
    self.assertLess(found.losses["d3-s83-f8"], found.losses["even"])
    routes = sparsify.add_routes({"max-f8": self.base}, [found])
    self.assertEqual(list(routes), ["max-f8", "d3-s75-f8", "d3-s83-f8", *sparsify.SECOND_NAMES])
    self.assertIs(routes["layer-aware-sparse"], found.aware)

  def test_skipped_blocks_take_no_budget(self):
    lite = elastic.standard_routes(3, [1])["lite-f8"]
    found = sparsify.study(_Fake(), None, lite, target=0.5)
    self.assertEqual(found.kept[found.aware.name], (1, 15))
    self.assertEqual(found.aware.name, "d2-s50-f8")
    self.assertEqual(found.aware.sparsity[1], 0.0)

  def test_routes_of_equal_sparsity_have_names_of_their_own(self):
    found = sparsify.study(_Fake(), None, self.base, target=0.75)
    self.assertEqual((found.vanilla.name, found.aware.name), ("d3-s75-f8", "d3-s75-f8-aware"))
    self.assertLen(found.kept, 3)
    # Nothing lies beyond one block per layer: both are the same route.
    same = sparsify.study(_Fake(), None, self.base, vanilla=0.95, target=0.99)
    self.assertEqual(same.vanilla, same.aware)

  def test_bad_input(self):
    sparse = elastic.sparse_route(self.base, (1, 1, 1), 4)
    for message, base, options in (
      ("target: expected a share of dropped blocks between 0 and 1, got 1.0", self.base, {"target": 1.0}),
      ("vanilla: expected a share", self.base, {"vanilla": 0}),
      ("routes: expected dense routes to start from, 'd3-s75-f8' is sparse", sparse, {}),
    ):
      with self.assertRaisesRegex(ValueError, message):
        sparsify.study(_Fake(), None, base, **options)


class TaskTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(small.small_backbone())
    self.folder = small.new_workdir(self)
    self.model = tiny_model.make()
    model_dir.save(self.folder.parent / "given" / "model", self.model)

  def _config(self, **changes):
    config = sparsify_config.get_config("debug").copy_and_resolve_references()
    with config.unlocked():
      config.update({"checkpoint": str(self.folder.parent / "given"), "validation": 2, "target": 0.6, **changes})
    return config.lock()

  def test_routes_over_the_same_weights_draw_and_train(self):
    sparsify.run(self._config(), str(self.folder))
    pipeline = Pipeline.load(self.folder)
    small.same(self, self.model.params, pipeline.model.params)
    names = parse_routes(",".join(sparsify.SECOND_NAMES), pipeline)
    self.assertEqual(names, ("max-f8", "d3-s75-f8", "d3-s58-f8"))
    self.assertEqual(list(pipeline.routes), [*self.model.routes, *names[1:]])
    dense, sparse = (pipeline("a red circle", n, steps=1, guidance=1) for n in ("baseline", "layer-aware-sparse"))
    self.assertGreater(np.abs(sparse.astype(int) - dense).max(), 0)
    (study,) = json.loads((self.folder / "sparsity.json").read_text())
    self.assertEqual(sum(study["routes"]["d3-s58-f8"]["kept"]), 5)
    self.assertAlmostEqual(study["routes"]["d3-s58-f8"]["realised"], 7 / 12)
    self.assertIn("realised sparsity 58.33 %", (self.folder / "sparsity.md").read_text())
    self._train_on(pipeline.model.routes["layer-aware-sparse"])

  def _train_on(self, route):
    """UWCO from those weights, with the sparse route by its second name."""
    workdir = self.folder.parent / "trained"
    config = small.config(workdir, recover=1)
    (workdir.parent / "vae" / "vae_f16.safetensors").unlink()
    with config.unlocked():
      config.init = str(self.folder)
      config.phases.recover.routes = "layer-aware-sparse"
    with mock.patch.object(uwco, "Snapshots") as snapshots:
      uwco.run(config, str(workdir))
      self.assertEqual(snapshots.return_value.take.call_args.args[3][route.name], route)
      # Resuming reads the routes back from the checkpoint.
      uwco.run(config, str(workdir))
    saved = elastic.load_routes(workdir / "model" / "routes.json")
    self.assertLen(saved, 6)
    self.assertEqual(saved["layer-aware-sparse"], route)
    before = weights.load_tree(self.folder / "model" / "dit.safetensors")
    after = weights.load_tree(workdir / "model" / "dit.safetensors")
    moved = before["block_01"]["image_mlp"]["up"]["kernel"] - after["block_01"]["image_mlp"]["up"]["kernel"]
    self.assertGreater(np.abs(moved).max(), 0)

  def test_bad_input_writes_nothing(self):
    for message, changes in (
      ("no model.json in /nowhere", {"checkpoint": "/nowhere"}),
      ("unknown route 'max-f9'", {"routes": "max-f9"}),
      ("'max-f16' has 1 blocks of 2x2 tokens .* nothing to drop", {"routes": "max-f16"}),
      ("'max-s50-f8' is sparse", {"routes": "max-s50-f8"}),
      ("config.validation: expected at least 1, got 0", {"validation": 0}),
      ("target: expected a share", {"target": 1.5}),
    ):
      with self.subTest(message), self.assertRaisesRegex(ValueError, message):
        sparsify.run(self._config(**changes), str(self.folder))
      self.assertFalse(self.folder.exists())
    os.makedirs(self.folder)
    (self.folder / "config.json").write_text("{}")
    with self.assertRaisesRegex(ValueError, "holds a training run, whose model would be replaced"):
      sparsify.run(self._config(), str(self.folder))

  def test_a_phase_names_a_route_that_nobody_has(self):
    workdir = self.folder.parent / "trained"
    config = small.config(workdir, recover=1)
    with config.unlocked():
      config.init = str(self.folder.parent / "given")
      config.phases.recover.routes = "d3-s84-f8"
    with self.assertRaisesRegex(ValueError, "unknown route 'd3-s84-f8'; .*routes.json beside the weights.*sparsify.py"):
      uwco.run(config, str(workdir))
    self.assertFalse(workdir.exists())


if __name__ == "__main__":
  absltest.main()
