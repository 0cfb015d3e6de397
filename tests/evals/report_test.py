"""A report is complete, valid JSON, readable Markdown, and pictures that say what they show."""

import json
import math
import os
import re
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest
from PIL import Image

from elasticdit_jax.data import scene_prompts
from elasticdit_jax.evals import pictures, profile, report, report_text

_ROUTES = ("max-f8", "lite-f8", "max-f16", "lite-f16")
_PROMPTS = ["a red circle", "two squares", "a small green triangle left of a big orange circle and more words"]


def _split(strict):
  tasks = dict.fromkeys((*scene_prompts.TASKS, "overall"), strict)
  return {"strict": tasks, "partial": tasks, "extra": dict.fromkeys(tasks, 0.125), "prompts": 96}


def _snapshot(step, label, lite, max_=0.6, score=True, **more):
  routes = {}
  for name in _ROUTES:
    strict = lite if name.startswith("lite") else max_
    routes[name] = {"active_blocks": 4, "loss": 1 - strict, "loss_by_time": np.linspace(0.1, 1 - strict, 4)}
    if score:
      routes[name]["score"] = {"seen": _split(strict), "unseen": _split(strict - 0.1)}
  return {"step": step, "label": label, "routes": routes, **more}


def _profile(name):
  blocks = 4 if name.startswith("lite") else 6
  kept = (3,) * blocks
  return profile.Profile(blocks, blocks * 10**5, 64, 0.25, 2e9, 44e9, 5.0, 130.0, 7.5, 1, 20, 3.0, 64, 64, 4, kept)


def _drawn(seed):
  rng = np.random.default_rng(seed)
  shape = len(_PROMPTS), 64, 64, 3
  return {name: rng.integers(0, 255, (*shape[:1], 1, 1, 3), np.uint8) + np.zeros(shape, np.uint8) for name in _ROUTES}


_IMPORTANCE = {
  "skipped": (1, 3),
  "base": 0.2,
  "alone": (float("nan"), 0.01, 0.05, 0.02, 0.3, float("nan")),
  "order": (1, 3),
  "curve": (0.21, 0.24),
}
_STORY = (
  _snapshot(100, "after 1-init", 0.25, importance=_IMPORTANCE),
  _snapshot(200, "after 2-warmup", 0.5),
  _snapshot(400, "after 4-recover", 0.58),
)


class ReportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = self.enterContext(tempfile.TemporaryDirectory())

  def _write(self, snapshots=_STORY, **changes):
    given = {
      "title": "uwco: tiny",
      "profiles": {name: _profile(name) for name in _ROUTES},
      "prompts": _PROMPTS,
      "drawn": {s["label"]: _drawn(s["step"]) for s in snapshots},
      "config": {"task": "uwco", "data": {"size": 64}},
    }
    return report.write(self.workdir, snapshots=snapshots, **{**given, **changes})

  def _read(self, file):
    with open(os.path.join(self.workdir, file), encoding="utf-8") as f:
      return f.read()

  def test_json_holds_everything_and_is_strict(self):
    returned = self._write(notes=["Said by the caller."])
    stored = json.loads(self._read("report.json"), parse_constant=lambda c: self.fail(f"{c} is no JSON"))
    self.assertEqual(stored, json.loads(json.dumps(returned)))
    self.assertEqual(stored["routes"]["lite-f16"]["score"]["unseen"]["strict"]["overall"], 0.48)
    self.assertEqual(stored["routes"]["lite-f16"]["profile"]["active_parameters"], 400_000)
    self.assertLen(stored["routes"]["max-f8"]["loss_by_time"], 4)
    self.assertEqual([s["step"] for s in stored["snapshots"]], [100, 200, 400])
    self.assertEqual(stored["importance"]["skipped"], [1, 3])
    self.assertIsNone(stored["importance"]["alone"][0])
    self.assertEqual(stored["pictures"], ["images/routes.png", "images/uwco.png"])
    self.assertEqual(stored["config"]["data"]["size"], 64)
    self.assertIn("Said by the caller.", stored["notes"])
    self.assertContainsSubset({"device", "cores", "jax", "load"}, stored["environment"])

  def test_markdown_shows_numbers_tables_and_existing_pictures(self):
    self._write()
    text = self._read("report.md")
    for expected in (
      "58.0 ± ",
      "48.0 ± ",
      "12.5",
      "0.40 M",
      "25.0 %",
      "| lite-f8 | 4 | 3 3 3 3 |",
      "| 44 |",
      "130",
      "protected",
      "+0.0100",
      "0.2400",
    ):
      self.assertIn(expected, text)
    self.assertIn("| after 2-warmup | 200 | 60.0 | 50.0 | 60.0 | 50.0 |", text)
    self.assertIn("config.data.size = 64", text)
    for file in re.findall(r"!\[.*?\]\((.*?)\)", text):
      self.assertTrue(os.path.isfile(os.path.join(self.workdir, file)), file)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
      self.assertLen({line.count("|") for line in table.splitlines()}, 1, table)

  def test_says_whether_lite_keeps_up(self):
    near = self._write()
    self.assertIn("lite-f8 against max-f8: -2.0 points (seen), -2.0 points (unseen); within 5 points.", near["notes"])
    far = self._write((_snapshot(1, "end", 0.5),))
    self.assertTrue(any("MISSED" in note and "-10.0 points" in note for note in far["notes"]))

  def test_pictures_hold_every_route_and_phase(self):
    self._write()
    with Image.open(f"{self.workdir}/images/routes.png") as file:
      page = np.asarray(file)
    final = _drawn(400)
    for name in _ROUTES:
      for picture in final[name]:
        self.assertGreaterEqual((page == picture[0, 0]).all(-1).sum(), 100 * 100, name)
    with Image.open(f"{self.workdir}/images/uwco.png") as file:
      page = np.asarray(file)
    for step in (100, 200, 400):
      self.assertGreaterEqual((page == _drawn(step)["lite-f8"][0, 0, 0]).all(-1).sum(), 100 * 100)
    self.assertGreaterEqual((page == final["max-f16"][0, 0, 0]).all(-1).sum(), 100 * 100)

  def test_without_scores_pictures_or_profiles(self):
    got = self._write((_snapshot(7, "given weights", 0.3, score=False),), drawn=None, profiles=None)
    self.assertEqual(got["pictures"], [])
    self.assertIsNone(got["routes"]["max-f8"]["score"])
    text = self._read("report.md")
    self.assertIn("No scores", text)
    self.assertNotIn("Strict", text)
    self.assertNotIn("The curve", text)
    self.assertIn("0.7000", text)
    self.assertIn("| max-f8 | 4 | – |", text)

  def test_needs_a_snapshot(self):
    with self.assertRaisesRegex(ValueError, "expected at least one snapshot"):
      self._write(())

  def test_standard_error(self):
    self.assertAlmostEqual(report_text.standard_error(_split(0.5)), math.sqrt(0.25 / 96))
    self.assertEqual(report_text.standard_error(_split(1.0)), 0)


class PicturesTest(absltest.TestCase):
  def test_png_keeps_pixels_and_text_of_any_script(self):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with tempfile.TemporaryDirectory() as directory:
      pictures.save_png(f"{directory}/a.png", image, prompt="ein grüner Kreis 円", seed=3)
      self.assertEqual(os.listdir(directory), ["a.png"])
      with Image.open(f"{directory}/a.png") as file:
        np.testing.assert_array_equal(np.asarray(file), image)
        self.assertEqual(file.text, {"prompt": "ein grüner Kreis 円", "seed": "3"})

  def test_grid_wraps_into_bands_and_resizes(self):
    many = np.zeros((10, 16, 16, 3), np.uint8)
    large = np.zeros((10, 512, 256, 3), np.uint8)
    one_band = pictures.grid(["x"] * 10, {"a": many}, columns=10)
    two_bands = pictures.grid(["x"] * 10, {"a": many}, columns=5)
    self.assertEqual(two_bands.shape[0], 2 * one_band.shape[0])
    self.assertLess(two_bands.shape[1], one_band.shape[1])
    black = (pictures.grid(["x"] * 10, {"a": large}) == 0).all(-1).sum()
    self.assertGreaterEqual(black, 10 * 256 * 512)

  def test_refuses(self):
    image = np.zeros((2, 8, 8, 3), np.uint8)
    with self.assertRaisesRegex(ValueError, "2 pictures for 1 captions"):
      pictures.grid(["x"], {"a": image})
    with self.assertRaisesRegex(ValueError, "expected at least one"):
      pictures.grid([], {})
    with self.assertRaisesRegex(ValueError, "expected uint8"):
      pictures.save_png("never.png", image[0].astype(float))

  def test_a_full_disk_leaves_no_half_picture(self):
    def save(self, path, **unused_options):
      with open(path, "wb") as f:
        f.write(b"half")
      raise OSError(28, "No space left on device")

    with tempfile.TemporaryDirectory() as directory:
      with mock.patch.object(Image.Image, "save", save), self.assertRaisesRegex(OSError, "No space"):
        pictures.save_png(f"{directory}/a.png", np.zeros((4, 4, 3), np.uint8))
      self.assertEmpty(os.listdir(directory))


if __name__ == "__main__":
  absltest.main()
