"""Commands in launch/ and docs/pods.md name configs and fields that exist, and set the environment only."""

import re

from absl.testing import absltest, parameterized

from elasticdit_jax import config_file
from tests.launch import cases

_FILES = sorted(p for p in cases.LAUNCH.rglob("*") if p.is_file()) + [cases.LAUNCH.parent / "docs" / "pods.md"]
# Where files are, how devices are laid out and how much they compute at a time; the rest belongs into configs/.
_ENVIRONMENT = re.compile(r"(data\.path|vae|init|mesh\.\w+|rollout\.batch|train\.save_every)")


def _commands(text):
  """(config, fields) of every command: the words from --config=... to the end of its line or list."""
  for command in re.split(r"(?=--config=configs/)", text)[1:]:
    spec = re.match(r"--config=([\w./:,=]+)", command)[1]
    block = re.split(r"\n\s*\n|```", command)[0]
    yield spec, re.findall(r"(?<![\w.])--config\.[^\s\"']+", block)


class CommandsTest(parameterized.TestCase):
  @parameterized.parameters(*[(str(p.relative_to(cases.LAUNCH.parent)),) for p in _FILES if p.exists()])
  def test_parser_takes_them(self, name):
    for spec, overrides in _commands((cases.LAUNCH.parent / name).read_text()):
      config = config_file.load(spec)
      config_file.check_fields(config, overrides)
      for field in overrides:
        path = re.match(r"--config\.([\w.]+)", field)[1]
        self.assertRegex(path, rf"^{_ENVIRONMENT.pattern}$", f"{name}: {field}")

  def test_there_are_some(self):
    found = [spec for path in _FILES if path.exists() for spec, _ in _commands(path.read_text())]
    self.assertGreaterEqual(found.count("configs/uwco.py:paper"), 4)


if __name__ == "__main__":
  absltest.main()
