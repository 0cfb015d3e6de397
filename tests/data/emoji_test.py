import json
import os
import tempfile
import unittest

from absl.testing import absltest, parameterized

from elasticdit_jax.data import emoji, folder
from tests.data import pictures

HAVE_FONT = any(map(os.path.isfile, emoji.FONTS))


class MistakesTest(parameterized.TestCase):
  def test_missing_font_names_the_package(self):
    out = os.path.join(pictures.new_folder(self), "new")
    with self.assertRaisesRegex(ValueError, "--font: no file /nowhere.ttf; install .*fonts-noto-color-emoji") as caught:
      emoji.export(out, font="/nowhere.ttf")
    self.assertNotIn("\n", str(caught.exception))
    self.assertFalse(os.path.exists(out))

  def test_not_a_font(self):
    with self.assertRaisesRegex(ValueError, "is not a font with colour bitmaps"):
      emoji.export(pictures.new_folder(self), font=__file__)

  @parameterized.parameters({"size": 0}, {"max_words": 0})
  def test_out_of_range(self, **options):
    with self.assertRaisesRegex(ValueError, "expected positive"):
      emoji.export(pictures.new_folder(self), **options)


@unittest.skipUnless(HAVE_FONT, "needs the Debian package fonts-noto-color-emoji")
class ExportTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.out = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.done = emoji.export(cls.out, size=32, max_words=6)
    with open(os.path.join(cls.out, "metadata.jsonl")) as f:
      cls.captions = {row["file_name"]: row["text"] for row in map(json.loads, f)}

  def test_reads_as_a_folder_source(self):
    source = folder.FolderSource(self.out, 32, max_bad_fraction=0.0)
    self.assertLen(source, self.done.pictures)
    self.assertGreater(len(source), 1200)
    image, caption = source[source.names.index("1f34e.png")]
    self.assertEqual(caption, "red apple")
    self.assertGreater(image[:, 0].min(), 245)  # white around it
    red, green, blue = image[12:26, 8:24].reshape(-1, 3).mean(0)
    self.assertGreater(red, 1.5 * max(green, blue))

  def test_no_picture_is_blank(self):
    source = folder.FolderSource(self.out, 32)
    for i in range(0, len(source), 7):
      self.assertGreater(source[i][0].std(), 1.0, source.names[i])

  def test_words_are_counted_and_capped(self):
    words = [caption.split() for caption in self.captions.values()]
    self.assertEqual(max(map(len, words)), 6)
    self.assertEqual((self.done.longest, self.done.words), (6, len({w for ws in words for w in ws})))
    self.assertGreater(self.done.shortened, 10)

  def test_parts_of_emoji_are_left_out(self):
    self.assertNoCommonElements(self.captions, ["1f1e6.png", "1f3fb.png", "00023.png", "00031.png", "020e3.png"])

  def test_repeats_but_never_writes_among_other_files(self):
    out = pictures.new_folder(self)
    with open(os.path.join(out, "mine.png"), "w"):
      pass
    with self.assertRaisesRegex(ValueError, "--out: .* 1 other files, first mine.png"):
      emoji.export(out, size=8)
    self.assertEqual(os.listdir(out), ["mine.png"])
    self.assertEqual(emoji.export(self.out, size=32, max_words=6), self.done)


if __name__ == "__main__":
  absltest.main()
