"""What README, docs and notebook show works: Python compiles, configs load, fields exist, links lead somewhere."""

import json
import pathlib
import re
import shlex

from absl.testing import absltest, parameterized

from elasticdit_jax import config_file

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_README = _ROOT / "README.md"
_NOTEBOOK = _ROOT / "colab" / "quickstart.ipynb"
_DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((_ROOT / "docs").glob("*.md")))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CONFIG = re.compile(r"--config=([\w./]+(?::[\w=.,/-]+)?)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:\.ci|colab|configs|docs|elasticdit_jax|tests)(?:/[\w.]+)*/?)`")
_INLINE = re.compile(r"`([^`\n]*elasticdit_jax\.main --config=[^`\n]*)`")
# Modules behind `python -m`: each must exist.
_MODULE = re.compile(r"python3? -m (elasticdit_jax[\w.]*)")


def _read(document):
  return (_ROOT / document).read_text(encoding="utf-8")


def _blocks(text, language):
  return [code for name, code in _FENCE.findall(text) if name == language]


def _cells(kind):
  cells = json.loads(_NOTEBOOK.read_text(encoding="utf-8"))["cells"]
  return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def _commands(text):
  """Argument lists of the `python -m elasticdit_jax.main --config=...` commands in code blocks and in the text."""
  for code in [*_blocks(text, "bash"), *_INLINE.findall(text)]:
    for line in code.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      if "elasticdit_jax.main" in words:
        yield words[words.index("elasticdit_jax.main") + 1 :]


class DocumentsTest(parameterized.TestCase):
  @parameterized.parameters(_DOCUMENTS)
  def test_python_compiles(self, document):
    for code in _blocks(_read(document), "python"):
      compile(code, document, "exec")

  @parameterized.parameters(_DOCUMENTS)
  def test_configs_load_and_have_the_fields(self, document):
    text = _read(document)
    for spec in _CONFIG.findall(text):
      config_file.load(spec)
    for arguments in _commands(text):
      specs = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
      self.assertLen(specs, 1, arguments)
      config_file.check_fields(config_file.load(specs[0]), arguments)

  @parameterized.parameters(_DOCUMENTS)
  def test_links_and_paths_exist(self, document):
    text = _read(document)
    for link in _LINK.findall(text):
      if "://" not in link:
        target, _, anchor = link.partition("#")
        path = (_ROOT / document).parent / target if target else _ROOT / document
        self.assertTrue(path.exists(), f"{document}: {link}")
        if anchor:
          headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
          anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
          self.assertIn(anchor, anchors, f"{document}: {link}")
    for path in _PATH.findall(text):
      self.assertTrue((_ROOT / path).exists(), f"{document}: {path}")
    for module in _MODULE.findall(text):
      self.assertTrue((_ROOT / f"{module.replace('.', '/')}.py").exists(), f"{document}: {module}")

  def test_code_blocks_name_their_language_or_are_drawings(self):
    for document in _DOCUMENTS:
      for name, code in _FENCE.findall(_read(document)):
        self.assertIn(name, ("", "bash", "bibtex", "json", "python"), code)
        if name == "json":
          json.loads(code)


class ReadmeTest(absltest.TestCase):
  def test_is_short(self):
    self.assertLessEqual(len(_README.read_text(encoding="utf-8").splitlines()), 200)

  def test_has_one_line_per_command_for_a_fresh_machine(self):
    lines = [line for line in _README.read_text(encoding="utf-8").splitlines() if line.startswith("python3 -m venv ")]
    self.assertLen(lines, 2)
    self.assertRegex(lines[0], r" && pip install -e \. && .* --config=configs/uwco\.py$")
    self.assertRegex(lines[1], r' && pip install -e "\.\[test\]" && python -m pytest -n 2 ')

  def test_first_python_block_is_ten_lines(self):
    code = _blocks(_README.read_text(encoding="utf-8"), "python")
    self.assertLen(code, 1)
    self.assertLessEqual(len(code[0].splitlines()), 10)


class NotebookTest(absltest.TestCase):
  def test_is_a_notebook_without_outputs(self):
    notebook = json.loads(_NOTEBOOK.read_text(encoding="utf-8"))
    self.assertEqual(notebook["nbformat"], 4)
    self.assertEqual(notebook["metadata"]["kernelspec"]["name"], "python3")
    ids = [cell["id"] for cell in notebook["cells"]]
    self.assertLen(set(ids), len(ids))
    for cell in notebook["cells"]:
      if cell["cell_type"] == "code":
        self.assertEqual(cell["outputs"], [])
        self.assertIsNone(cell["execution_count"])

  def test_code_compiles(self):
    for code in _cells("code"):
      # Lines for IPython: %pip and the like.
      compile(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.MULTILINE), str(_NOTEBOOK), "exec")

  def test_every_step_is_explained(self):
    self.assertGreaterEqual(len(_cells("markdown")), len(_cells("code")) - 1)

  def test_configs_and_links_exist(self):
    text = "\n".join(_cells("code") + _cells("markdown"))
    specs = re.findall(r"config_file\.load\(\"([^\"]+)\"\)", text)
    self.assertNotEmpty(specs)
    for spec in specs:
      config_file.load(spec)
    for link in _LINK.findall(text):
      if "://" not in link:
        self.assertTrue((_NOTEBOOK.parent / link).exists(), link)


if __name__ == "__main__":
  absltest.main()
