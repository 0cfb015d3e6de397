import concurrent.futures
import os

import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from elasticdit_jax.data import folder
from tests.data import pictures


class LoadImageTest(parameterized.TestCase):
  def save(self, image: Image.Image, name: str, **options) -> str:
    path = os.path.join(pictures.new_folder(self), name)
    image.save(path, **options)
    return path

  @parameterized.parameters("a.png", "a.jpg", "a.webp")
  def test_middle_of_a_wide_picture_is_kept(self, name):
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = [255, 0, 0]
    loaded = folder.load_image(self.save(Image.fromarray(pixels), name), 20)
    self.assertEqual((loaded.shape, loaded.dtype), ((20, 20, 3), np.uint8))
    np.testing.assert_allclose(loaded[5:15, 5:15].mean((0, 1)), [255, 0, 0], atol=8)

  def test_transparent_becomes_white(self):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, 8:] = [0, 0, 255, 255]
    loaded = folder.load_image(self.save(Image.fromarray(pixels), "a.png"), 16)
    np.testing.assert_array_equal(loaded[:, 0], 255)
    np.testing.assert_array_equal(loaded[:, -1], np.broadcast_to([0, 0, 255], (16, 3)))

  def test_palette_with_transparency(self):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30] * 256)
    loaded = folder.load_image(self.save(image, "a.png", transparency=0), 16)
    np.testing.assert_array_equal(loaded, 255)

  def test_sixteen_bit_and_grey(self):
    deep = Image.fromarray(np.full((16, 16), 0x8000, np.uint16))
    np.testing.assert_array_equal(folder.load_image(self.save(deep, "a.png"), 8), 128)
    grey = Image.fromarray(np.full((16, 16), 77, np.uint8))
    np.testing.assert_array_equal(folder.load_image(self.save(grey, "b.png"), 8), 77)

  def test_photographs_are_turned_upright(self):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    loaded = folder.load_image(self.save(Image.fromarray(pixels), "a.jpg", exif=exif), 32)
    self.assertLess(loaded[4].mean(), 20)
    self.assertGreater(loaded[-4].mean(), 235)

  def test_own_size_and_one_pixel(self):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 13, 3), np.uint8)
    np.testing.assert_array_equal(folder.load_image(self.save(Image.fromarray(pixels), "a.png"), None), pixels)
    dot = self.save(Image.new("L", (1, 1), 7), "b.png")
    np.testing.assert_array_equal(folder.load_image(dot, None), np.full((1, 1, 3), 7))
    np.testing.assert_array_equal(folder.load_image(dot, 4), np.full((4, 4, 3), 7))
    with self.assertRaisesRegex(ValueError, "too small: 1 x 1 pixels, expected at least 2 on each side"):
      folder.load_image(dot, None, min_side=2)

  def test_large_jpeg_equals_the_full_decode_closely(self):
    y, x = np.mgrid[0:512, 0:512] / 512
    pixels = (np.stack([x, y, (1 + np.sin(20 * x * y)) / 2], -1) * 255).astype(np.uint8)
    path = self.save(Image.fromarray(pixels), "a.jpg", quality=95)
    full = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    self.assertLess(np.abs(folder.load_image(path, 32).astype(int) - full).mean(), 2.0)


class FolderSourceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pictures.new_folder(self)

  def test_random_access(self):
    pictures.write_folder(self.path, 5)
    source = folder.FolderSource(self.path, 32)
    self.assertLen(source, 5)
    image, caption = source[3]
    self.assertEqual((image.shape, image.dtype, caption), ((32, 32, 3), np.uint8, "number 3"))
    np.testing.assert_array_equal(image, folder.load_image(os.path.join(self.path, "003.png"), 32))
    with self.assertRaises(IndexError):
      source[5]

  def test_threads_read_the_same(self):
    pictures.write_folder(self.path, 8)
    source = folder.FolderSource(self.path, 16)
    want = [source[i][0] for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      got = list(pool.map(lambda i: source[i % 8][0], range(32)))
    for i, image in enumerate(got):
      np.testing.assert_array_equal(image, want[i % 8])

  def test_next_good_picture_takes_the_row_of_broken_ones(self):
    pictures.write_folder(self.path, 10, broken=(4, 5, 9))
    source = folder.FolderSource(self.path, 16, max_bad_fraction=0.5)
    image, captions, bad = source.read(np.array([3, 4, 5, 9]))
    self.assertEqual(captions, ["number 3", "number 6", "number 6", "number 0"])
    np.testing.assert_array_equal(bad, [0, 2, 1, 1])
    np.testing.assert_array_equal(image[1], source[6][0])

  def test_stops_when_too_many_turn_out_broken(self):
    pictures.write_folder(self.path, 20, broken=(2, 7))
    source = folder.FolderSource(self.path, 16, max_bad_fraction=0.05)  # headers are intact
    self.assertEqual(source.read_one(2)[2], 1)
    self.assertEqual(source.read_one(2)[2], 1)  # one file counts once
    with self.assertRaisesRegex(ValueError, r"2 of 20 .*10\.0%.*limit 5\.0%.*first 002\.png.*max_bad_fraction") as e:
      source.read_one(7)
    self.assertNotIn("\n", str(e.exception))

  def test_headers_are_checked_at_once(self):
    names = pictures.write_folder(self.path, 10)
    for name in names[:3]:
      with open(os.path.join(self.path, name), "wb") as f:
        f.write(b"not a picture")
    with self.assertRaisesRegex(ValueError, r"3 of 10 .*first 000\.png"):
      folder.FolderSource(self.path, 16)
    self.assertEqual(folder.FolderSource(self.path, 16, max_bad_fraction=0.3).read_one(0)[2], 3)

  def test_an_empty_file_is_named_as_such(self):
    pictures.write_folder(self.path, 4)
    with open(os.path.join(self.path, "002.png"), "wb"):
      pass
    with self.assertRaisesRegex(ValueError, "1 of 4 .*first 002.png: empty: a file of 0 bytes"):
      folder.FolderSource(self.path, 16)
    self.assertEqual(folder.FolderSource(self.path, 16, max_bad_fraction=0.5).read_one(2)[1:], ("number 3", 1))

  def test_small_pictures_count_as_broken(self):
    pictures.write_folder(self.path, 4)
    pictures.picture(9, 6, 60).save(os.path.join(self.path, "001.png"))
    with self.assertRaisesRegex(ValueError, "too small: 60 x 6 pixels, expected at least 16"):
      folder.FolderSource(self.path, 32)
    self.assertEqual(folder.FolderSource(self.path, 32, min_side=1).read_one(1)[2], 0)

  def test_nothing_readable(self):
    pictures.write_folder(self.path, 3, broken=(0, 1, 2))
    source = folder.FolderSource(self.path, 16, max_bad_fraction=1.0)
    with self.assertRaisesRegex(ValueError, "none of the 3"):
      source.read_one(0)

  @parameterized.parameters({"size": 0}, {"size": 8, "max_bad_fraction": 1.5})
  def test_arguments_out_of_range(self, **fields):
    pictures.write_folder(self.path, 1)
    with self.assertRaisesRegex(ValueError, "data\\."):
      folder.FolderSource(self.path, **fields)


class SplitTest(parameterized.TestCase):
  def parts(self, count: int, **options) -> tuple[list[str], list[str]]:
    path = pictures.new_folder(self)
    pictures.write_folder(path, count)
    train, validation = folder.FolderSource(path, 8).split(**options)
    return train.names, validation.names

  @parameterized.parameters((2, 1), (60, 6), (300, 16))
  def test_disjoint_and_complete(self, count, least):
    train, validation = self.parts(count)
    self.assertEqual(sorted(train + validation), [f"{i:03d}.png" for i in range(count)])
    self.assertGreaterEqual(len(validation), least)
    self.assertLess(len(validation), 0.2 * count + 1)

  def test_files_keep_their_side(self):
    small, large = self.parts(200, fraction=0.3), self.parts(220, fraction=0.3)
    self.assertContainsSubset(small[0], large[0])
    self.assertContainsSubset(small[1], large[1])
    self.assertBetween(len(small[1]), 40, 80)

  def test_one_picture_is_both(self):
    self.assertEqual(self.parts(1), (["000.png"], ["000.png"]))

  def test_parts_share_the_count_of_broken_files(self):
    path = pictures.new_folder(self)
    pictures.write_folder(path, 20, broken=tuple(range(20)))
    train, validation = folder.FolderSource(path, 8, max_bad_fraction=0.12).split()
    with self.assertRaisesRegex(ValueError, "3 of 20"):
      train.read_one(0)
    with self.assertRaisesRegex(ValueError, "4 of 20"):
      validation.read_one(0)


if __name__ == "__main__":
  absltest.main()
