"""A program that asks for huge pages: once, where there are some, with the arguments it was given."""

import os
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from elasticdit_jax import huge_pages

_PROGRAM = """
import os, sys
from elasticdit_jax import huge_pages
huge_pages._ENABLED = sys.argv[1]
huge_pages.restart_with_them()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], sys.flags.dev_mode)
"""


class HugePagesTest(parameterized.TestCase):
  def _run(self, enabled, tunables=None):
    """What the program prints, and the process number it was started under."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {} if tunables is None else {"GLIBC_TUNABLES": tunables}
    with tempfile.NamedTemporaryFile("w") as f:
      f.write(enabled)
      f.flush()
      command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", _PROGRAM, f.name, "a b", ""]
      process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
      return process.communicate(timeout=60)[0].strip(), process.pid

  @parameterized.parameters(
    ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
    ("always [madvise] never", "glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
    ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ("[always] madvise never", None, "None"),
    ("always madvise [never]", None, "None"),
  )
  def test_starts_again_only_where_it_helps(self, enabled, before, after):
    printed, number = self._run(enabled, before)
    self.assertEqual(printed, f"{number} {after} ['a b', ''] True")

  def test_other_systems(self):
    with (
      mock.patch.object(huge_pages, "_ENABLED", "/no/such/file"),
      mock.patch.object(os, "execv", side_effect=AssertionError("started again")),
    ):
      huge_pages.restart_with_them()


if __name__ == "__main__":
  absltest.main()
