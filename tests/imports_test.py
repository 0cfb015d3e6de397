"""The laws of the house, read off the syntax trees: import direction, rooms, file names, sizes, return types."""

import ast
import pathlib

from absl.testing import absltest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "elasticdit_jax"
_BASE = {"types", "distributed", "elastic"}
_EVERYTHING_BUT_TRAIN = _BASE | {"ops", "models", "flow", "data", "evals", "interop", "generate"}

# Room or file at the root -> the rooms it may import, itself included.
ALLOWED = {
  "types": set(),
  "elastic": set(),
  "distributed": set(),
  "config_file": set(),
  "huge_pages": set(),
  "main": {"config_file", "huge_pages"},
  "ops": {"types", "elastic", "ops"},
  "models": {"types", "elastic", "ops", "models"},
  "flow": {"types", "flow"},
  "data": {"types", "data"},
  "interop": _EVERYTHING_BUT_TRAIN - {"generate", "evals"},
  "evals": _EVERYTHING_BUT_TRAIN,
  "generate": _EVERYTHING_BUT_TRAIN,
  "train": _EVERYTHING_BUT_TRAIN | {"train"},
}


def _sources():
  """(file, its syntax tree) of the package and of configs/."""
  for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "configs").glob("*.py")]):
    yield path, ast.parse(path.read_text(), str(path))


def _room(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py") if path.is_relative_to(PACKAGE) else "configs"


def _imports(tree):
  """Full dotted names of everything imported, `from a import b` as a.b."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def _identifiers(tree):
  for node in ast.walk(tree):
    for field in ("id", "attr", "arg", "name", "asname"):
      value = getattr(node, field, None)
      if isinstance(value, str):
        yield value


class ImportsTest(absltest.TestCase):
  def test_imports_point_one_way(self):
    wrong = []
    for path, tree in _sources():
      room = _room(path)
      if room in ("__init__", "configs"):
        continue
      self.assertIn(room, ALLOWED, f"{path}: a new room needs its rule in this test")
      for name in _imports(tree):
        self.assertFalse(name.startswith("."), f"{path}: relative import {name}")
        parts = name.split(".")
        if parts[0] == "elasticdit_jax" and parts[1] not in ALLOWED[room] | {"__version__"}:
          wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    self.assertEmpty(wrong)

  def test_configs_import_no_device_library_and_no_room(self):
    for path, tree in _sources():
      if _room(path) == "configs":
        for name in _imports(tree):
          self.assertIn(name.split(".")[0], ("elasticdit_jax", "ml_collections", "typing"), path)
          if name.startswith("elasticdit_jax"):
            self.assertEqual(name, "elasticdit_jax.configs.common", path)

  def test_linen_stays_in_models_and_the_old_training_library_out(self):
    for path, tree in _sources():
      for name in _imports(tree):
        if name.startswith(("flax.linen", "flax.nnx")):
          self.assertEqual(_room(path), "models", f"{path} imports {name}")
        self.assertFalse(name.startswith("flax.training"), f"{path} imports {name}")

  def test_only_sharding_and_placement_say_mesh(self):
    """One file makes meshes; one reads the current mesh for kernels, which XLA cannot split by itself."""
    for path, tree in _sources():
      if path not in (PACKAGE / "train" / "sharding.py", PACKAGE / "ops" / "placement.py"):
        said = {i for i in _identifiers(tree) if "mesh" in i.lower().split("_") or i.endswith("Mesh")}
        self.assertEmpty(said, path)

  def test_no_file_for_odds_and_ends(self):
    for path, _ in _sources():
      words = set(path.stem.split("_"))
      if path != ROOT / "configs" / "common.py":
        self.assertEmpty(words & {"utils", "util", "common", "helpers", "helper", "misc"}, path)

  def test_files_stay_readable(self):
    long = [str(path.relative_to(ROOT)) for path, _ in _sources() if len(path.read_text().splitlines()) > 300]
    self.assertEmpty(long)

  def test_public_functions_say_what_they_return(self):
    silent = []
    for path, tree in _sources():
      bodies = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))]
      silent += [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for body in bodies
        for node in body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns is None
      ]
    self.assertEmpty(silent)

  def test_nothing_prints_or_pickles(self):
    for path, tree in _sources():
      called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
      self.assertNotIn("print", called, path)
      self.assertNotIn("pickle", {name.split(".")[0] for name in _imports(tree)}, path)


if __name__ == "__main__":
  absltest.main()
