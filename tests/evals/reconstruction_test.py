"""The reconstruction report: figures against their definitions, folders with all sorts of files, mistakes."""

import json
import os
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from configs import evaluate as evaluate_config
from elasticdit_jax.evals import evaluate, flops, reconstruction
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import tdvae
from elasticdit_jax.types import to_float
from tests.data import pictures
from tests.evals import tiny_model


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class ReconstructionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.enterContext(tempfile.TemporaryDirectory())
    self.workdir = f"{self.directory}/out"
    self.codecs = tiny_model.make().codecs
    model_dir.save_codecs(f"{self.directory}/mine", {8: self.codecs[8]})

  def _config(self, **changes):
    config = evaluate_config.get_config("vae,debug").unlock()
    config.update({"vaes": f"{self.directory}/mine", "size": 32, "count": 2, "crop": 16} | changes)
    return config.lock()

  def _folder(self):
    path = f"{self.directory}/pictures"
    os.makedirs(path)
    pictures.picture(0, 40, 50, "RGBA").save(f"{path}/a.png")
    pictures.picture(1, 33, 35, "L").save(f"{path}/b.png")
    Image.new("RGB", (1, 1)).save(f"{path}/dot.png")
    with open(f"{path}/empty.png", "wb"):
      pass
    return path

  def test_a_folder_of_all_sorts_at_its_own_size(self):
    evaluate.run(self._config(images=self._folder(), size=0, count=0), self.workdir)
    with open(f"{self.workdir}/report.json") as f:
      result = json.load(f)
    self.assertEqual(result["pictures"], ["a.png (50 x 40)", "b.png (35 x 33)"])
    self.assertIn("Left out: dot.png: too small: 1 x 1 pixels, expected at least 16 on each side.", result["notes"])
    self.assertIn("Left out: empty.png: empty: a file of 0 bytes.", result["notes"])
    (row,) = result["vaes"].values()
    self.assertNotIn("lpips", row)
    self.assertGreater(row["ms_decode"], 0)
    with open(f"{self.workdir}/report.md") as f:
      text = f.read()
    self.assertIn(f"| mine f8 | {row['psnr']:.2f} | {row['ssim']:.4f} | {row['distance']:.4f} |", text)
    self.assertIn(f"| mine f8 | {row['tflops']:.3f} |", text)
    with Image.open(f"{self.workdir}/images/crops.png") as image:
      self.assertGreater(image.height, 2 * 128)  # original and one VAE, 16 px shown eight times larger

  def test_figures(self):
    (one, two), _ = reconstruction.load_pictures("scenes", 32, 2)
    back = reconstruction.reconstruct(self.codecs[8], np.stack([one.image, two.image]))
    z = self.codecs[8].encode(to_float(one.image[None]))
    want = np.rint((np.asarray(self.codecs[8].decode(z))[0] + 1) * 127.5)
    self.assertLessEqual(np.abs(back[0].astype(int) - want).max(), 1)
    got = reconstruction.measure([one.image, two.image], list(back))
    mse = np.square((np.stack([one.image, two.image]).astype(np.float64) - back) / 255).mean((1, 2, 3))
    self.assertAlmostEqual(got["psnr"], float(np.mean(-10 * np.log10(mse))), places=3)
    self.assertEqual(set(got), {"psnr", "ssim", "distance"})

  def test_cost_counts_both_halves_at_1024_px(self):
    found = reconstruction.cost(self.codecs[16])
    codec = self.codecs[16]
    image = jax.ShapeDtypeStruct((1, 1024, 1024, 3), np.float32)
    both = flops.count_flops(lambda p, x: tdvae.TDVAE(codec.cfg).apply({"params": p}, x), codec.params, image)
    self.assertEqual(found["tflops"], both / 1e12)
    self.assertEqual(found["tflops_true"], found["tflops"])  # no attention in a T-DVAE
    self.assertEqual(found["parameters"], sum(x.size for x in jax.tree.leaves(codec.params)))

  def test_crops_show_the_busiest_window(self):
    image = np.zeros((32, 48, 3), np.uint8)
    image[16:32, 24:40] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    names, rows = reconstruction.crops([reconstruction.Picture("x", image)], {"same": [image]}, 16)
    self.assertEqual((names, list(rows)), (["x"], ["original", "same"]))
    np.testing.assert_array_equal(rows["original"][0], image[16:32, 24:40])
    np.testing.assert_array_equal(rows["original"], rows["same"])

  def test_names_of_vaes(self):
    model_dir.save_codecs(f"{self.directory}/two", self.codecs)
    found = reconstruction.load_vaes(f"shipped, {self.directory}/two/")
    self.assertEqual(list(found), ["shipped f8", "shipped f16", "two f8", "two f16"])

  @parameterized.parameters(
    ({"vaes": ""}, "config.vaes: expected 'shipped', directories or both"),
    ({"vaes": "shipped,shipped"}, "'shipped' is named twice"),
    ({"vaes": "/nowhere"}, "/nowhere"),
    ({"images": ""}, "config.images: expected 'photographs', 'scenes' or a folder"),
    ({"images": "/nowhere"}, "no folder /nowhere"),
    ({"size": 8}, "config.size: expected 0 or at least 16 pixels, got 8"),
    ({"repeats": 0}, "config.repeats: expected at least 1, got 0"),
    ({"lpips": "/nowhere/vgg.safetensors"}, "lpips weights: no file '/nowhere/vgg.safetensors'; make the file once"),
  )
  def test_a_mistake_leaves_nothing(self, changes, message):
    with self.assertRaisesRegex(ValueError, message) as caught:
      evaluate.run(self._config(**changes), self.workdir)
    self.assertNotIn("\n", str(caught.exception))
    self.assertFalse(os.path.exists(self.workdir))

  def test_a_folder_without_a_good_picture(self):
    path = self._folder()
    for name in ("a.png", "b.png"):
      os.remove(f"{path}/{name}")
    with self.assertRaisesRegex(ValueError, "none of the 2 pictures .* can be used; Left out: dot.png: too small"):
      evaluate.run(self._config(images=path, size=0), self.workdir)

  def test_lpips_where_weights_are_given(self):
    image = np.full((16, 16, 3), 128, np.uint8)
    with mock.patch.object(reconstruction.lpips, "distance", lambda w, a, b: w["scale"] * abs(a - b).mean((1, 2, 3))):
      got = reconstruction.measure([image], [image + np.uint8(51)], {"scale": np.float32(10)})
    self.assertAlmostEqual(got["lpips"], 10 * 51 / 127.5, places=4)


if __name__ == "__main__":
  absltest.main()
