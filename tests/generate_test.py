"""Prompts and a route become pictures: reproducible, with one program for any number of prompts."""

import dataclasses
import glob
import os
import tempfile

import jax
import ml_collections
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from elasticdit_jax import generate
from elasticdit_jax.interop import model_dir
from tests.evals import tiny_model

_FAST = {"steps": 2, "guidance": 2.0}
_MODEL = tiny_model.make()
_PIPELINE = generate.Pipeline(_MODEL)
_PROMPTS = ["a red circle", "two squares", "a circle above a square"]


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class PipelineTest(parameterized.TestCase):
  @parameterized.parameters("max-f8", "lite-f8", "max-f16", "lite-f16", "max-s50-f8")
  def test_every_route_draws(self, route):
    images = _PIPELINE("a red circle", route, **_FAST)
    self.assertEqual(images.shape, (1, 64, 64, 3))
    self.assertEqual(images.dtype, np.uint8)
    self.assertGreater(images.std(), 1)

  def test_same_seed_same_picture_and_everything_named_matters(self):
    base = _PIPELINE("a red circle", "lite-f16", seed=3, **_FAST)
    np.testing.assert_array_equal(base, _PIPELINE(["a red circle"], "lite-f16", seed=3, **_FAST))
    for changed in (
      _PIPELINE("a red circle", "lite-f16", seed=4, **_FAST),
      _PIPELINE("a red circle", "max-f16", seed=3, **_FAST),
      _PIPELINE("two squares", "lite-f16", seed=3, **_FAST),
      _PIPELINE("a red circle", "lite-f16", seed=3, steps=2, guidance=5.0),
      _PIPELINE("a red circle", "lite-f16", seed=3, steps=2, guidance=2.0, solver="heun"),
      _PIPELINE("a red circle", "lite-f16", seed=3, steps=2, guidance=2.0, solver="ab2"),
    ):
      self.assertGreater(np.abs(base.astype(int) - changed).max(), 0)

  def test_guidance_one_is_plain_conditional_sampling(self):
    off, almost = (_PIPELINE("a red circle", "lite-f16", steps=2, guidance=g) for g in (1, 1 + 1e-6))
    self.assertLessEqual(np.abs(off.astype(int) - almost).max(), 1)

  def test_a_picture_does_not_depend_on_the_others(self):
    together = _PIPELINE(_PROMPTS, "lite-f16", seed=5, **_FAST)
    few = generate.Pipeline(_MODEL, batch_size=2)(_PROMPTS, "lite-f16", seed=5, **_FAST)
    alone = [_PIPELINE(p, "lite-f16", seed=5, first=i, **_FAST)[0] for i, p in enumerate(_PROMPTS)]
    # Other batch sizes add up in another order: one of 256 levels at most.
    self.assertLessEqual(np.abs(together.astype(int) - few).max(), 1)
    self.assertLessEqual(np.abs(together.astype(int) - np.stack(alone)).max(), 1)
    self.assertGreater(np.abs(together[0].astype(int) - together[1]).max(), 1)

  def test_one_program_serves_any_number_of_prompts_guidance_seed_and_weights(self):
    pipeline = generate.Pipeline(_MODEL, batch_size=4)
    pipeline(_PROMPTS[:2], "lite-f16", **_FAST)
    traced = generate.sample_images._cache_size()
    pipeline(_PROMPTS * 3, "lite-f16", steps=2, guidance=7.0, seed=9)
    generate.Pipeline(tiny_model.make(seed=7), batch_size=4)(_PROMPTS, "lite-f16", steps=2)
    self.assertEqual(generate.sample_images._cache_size(), traced)

  def test_a_call_uses_what_was_compiled_ahead(self):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
      lambda event, *unused, **unused_too: compiled.append(event) if "backend_compile" in event else None
    )
    _PIPELINE.compile(1, route="lite-f16", steps=3)
    self.assertNotEmpty(compiled)
    compiled.clear()
    _PIPELINE("a circle", "lite-f16", steps=3)
    self.assertEmpty(compiled)

  def test_weights_are_arguments_not_constants(self):
    args, static = _PIPELINE.arguments(["a circle"], **_FAST)
    jaxpr = jax.make_jaxpr(lambda *a: generate.sample_images(*a, **static))(*args)
    self.assertLess(sum(np.size(c) for c in jaxpr.consts), 1000)

  def test_other_sizes_and_aspect_ratios(self):
    # Five by three tokens: the 2 x 2 blocks of the sparse layers are ragged.
    self.assertEqual(_PIPELINE("a circle", "max-s50-f8", size=(80, 48), **_FAST).shape, (1, 80, 48, 3))

  @parameterized.parameters(
    ({"route": "tiny-f4"}, "unknown route 'tiny-f4'; expected one of lite-f16, lite-f8"),
    ({"prompts": "a red zebra"}, "zebra"),
    ({"prompts": []}, "expected at least one prompt"),
    ({"size": 72, "route": "lite-f16"}, "lite-f16.*multiples of 32 pixels; the nearest is 64x64"),
    ({"size": (64, 24), "route": "lite-f8"}, "multiples of 16 pixels; the nearest is 64x32"),
    ({"size": 8}, "the nearest is 32x32"),
    ({"steps": 0}, "steps: expected at least 1, got 0"),
    ({"size": 2**20, "route": "lite-f16"}, "1048576x1048576: expected at most 8192x8192 along"),
    ({"guidance": float("nan")}, "guidance: expected a finite number"),
    ({"guidance": -1.0}, "guidance: expected a finite number of at least 0, got -1.0"),
    ({"prompts": "?!"}, "holds no word"),
    ({"seed": -1}, "seed: expected 0"),
    ({"solver": "rk4"}, "unknown solver 'rk4'; expected one of euler, heun, ab2"),
  )
  def test_bad_input_in_one_line(self, change, message):
    with self.assertRaisesRegex(ValueError, message) as caught:
      _PIPELINE(**{"prompts": "a circle", **_FAST, **change})
    self.assertNotIn("\n", str(caught.exception))

  def test_missing_vae(self):
    pipeline = generate.Pipeline(dataclasses.replace(_MODEL, codecs={8: _MODEL.codecs[8]}))
    self.assertNotIn("lite-f16", pipeline.routes)
    with self.assertRaisesRegex(ValueError, "vae_f16.safetensors.*usable: lite-f8, max-f8"):
      pipeline("a circle", "lite-f16")


class SampleTaskTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    temporary = tempfile.TemporaryDirectory()
    self.addCleanup(temporary.cleanup)
    self.directory = temporary.name
    model_dir.save(f"{self.directory}/model", _MODEL)
    self.workdir = f"{self.directory}/out"

  def _config(self, **changes):
    values = {
      "task": "sample",
      "checkpoint": f"{self.directory}/model",
      "prompt": "a red circle; two squares",
      "route": "lite-f16,max-f16",
      "count": 1,
      "seed": 4,
      "size": 0,
      "solver": "euler",
      **_FAST,
    }
    return ml_collections.ConfigDict({**values, **changes})

  def test_writes_pictures_that_say_how_to_repeat_them(self):
    generate.run(self._config(), self.workdir)
    files = sorted(os.path.basename(f) for f in glob.glob(f"{self.workdir}/images/*"))
    expected = [
      f"00{i}-{r}-{s}.png" for i, s in ((0, "a-red-circle"), (1, "two-squares")) for r in ("lite-f16", "max-f16")
    ]
    self.assertEqual(files, sorted([*expected, "grid.png"]))
    with Image.open(f"{self.workdir}/images/001-max-f16-two-squares.png") as file:
      image, text = np.asarray(file), file.text
    again = generate.Pipeline.load(f"{self.directory}/model")(
      text["prompt"],
      text["route"],
      steps=int(text["steps"]),
      guidance=float(text["guidance"]),
      seed=int(text["seed"]),
      first=int(text["number"]),
    )[0]
    self.assertLessEqual(np.abs(again.astype(int) - image).max(), 1)
    self.assertEqual(text["version"], "0.1.0")

  def test_one_picture_needs_no_grid(self):
    generate.run(self._config(prompt="a circle", route="lite-f16"), self.workdir)
    self.assertEqual(os.listdir(f"{self.workdir}/images"), ["000-lite-f16-a-circle.png"])

  def test_bad_input_writes_nothing(self):
    for changes in ({"prompt": "a zebra"}, {"prompt": ";"}, {"route": "lite-f16,no"}, {"count": 0}, {"size": 70}):
      with self.assertRaises(ValueError):
        generate.run(self._config(**changes), self.workdir)
    self.assertFalse(os.path.exists(self.workdir))


if __name__ == "__main__":
  absltest.main()
