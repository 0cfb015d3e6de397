"""setup.cfg names every room and every library the package imports."""

import ast
import configparser
import pathlib
import re
import sys

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
# Import name -> distribution, where they differ.
_DISTRIBUTIONS = {
  "PIL": "pillow",
  "absl": "absl-py",
  "ml_collections": "ml-collections",
  "orbax": "orbax-checkpoint",
  "pywt": "pywavelets",
}


class PackagingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.setup = configparser.ConfigParser()
    self.setup.read(_ROOT / "setup.cfg")

  def _lines(self, section, key):
    return self.setup[section][key].split("\n")[1:]

  def test_every_room_is_packaged(self):
    rooms = {str(p.parent.relative_to(_ROOT)).replace("/", ".") for p in _ROOT.glob("elasticdit_jax/**/*.py")}
    self.assertEqual(set(self._lines("options", "packages")), rooms | {"elasticdit_jax.configs"})

  def test_every_import_is_a_dependency(self):
    named = {re.split("[<>=]", line)[0] for line in self._lines("options", "install_requires")}
    for path in [*_ROOT.glob("elasticdit_jax/**/*.py"), *_ROOT.glob("configs/*.py")]:
      for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
          modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
          modules = [node.module]
        for module in (m.split(".")[0] for m in modules):
          if module != "elasticdit_jax" and module not in sys.stdlib_module_names:
            self.assertIn(_DISTRIBUTIONS.get(module, module), named, path)

  def test_no_dependency_has_an_upper_bound(self):
    for line in self._lines("options", "install_requires"):
      self.assertRegex(line, r"^[\w.-]+>=[\d.]+$")


if __name__ == "__main__":
  absltest.main()
