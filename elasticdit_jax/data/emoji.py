"""Exports the colour glyphs of an emoji font as captioned pictures that `data.source=folder` reads.

    apt-get install fonts-noto-color-emoji
    python -m elasticdit_jax.data.emoji --out=emoji

The result is a Hugging Face imagefolder: one PNG on white per single code point with a colour glyph, and metadata.jsonl
with its Unicode name in words as the caption. Version 2.042 of the font gives 1,360 pictures, 1,407 different words and
captions of 8 words at most (7 of them shortened) with the names of Unicode 14 (Python 3.11); newer Pythons know the
names of some more. Takes about 5 seconds.
"""

import dataclasses
import json
import os
import sys
import unicodedata
from collections.abc import Iterator

from absl import app, flags, logging
from PIL import Image, ImageDraw, ImageFont

from elasticdit_jax.data.text import split_words

FONTS = (
  "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
  "/usr/share/fonts/noto/NotoColorEmoji.ttf",
  "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
_PPEM = 109  # the only size of the bitmaps in the font
_SIDE = 128  # they are 136 x 128, the outer 4 columns on each side always empty
_MARGIN = 4
_CATEGORIES = ("So", "Sm", "Po", "Pd")  # leaves out combining marks and skin tones
_REGIONAL = range(0x1F1E6, 0x1F200)  # halves of flags
_METADATA = "metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class Exported:
  """What `export` wrote.

  Attributes:
    pictures: number of pictures.
    words: number of different words in the captions: the least `data.max_words` that leaves none out.
    longest: most words in a caption: the least `data.text_length`.
    shortened: captions that lost words.
  """

  pictures: int
  words: int
  longest: int
  shortened: int


def glyphs(font: str) -> Iterator[tuple[int, str, Image.Image]]:
  """(code point, Unicode name, glyph as RGB 128 x 128 on white) of every single code point with a colour glyph.

  Raises:
    ValueError: where the file is no colour bitmap font of this kind.
  """
  try:
    face = ImageFont.truetype(font, _PPEM, layout_engine=ImageFont.Layout.BASIC)
  except OSError as e:
    raise ValueError(f"--font: {font} is not a font with colour bitmaps of {_PPEM} pixels per em ({e})") from None
  for code in range(0x80, sys.maxunicode + 1):  # ASCII has bases of keycaps only
    character = chr(code)
    name = unicodedata.name(character, "")
    if not name or unicodedata.category(character) not in _CATEGORIES or code in _REGIONAL:
      continue
    _, top, right, bottom = face.getbbox(character)
    if bottom <= top:  # the font has no picture for it
      continue
    canvas = Image.new("RGBA", (max(right, _SIDE + 2 * _MARGIN), max(bottom, _SIDE)), "white")
    ImageDraw.Draw(canvas).text((0, 0), character, font=face, embedded_color=True)
    yield code, name, canvas.convert("RGB").crop((_MARGIN, 0, _MARGIN + _SIDE, _SIDE))


def export(out: str, font: str = "", size: int = _SIDE, max_words: int = 8) -> Exported:
  """Writes `<code point>.png` and metadata.jsonl into the folder `out`; the same command may be repeated.

  Args:
    out: folder to write; made where it is missing.
    font: font file; by default the place where Linux distributions install it.
    size: side of the pictures in pixels; 128 is the font's own resolution.
    max_words: captions keep their first words only, at most this many.

  Raises:
    ValueError: for a missing font, or a folder that holds something else; nothing is written then.
  """
  if size < 1 or max_words < 1:
    raise ValueError(f"--size, --max_words: expected positive numbers, got {size} and {max_words}")
  found = list(glyphs(_find_font(font)))
  names = {code: f"{code:05x}.png" for code, _, _ in found}
  _check_out(out, {*names.values(), _METADATA})
  os.makedirs(out, exist_ok=True)
  rows, shortened = [], 0
  for code, name, image in found:
    words = split_words(name)
    shortened += len(words) > max_words
    if size != _SIDE:
      image = image.resize((size, size), Image.Resampling.LANCZOS)
    image.save(os.path.join(out, names[code]))
    rows.append({"file_name": names[code], "text": " ".join(words[:max_words])})
  partial = os.path.join(out, f".{_METADATA}.partial")
  with open(partial, "w", encoding="utf-8") as f:
    f.writelines(json.dumps(row) + "\n" for row in rows)
  os.replace(partial, os.path.join(out, _METADATA))
  captions = [row["text"].split() for row in rows]
  return Exported(len(rows), len({w for words in captions for w in words}), max(map(len, captions)), shortened)


def _find_font(font: str) -> str:
  for path in (font,) if font else FONTS:
    if os.path.isfile(path):
      return path
  raise ValueError(
    f"--font: no file {font or FONTS[0]}; install the Debian package fonts-noto-color-emoji (apt-get install"
    " fonts-noto-color-emoji), or give the path of NotoColorEmoji.ttf"
  )


def _check_out(out: str, ours: set[str]) -> None:
  if os.path.exists(out) and not os.path.isdir(out):
    raise ValueError(f"--out: {out} is a file; give a folder")
  others = sorted(name for name in (os.listdir(out) if os.path.isdir(out) else ()) if name not in ours)
  others = [name for name in others if not name.startswith(".")]
  if others:
    raise ValueError(f"--out: {out} holds {len(others)} other files, first {others[0]}; give a new or empty folder")


def main(argv: list[str]) -> None:
  """The command; see the top of this file."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags start with --")
  try:
    done = export(flags.FLAGS.out, flags.FLAGS.font, flags.FLAGS.size, flags.FLAGS.max_words)
  except ValueError as e:
    sys.exit(f"error: {e}")
  logging.info("%d pictures in %s; %d captions shortened", done.pictures, flags.FLAGS.out, done.shortened)
  logging.info(
    "train on them with data.source=folder, data.path=%s, data.text_length >= %d, data.max_words >= %d",
    flags.FLAGS.out,
    done.longest,
    done.words,
  )


if __name__ == "__main__":
  flags.DEFINE_string("out", None, "Folder to write.", required=True)
  flags.DEFINE_string("font", "", "NotoColorEmoji.ttf; found by itself where the Debian package installs it.")
  flags.DEFINE_integer("size", _SIDE, "Side of the pictures in pixels.")
  flags.DEFINE_integer("max_words", 8, "Longest caption in words; the rest of longer names is dropped.")
  app.run(main)
