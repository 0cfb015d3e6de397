"""Parameters: names that checkpoints rely on, counts of every size, and the paper's sizes by shape inference alone.

tests/testdata/dit_tree_tiny.json holds every parameter of the shipped size with its shape. A difference means that old
weights no longer load. Where that is intended, rewrite the file with

  UPDATE_GOLDEN=1 python -m unittest tests.models.dit_tree_test
"""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from elasticdit_jax.elastic import Route, standard_routes
from elasticdit_jax.interop import weights
from elasticdit_jax.models import dit
from tests.models import cases

GOLDEN = pathlib.Path(__file__).parent.parent / "testdata" / "dit_tree_tiny.json"

# Size -> blocks that flex-lite skips, parameters of flex-max and flex-lite in millions.
COUNTS = {
  "tiny": ((2, 5), 1.544, 1.207),
  "S": ((3, 7, 11), 105.2, 86.2),
  "B": ((3, 7, 11, 15, 19), 348.0, 277.1),
  "L": ((3, 7, 11, 15, 19, 23), 768.1, 616.9),
}


def _shapes(tree):
  return {name: list(leaf.shape) for name, leaf in weights.flatten(tree).items()}


class TreeTest(parameterized.TestCase):
  def test_golden_tree(self):
    shapes = _shapes(dit.init_shapes(dit.SIZES["tiny"]))
    if os.environ.get("UPDATE_GOLDEN"):
      lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(shape)}" for name, shape in shapes.items())
      GOLDEN.write_text(f"{{\n{lines}\n}}\n")
    golden = json.loads(GOLDEN.read_text())
    self.assertEqual(shapes, golden, "parameter names or shapes changed; see the docstring of this module")

  def test_the_tree_does_not_depend_on_route_grid_or_text_length(self):
    cfg = cases.CFG
    expected = dit.init_shapes(cfg)
    routes = [*standard_routes(4, [1, 2]).values(), Route("sparse", (True, False, True, True), (0.5,) * 4, 16)]
    for route, (rows, columns), tokens in zip(
      routes, ((8, 8), (6, 10), (2, 2), (4, 8), (4, 6)), (8, 8, 3, 8, 1), strict=True
    ):
      x, t, text, mask = cases.inputs(rows, columns)

      def init(x, t, text, mask, route=route):
        return dit.ElasticDiT(cfg).init(jax.random.key(0), x, t, text, mask, route=route)["params"]

      tree = jax.eval_shape(init, x, t, text[:, :tokens], mask[:, :tokens])
      self.assertEqual(_shapes(tree), _shapes(expected), route.name)

  def test_parameters_are_float32_whatever_the_compute_dtype(self):
    tree = dit.init_shapes(dataclasses.replace(cases.CFG, dtype="bfloat16", remat="full"))
    self.assertEqual(_shapes(tree), _shapes(dit.init_shapes(cases.CFG)))
    self.assertEqual({leaf.dtype for leaf in jax.tree.leaves(tree)}, {jnp.dtype("float32")})

  def test_the_last_block_has_no_text_output(self):
    blocks = {name: set(tree) for name, tree in dit.init_shapes(cases.CFG).items() if name.startswith("block_")}
    self.assertEqual(sorted(blocks), ["block_00", "block_01", "block_02", "block_03"])
    self.assertEqual(blocks["block_00"] - blocks["block_03"], {"text_out", "text_mlp"})

  @parameterized.parameters(*COUNTS)
  def test_parameter_counts(self, size):
    skipped, full, lite = COUNTS[size]
    cfg = dit.SIZES[size]
    shapes = dit.init_shapes(cfg)
    routes = standard_routes(cfg.depth, skipped)
    self.assertEqual(dit.count_parameters(shapes), dit.count_parameters(shapes, routes["max-f16"]))
    self.assertEqual(dit.count_parameters(shapes, routes["lite-f8"]), dit.count_parameters(shapes, routes["lite-f16"]))
    self.assertAlmostEqual(dit.count_parameters(shapes) / 1e6, full, delta=0.005 * full)
    self.assertAlmostEqual(dit.count_parameters(shapes, routes["lite-f8"]) / 1e6, lite, delta=0.005 * lite)

  @parameterized.parameters((8, "full"), (16, "dots_saveable"))
  def test_the_paper_size_at_1024_pixels(self, vae, remat):
    cfg = dataclasses.replace(dit.SIZES["L"], dtype="bfloat16", remat=remat)
    route = standard_routes(30, COUNTS["L"][0])[f"lite-f{vae}"]
    self.assertLen(route.active, 24)
    side, struct = 1024 // vae, jax.ShapeDtypeStruct
    args = (
      struct((2, side, side, 16), jnp.float32),
      struct((2,), jnp.float32),
      struct((2, 128, 2048), jnp.float32),
      struct((2, 128), jnp.bool_),
    )

    def apply(params, *args):
      return dit.ElasticDiT(cfg).apply({"params": params}, *args, route=route)

    v = jax.eval_shape(apply, dit.init_shapes(cfg), *args)
    self.assertEqual((v.shape, v.dtype), ((2, side, side, 16), jnp.float32))


if __name__ == "__main__":
  absltest.main()
