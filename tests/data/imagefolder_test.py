import json
import os

from absl.testing import absltest

from elasticdit_jax.data import imagefolder
from tests.data import pictures


class ListExamplesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pictures.new_folder(self)

  def write(self, name: str, text: str) -> None:
    path = os.path.join(self.path, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
      f.write(text)

  def picture(self, name: str) -> None:
    path = os.path.join(self.path, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pictures.picture(0, 8, 8).save(path)

  def refused(self, pattern: str, **options) -> None:
    with self.assertRaisesRegex(ValueError, pattern) as caught:
      imagefolder.list_examples(self.path, **options)
    self.assertNotIn("\n", str(caught.exception))

  def test_sidecars_recursive_and_sorted(self):
    for name in ("b/x.JPG", "a.png", "b/c/y.webp"):
      self.picture(name)
      self.write(os.path.splitext(name)[0] + ".txt", f"about\n {name} \n")
    self.picture(".hidden/z.png")
    self.assertEqual(
      imagefolder.list_examples(self.path),
      [("a.png", "about a.png"), ("b/c/y.webp", "about b/c/y.webp"), ("b/x.JPG", "about b/x.JPG")],
    )

  def test_metadata_in_subfolders_csv_and_several_captions(self):
    for name in ("one/a.png", "two/b.png", "c.png"):
      self.picture(name)
    self.write("one/metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n\n{"file_name": "a.png", "text": "y"}\n')
    self.write("two/metadata.csv", 'file_name,text\nb.png,"p, q"\n')
    self.write("c.txt", "z")
    self.assertEqual(
      imagefolder.list_examples(self.path),
      [("c.png", "z"), ("one/a.png", "x"), ("one/a.png", "y"), ("two/b.png", "p, q")],
    )

  def test_caption_field(self):
    self.picture("a.png")
    self.write("metadata.jsonl", json.dumps({"file_name": "a.png", "caption": "x", "n": 3}) + "\n")
    self.assertEqual(imagefolder.list_examples(self.path, "caption"), [("a.png", "x")])
    self.refused("metadata.jsonl line 1 .*'text'.*file_name, caption, n.*data.caption_field")
    self.refused("'n'", caption_field="n")

  def test_missing_and_empty_folder(self):
    self.refused(r"data.path: no pictures in .*\.png")
    with self.assertRaisesRegex(ValueError, "data.path: no folder .*nowhere"):
      imagefolder.list_examples(os.path.join(self.path, "nowhere"))

  def test_pictures_without_captions(self):
    for i in range(5):
      self.picture(f"{i}.png")
    self.write("0.txt", "fine")
    self.write("1.txt", " \n")
    self.write("metadata.jsonl", '{"file_name": "2.png", "text": null}\n')
    self.refused(r"4 of 5 pictures .* no caption, first 1.png, 2.png, 3.png, \.\.\.; add a row .*\.txt")

  def test_without_a_caption_field_nothing_is_captioned(self):
    self.picture("alone.png")
    self.picture("000.png")
    self.write("metadata.jsonl", "not JSON")
    self.assertEqual(imagefolder.list_examples(self.path, ""), [("000.png", ""), ("alone.png", "")])

  def test_metadata_of_absent_files(self):
    self.picture("a.png")
    self.write("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name": "gone.png", "text": "y"}\n')
    self.refused("names 1 files that do not exist, first gone.png; add")

  def test_damaged_metadata(self):
    self.picture("a.png")
    self.write("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name"\n')
    self.refused("metadata.jsonl line 2 .*not JSON")
    self.write("metadata.jsonl", "[1]\n")
    self.refused("line 1 .*expected an object")

  def test_link_back_into_the_tree_ends(self):
    self.picture("sub/a.png")
    self.write("sub/a.txt", "x")
    os.symlink(self.path, os.path.join(self.path, "sub", "again"))
    self.assertEqual(imagefolder.list_examples(self.path), [("sub/a.png", "x")])


if __name__ == "__main__":
  absltest.main()
