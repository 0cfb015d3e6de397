"""Route: validation, hashing, ownership of parameters, and routes.json."""

import dataclasses
import json
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from elasticdit_jax import elastic
from elasticdit_jax.elastic import Route, standard_routes

LITE = Route("lite-f8", (True, False, True), (0.5, 0.0, 0.25), 8)


class RouteTest(parameterized.TestCase):
  def test_properties(self):
    self.assertEqual(LITE.depth, 3)
    self.assertEqual(LITE.active, (0, 2))

  def test_equal_values_are_equal_keys_whatever_sequence_they_came_in(self):
    other = Route("lite-f8", [True, False, True], [0.5, 0, 0.25], 8)
    self.assertEqual(other, LITE)
    self.assertEqual(hash(other), hash(LITE))
    self.assertIsInstance(other.sparsity[1], float)
    traces = []

    def apply(x, route):
      traces.append(route.name)
      return x * route.depth

    step = jax.jit(apply, static_argnames="route")
    for route in (LITE, other, dataclasses.replace(LITE, vae=16), LITE):
      step(jnp.ones(2), route=route)
    self.assertLen(traces, 2)
    with self.assertRaises(dataclasses.FrozenInstanceError):
      other.vae = 16

  @parameterized.parameters(
    ({"name": ""}, "Route.name"),
    ({"name": "Max F8"}, "Route.name: expected lower-case letters.*got 'Max F8'"),
    ({"name": "../max"}, "Route.name"),
    ({"name": "max\n"}, "Route.name"),
    ({"name": 8}, "Route.name"),
    ({"keep": ()}, "Route.keep of 'lite-f8': expected one bool per block"),
    ({"keep": (1, 0, 1)}, "Route.keep of 'lite-f8': expected one bool per block"),
    ({"keep": (False, True, True)}, "the first and the last block are protected"),
    ({"keep": (True, True, False)}, "the first and the last block are protected"),
    ({"sparsity": (0.5,)}, "Route.sparsity of 'lite-f8': expected 3 values like Route.keep, got 1"),
    ({"sparsity": (0.5, 1.0, 0.0)}, r"Route.sparsity of 'lite-f8': expected values in \[0, 1\)"),
    ({"sparsity": (-0.1, 0.0, 0.0)}, "Route.sparsity"),
    ({"sparsity": (float("nan"), 0.0, 0.0)}, "Route.sparsity"),
    ({"vae": 32}, r"Route.vae of 'lite-f8': expected one of \(8, 16\), got 32"),
    ({"vae": True}, "Route.vae"),
    ({"vae": "8"}, "Route.vae"),
  )
  def test_messages(self, change, message):
    with self.assertRaisesRegex(ValueError, message) as caught:
      dataclasses.replace(LITE, **change)
    self.assertNotIn("\n", str(caught.exception))

  @parameterized.parameters(
    (("block_00", "image_mlp", "up", "kernel"), True),
    (("block_01", "modulation"), False),
    (("opt", "mu", "block_01", "modulation"), False),
    (("block_02", "modulation"), True),
    (("conditioning", "time_in", "kernel"), True),
    (("block_list", "kernel"), True),
    ((), True),
  )
  def test_owns(self, path, expected):
    self.assertEqual(LITE.owns(path), expected)


class StandardRoutesTest(parameterized.TestCase):
  def test_the_four_routes_of_the_paper(self):
    routes = standard_routes(5, [1, 3])
    self.assertEqual(list(routes), ["max-f8", "lite-f8", "max-f16", "lite-f16"])
    for name, route in routes.items():
      self.assertEqual(route.name, name)
      self.assertEqual(route.vae, int(name.split("-f")[1]))
      self.assertEqual(route.active, (0, 2, 4) if name.startswith("lite") else (0, 1, 2, 3, 4))
      self.assertEqual(route.sparsity, (0.0,) * 5)

  @parameterized.parameters(([5], "0..4, got .5"), ([-1], "0..4"), ([0], "protected"), ([4], "protected"))
  def test_blocks_that_cannot_be_skipped(self, skipped, message):
    with self.assertRaisesRegex(ValueError, message):
      standard_routes(5, skipped)

  def test_select(self):
    routes = standard_routes(3)
    self.assertIs(elastic.select_route(routes, "max-f16"), routes["max-f16"])
    with self.assertRaisesRegex(ValueError, "unknown route 'mini-f8'; expected one of lite-f16, lite-f8, max-f16"):
      elastic.select_route(routes, "mini-f8")


class FileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "routes.json"

  def _message(self):
    with self.assertRaises(ValueError) as caught:
      elastic.load_routes(self.path)
    message = str(caught.exception)
    self.assertIn(str(self.path), message)
    self.assertNotIn("\n", message)
    return message

  def test_round_trip(self):
    routes = standard_routes(3, [1]) | {LITE.name: LITE}
    elastic.save_routes(self.path, routes)
    loaded = elastic.load_routes(self.path)
    self.assertEqual(loaded, routes)
    self.assertEqual(list(loaded), list(routes))
    self.assertEqual(os.listdir(self.path.parent), ["routes.json"])
    elastic.save_routes(str(self.path), {"max-f8": routes["max-f8"]})
    self.assertEqual(list(elastic.load_routes(str(self.path))), ["max-f8"])

  def test_a_failed_write_keeps_the_old_file(self):
    elastic.save_routes(self.path, standard_routes(3))
    with self.assertRaises(TypeError):
      elastic.save_routes(self.path, {"bad": dataclasses.replace(LITE, name="bad"), "worse": None})
    self.assertLen(elastic.load_routes(self.path), 4)

  def test_missing(self):
    self.assertIn("it is written beside a checkpoint by the uwco task", self._message())

  @parameterized.parameters(
    (b"", "not a valid route file"),
    (b'{"max-f8": {"keep": [tr', "not a valid route file"),
    (b"\xff\xfe\x00", "not a valid route file"),
    (b"[]", "expected an object of routes by name"),
    (b"{}", "expected an object of routes by name"),
    (b'{"max-f8": 3}', "route 'max-f8': expected exactly the fields keep, sparsity and vae"),
    (b'{"max-f8": {"keep": [true], "vae": 8}}', "expected exactly the fields"),
    (b'{"max-f8": {"keep": null, "sparsity": [0], "vae": 8}}', "not a valid route file"),
    (b'{"max-f8": {"keep": [true], "sparsity": [2], "vae": 8}}', "Route.sparsity of 'max-f8'"),
  )
  def test_damaged(self, content, message):
    self.path.write_bytes(content)
    self.assertIn(message, self._message())

  def test_backbones_of_different_depth(self):
    table = {name: {"keep": [True] * n, "sparsity": [0] * n, "vae": 8} for name, n in (("a", 2), ("b", 3))}
    self.path.write_text(json.dumps(table))
    self.assertIn("mixes backbones of [2, 3] blocks", self._message())


if __name__ == "__main__":
  absltest.main()
