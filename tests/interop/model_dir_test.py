"""Model directories: round trips, replacement, and one clear line for whatever is missing or damaged."""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.data.text import WordEncoder
from elasticdit_jax.elastic import Route, save_routes, standard_routes
from elasticdit_jax.interop import model_dir, weights
from elasticdit_jax.models import dit, tdvae
from elasticdit_jax.models.codec import Codec
from tests.models.cases import random_tree

DIT = dit.DiTConfig(16, 3, 8, text_dim=4, text_length=2, text_pool="flatten", block_side=2)
FILES = ["dit.safetensors", "model.json", "routes.json", "vae_f16.safetensors", "vae_f8.safetensors"]


def _codec(factor):
  levels = {8: 3, 16: 4}[factor]
  cfg = tdvae.VAEConfig(factor, (4,) * levels, (0,) * levels, (0,) * levels, flow=4)
  shift = jnp.asarray(np.random.default_rng(factor).normal(size=16), jnp.float32)
  return Codec(cfg, random_tree(tdvae.init_shapes(cfg)), shift, jnp.float32(1 / 3))


def _model():
  routes = standard_routes(3, [1])
  routes["d2-s50-f16"] = Route("d2-s50-f16", (True, False, True), (0.1, 0.0, 0.5), 16)
  return model_dir.Model(
    DIT,
    random_tree(dit.init_shapes(DIT)),
    {8: _codec(8), 16: _codec(16)},
    WordEncoder(("red", "circle"), 2, 4),
    routes,
    model_dir.FlowShift(2.5, 64),
    128,
    {"command": "uwco", "seed": "3"},
  )


def _same(test, loaded, model, compare):
  test.assertEqual(loaded.cfg, model.cfg)
  test.assertEqual(loaded.encoder, model.encoder)
  test.assertEqual(loaded.routes, model.routes)
  test.assertEqual((loaded.flow, loaded.size), (model.flow, model.size))
  test.assertEqual(loaded.provenance, model.provenance)
  test.assertEqual(list(loaded.codecs), list(model.codecs))
  jax.tree.map(compare, loaded.params, model.params)
  for factor, codec in model.codecs.items():
    got = loaded.codecs[factor]
    test.assertEqual(got.cfg, codec.cfg)
    jax.tree.map(compare, got.params, codec.params)
    # Statistics are exact whatever the dtype of the weights.
    np.testing.assert_array_equal(got.shift, codec.shift)
    np.testing.assert_array_equal(got.scale, codec.scale)
    test.assertEqual(got.scale.dtype, jnp.float32)


class ModelDirTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.root / "model"

  def _message(self, load=model_dir.load, path=None):
    with self.assertRaises(ValueError) as caught:
      load(path or self.path)
    message = str(caught.exception)
    self.assertNotIn("\n", message)
    self.assertIn(str(self.root), message)
    return message

  def test_float32_round_trip_is_exact(self):
    model_dir.save(self.path, _model())
    self.assertEqual(sorted(os.listdir(self.path)), FILES)
    self.assertEqual(os.listdir(self.root), ["model"])
    _same(self, model_dir.load(self.path), _model(), np.testing.assert_array_equal)

  def test_float16_round_trip_is_close_and_float32_in_memory(self):
    model_dir.save(f"{self.path}/", _model(), "float16")
    loaded = model_dir.load(self.path)
    _same(self, loaded, _model(), lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6))
    leaves = jax.tree.leaves((loaded.params, loaded.codecs[8].params))
    self.assertEqual({leaf.dtype for leaf in leaves}, {jnp.dtype("float32")})

  def test_the_workdir_of_a_run_and_a_model_with_one_vae(self):
    model = dataclasses.replace(_model(), codecs={16: _codec(16)})
    model_dir.save(self.path, model)
    _same(self, model_dir.load(self.root), model, np.testing.assert_array_equal)

  def test_an_older_model_is_replaced_whole(self):
    model_dir.save(self.path, _model())
    newer = dataclasses.replace(_model(), codecs={8: _codec(8)}, size=64)
    model_dir.save(self.path, newer)
    _same(self, model_dir.load(self.path), newer, np.testing.assert_array_equal)
    self.assertEqual(os.listdir(self.root), ["model"])

  def test_an_older_model_survives_a_failed_save(self):
    model_dir.save(self.path, _model())
    broken = jax.tree.map(lambda a: np.full_like(a, np.nan), _model().params)
    with self.assertRaisesRegex(ValueError, "not finite"):
      model_dir.save(self.path, dataclasses.replace(_model(), params=broken))
    _same(self, model_dir.load(self.path), _model(), np.testing.assert_array_equal)
    # Even at the last moment nothing is lost: the rename of the new directory fails.
    real = os.replace

    def replace(source, target):
      if str(source) == f"{self.path}.partial":
        raise OSError("disk")
      real(source, target)

    with mock.patch.object(os, "replace", replace), self.assertRaisesRegex(OSError, "disk"):
      model_dir.save(self.path, _model())
    kept = next(p for p in self.root.iterdir() if p.name in ("model", "model.old"))
    _same(self, model_dir.load(kept), _model(), np.testing.assert_array_equal)
    model_dir.save(self.path, _model())
    self.assertEqual(os.listdir(self.root), ["model"])

  def test_a_kill_between_the_renames_loses_nothing(self):
    old = _model()
    new = dataclasses.replace(old, size=64)
    for place in ("here", "run/model"):
      path = f"{self.root}/{place}"
      model_dir.save(path, old)
      replace = os.replace

      def killed(source, target, path=path, replace=replace):
        if target == path:
          raise KeyboardInterrupt
        replace(source, target)

      with mock.patch.object(os, "replace", killed), self.assertRaises(KeyboardInterrupt):
        model_dir.save(path, new)
      self.assertFalse(os.path.exists(path))
      with self.assertLogs(level="WARNING") as logged:
        self.assertEqual(model_dir.load(path.removesuffix("/model")).size, 64)
      self.assertIn(f"{path} was interrupted", logged.output[0])
      self.assertEqual(list(model_dir.load_codecs(path)), [8, 16])
      os.remove(f"{path}.partial/model.json")  # a later save was killed as well
      self.assertEqual(model_dir.load(path).size, 128)
      model_dir.save(path, new)
      self.assertEqual(model_dir.load(path).size, 64)
      self.assertEqual([p for p in os.listdir(os.path.dirname(path)) if p.endswith((".old", ".partial"))], [])

  def test_what_is_no_model_directory_is_not_replaced(self):
    self.path.mkdir()
    model_dir.save(self.path, _model())
    for name in FILES:
      if not name.startswith("vae_"):
        (self.path / name).unlink()
    model_dir.save(self.path, _model())
    shutil.rmtree(self.path)
    self.path.mkdir()
    (self.path / "thesis.txt").write_text("years of work")
    message = self._message(lambda path: model_dir.save(path, _model()))
    self.assertIn("holds something else; give another path", message)
    self.assertEqual((self.path / "thesis.txt").read_text(), "years of work")

  def test_missing(self):
    self.assertIn("no model.json in", self._message())
    for name in FILES[:3]:
      model_dir.save(self.path, _model())
      (self.path / name).unlink()
      self.assertIn(name, self._message())
    model_dir.save(self.path, _model())
    for name in FILES[3:]:
      (self.path / name).unlink()
    self.assertIn("no vae_f8.safetensors or vae_f16.safetensors in", self._message())

  def test_damaged(self):
    for name in FILES:
      model_dir.save(self.path, _model())
      file = self.path / name
      file.write_bytes(file.read_bytes()[: int(0.6 * file.stat().st_size)])
      self.assertIn(name, self._message())
    model_dir.save(self.path, _model())
    for content in (b"", b"\xff\xfe\x00\x01", b"[1]", b"null", b'{"format": 0}'):
      (self.path / "model.json").write_bytes(content)
      self.assertIn("model.json", self._message())

  @parameterized.parameters(
    ({"dit": {"wide": 3}}, "model.json does not describe a model .TypeError"),
    ({"dit": None}, "model.json does not describe a model"),
    ({"dit": dataclasses.asdict(DIT) | {"width": 12}}, "DiTConfig.width"),
    ({"dit": dataclasses.asdict(DIT) | {"width": 32}}, "tensors do not fit the model"),
    ({"text_encoder": {"kind": "t5"}}, "text encoder: expected the fields"),
    ({"flow": {"shift": 1.0}}, "model.json does not describe a model"),
    ({"flow": {"shift": "x", "tokens": 64}}, "flow.shift: expected a positive number, got 'x'"),
    ({"flow": {"shift": 1.0, "tokens": 0}}, "flow.tokens: expected at least 1, got 0"),
    ({"size": "big"}, "size: expected a positive number of pixels, got 'big'"),
    ({"size": ...}, "model.json does not describe a model .KeyError: 'size'"),
    ({"text_encoder": WordEncoder(("red",), 2, 5).to_json()}, "model.json is for 5 text features, the backbone has 4"),
    ({"text_encoder": WordEncoder(("red",), 3, 4).to_json()}, "captions of up to 3 words, the backbone reads 2"),
  )
  def test_a_description_that_does_not_fit(self, change, message):
    model_dir.save(self.path, _model())
    described = json.loads((self.path / "model.json").read_text()) | change
    described = {key: value for key, value in described.items() if value is not ...}
    (self.path / "model.json").write_text(json.dumps(described))
    self.assertRegex(self._message(), message)

  def test_parts_that_do_not_belong_together(self):
    model_dir.save(self.path, _model())
    save_routes(self.path / "routes.json", standard_routes(5))
    self.assertIn("routes.json is for 5 blocks, the backbone has 3", self._message())
    model_dir.save(self.path, _model())
    shutil.copy(self.path / "vae_f8.safetensors", self.path / "vae_f16.safetensors")
    self.assertIn("vae_f16.safetensors holds an f8 VAE", self._message())
    model_dir.save(self.path, _model())
    cfg = dataclasses.replace(_codec(8).cfg, latent_channels=4)
    codec = Codec(cfg, random_tree(tdvae.init_shapes(cfg)), jnp.zeros(4), jnp.float32(1))
    model_dir.save_codecs(self.path, {8: codec})
    self.assertIn("vae_f8.safetensors is for 4 latent channels, the backbone has 16", self._message())


class CodecsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = self.enterContext(tempfile.TemporaryDirectory())

  def test_round_trip_without_a_backbone(self):
    directory = f"{self.path}/deep/vae"
    model_dir.save_codecs(directory, {16: _codec(16)})
    loaded = model_dir.load_codecs(directory)
    self.assertEqual(list(loaded), [16])
    jax.tree.map(np.testing.assert_array_equal, loaded[16], _codec(16))

  @parameterized.parameters(
    ({}, "lacks the description"),
    ({"config": "{"}, "lacks the description"),
    ({"config": '{"depth": 3}'}, "lacks the description"),
    ({"config": '{"factor": 4}'}, "VAEConfig.factor"),
    ({"scale": "0"}, "expected 16 finite shifts and a positive scale"),
    ({"scale": '"wide"'}, "vae_f8.safetensors"),
    ({"shift": "[1.0]"}, "expected 16 finite shifts and a positive scale"),
  )
  def test_bad_metadata(self, change, message):
    model_dir.save_codecs(self.path, {8: _codec(8)})
    file = f"{self.path}/vae_f8.safetensors"
    metadata = weights.load_metadata(file) | change if change else {}
    weights.save_tree(file, _codec(8).params, metadata=metadata)
    with self.assertRaisesRegex(ValueError, message) as caught:
      model_dir.load_codecs(self.path)
    self.assertIn("vae_f8.safetensors", str(caught.exception))
    self.assertNotIn("\n", str(caught.exception))


if __name__ == "__main__":
  absltest.main()
