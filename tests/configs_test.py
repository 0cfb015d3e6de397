"""Every config reads without jax, is locked and small, says how to run it, and refuses what it does not know."""

import ast
import json
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

from configs import common
from elasticdit_jax import main

_DIRECTORY = pathlib.Path(__file__).resolve().parent.parent / "configs"
_FILES = sorted(p.stem for p in _DIRECTORY.glob("*.py") if p.stem not in ("__init__", "common"))

# Reads every config with and without arguments in an interpreter where importing jax is an error.
_PROBE = """
import json, sys
sys.modules["jax"] = None
from elasticdit_jax import config_file

def leaves(node):
  return sum(leaves(child) if hasattr(child, "items") else 1 for child in node.values())

report = {}
for name in sys.argv[1:]:
  for arg in ("", ":debug", ":debgu", ":debug,debug"):
    try:
      config = config_file.load(f"configs/{name}.py{arg}")
      report[name + arg] = {"task": config.task, "locked": config.is_locked, "leaves": leaves(config)}
    except ValueError as e:
      report[name + arg] = {"error": str(e)}
sys.stdout.write(json.dumps(report))
"""


class ConfigsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    done = subprocess.run(
      [sys.executable, "-c", _PROBE, *_FILES], capture_output=True, text=True, check=False, cwd=_DIRECTORY.parent
    )
    if done.returncode:
      raise AssertionError(done.stderr)
    cls.report = json.loads(done.stdout)

  def test_every_task_has_a_config(self):
    self.assertContainsSubset(set(main.TASKS), {self.report[name].get("task") for name in _FILES})

  @parameterized.parameters(_FILES)
  def test_reads_without_jax_is_locked_and_small(self, name):
    for arg in ("", ":debug"):
      self.assertNotIn("error", self.report[name + arg], self.report[name + arg])
      self.assertTrue(self.report[name + arg]["locked"])
      self.assertLess(self.report[name + arg]["leaves"], 67 if name.startswith("grpo") else 60)
      self.assertIn(self.report[name + arg]["task"], main.TASKS)

  @parameterized.parameters(_FILES)
  def test_refuses_misspelt_and_repeated_arguments(self, name):
    self.assertRegex(self.report[f"{name}:debgu"]["error"], "unknown argument 'debgu' .*there are: .*debug")
    self.assertIn("given twice", self.report[f"{name}:debug,debug"]["error"])

  @parameterized.parameters(_FILES)
  def test_docstring_holds_the_command(self, name):
    text = ast.get_docstring(ast.parse((_DIRECTORY / f"{name}.py").read_text())) or ""
    self.assertIn(f"python -m elasticdit_jax.main --config=configs/{name}.py", text)


class ParseArgTest(parameterized.TestCase):
  def _parse(self, arg):
    return common.parse_arg(arg, debug=False, cache=True, steps=10, lr=1e-3, data="")

  def test_types_follow_the_defaults(self):
    got = self._parse("debug,cache=false,steps=20,lr=3e-4,data=a/b=c")
    self.assertEqual(dict(got), {"debug": True, "cache": False, "steps": 20, "lr": 3e-4, "data": "a/b=c"})
    for nothing in (None, ""):
      self.assertEqual(dict(self._parse(nothing)), {"debug": False, "cache": True, "steps": 10, "lr": 1e-3, "data": ""})

  @parameterized.parameters(
    ("stesp=3", "unknown argument 'stesp=3' .* debug, cache, steps=<int>, lr=<float>, data=<str>"),
    ("debug,debug", "'debug' is given twice"),
    ("steps=1e3", "'steps=1e3' after the colon: expected steps=<int>"),
    ("steps", "'steps' after the colon: expected steps=<int>"),
    ("lr=fast", "expected lr=<float>"),
    ("debug=maybe", "expected debug=<bool>"),
    ("data", "expected data=<str>"),
    ("debug,", "unknown argument ''"),
  )
  def test_refuses(self, arg, message):
    with self.assertRaisesRegex(ValueError, message):
      self._parse(arg)


if __name__ == "__main__":
  absltest.main()
