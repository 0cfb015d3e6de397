"""Where pictures and their captions lie on disk, as a list of examples.

Two layouts, below one folder and mixed freely:

    Hugging Face imagefolder   metadata.jsonl (or metadata.csv) in any folder, with `file_name` relative to it
    same stem                  cat.jpg beside cat.txt

A picture may have several rows of metadata: each is an example.
"""

import csv
import json
import os
from collections.abc import Iterator

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")


def list_examples(path: str, caption_field: str = "text") -> list[tuple[str, str]]:
  """(file name relative to `path`, caption) of every example, sorted.

  Args:
    path: the folder.
    caption_field: field (column) of the metadata that holds the caption; "" reads no captions and no metadata: every
      picture is an example with the caption "".

  Raises:
    ValueError: in one line, where the folder and its captions do not fit together.
  """
  if not os.path.isdir(path):
    raise ValueError(f"data.path: no folder {path}; give the folder that holds the pictures")
  files = _walk(path)
  pictures = [name for name in files if name.lower().endswith(EXTENSIONS)]
  examples = [] if caption_field else [(name, "") for name in pictures]
  for name in files:
    if caption_field and os.path.basename(name) in METADATA:
      examples += _read_metadata(path, name, caption_field)
  if not pictures and not examples:
    raise ValueError(f"data.path: no pictures in {path}; expected files ending in {', '.join(EXTENSIONS)}")
  present = set(files)
  if not caption_field:
    return sorted(examples)
  absent = sorted({name for name, _ in examples if name not in present and not os.path.isfile(f"{path}/{name}")})
  if absent:
    raise ValueError(
      f"data.path: the metadata of {path} names {len(absent)} files that do not exist, first {_first(absent)};"
      " add the files or remove their rows"
    )
  described = {name for name, _ in examples}
  examples += [(name, _sidecar(path, name, present)) for name in pictures if name not in described]
  silent = sorted({name for name, caption in examples if not caption.strip()})
  if silent:
    raise ValueError(
      f"data.path: {len(silent)} of {len(examples)} pictures in {path} have no caption, first {_first(silent)}; add"
      f" a row with file_name and {caption_field} to metadata.jsonl, put a .txt of the same name beside each, or move"
      " them away"
    )
  return sorted(examples)


def _walk(path: str) -> list[str]:
  """All files below `path`, relative and "/"-separated; hidden ones and macOS archives' shadows left out."""
  found, visited = [], set()
  for root, folders, files in os.walk(path, followlinks=True):
    real = os.path.realpath(root)
    if real in visited:  # a link back into the tree
      folders.clear()
      continue
    visited.add(real)
    folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
    found += [os.path.relpath(os.path.join(root, f), path) for f in files if not f.startswith(".")]
  return sorted(name.replace(os.sep, "/") for name in found)


def _read_metadata(path: str, name: str, caption_field: str) -> list[tuple[str, str]]:
  folder, examples = os.path.dirname(name), []
  for line, row in _rows(path, name):
    where = f"{name} line {line} in {path}"
    picture = os.path.normpath(os.path.join(folder, _text(row, "file_name", where)))
    examples.append((picture.replace(os.sep, "/"), _text(row, caption_field, where)))
  return examples


def _text(row: dict, field: str, where: str) -> str:
  if not isinstance(row, dict):
    raise ValueError(f"data.path: {where}: expected an object with file_name and a caption, got {row!r:.60}")
  value = row.get(field, 0)
  if value is None:
    return ""
  if not isinstance(value, str):
    fields = ", ".join(map(str, row))
    raise ValueError(
      f"data.caption_field: {where} has no text in the field {field!r}; it has the fields {fields}; correct the row, or"
      " name the field of the captions with data.caption_field"
    )
  return value


def _rows(path: str, name: str) -> Iterator[tuple[int, dict]]:
  """(line number, row) of a metadata file."""
  with open(os.path.join(path, name), encoding="utf-8-sig", errors="replace", newline="") as f:
    if name.endswith(".csv"):
      reader = csv.DictReader(f)
      for row in reader:
        yield reader.line_num, row
      return
    for number, line in enumerate(f, start=1):
      if line.strip():
        try:
          yield number, json.loads(line)
        except json.JSONDecodeError as e:
          raise ValueError(f"data.path: {name} line {number} in {path} is not JSON ({e}); correct the line") from None


def _sidecar(path: str, name: str, present: set[str]) -> str:
  text = os.path.splitext(name)[0] + ".txt"
  if text not in present:
    return ""
  with open(os.path.join(path, text), encoding="utf-8-sig", errors="replace") as f:
    return " ".join(f.read().split())


def _first(names: list[str]) -> str:
  return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
