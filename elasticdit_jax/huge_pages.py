"""Huge pages for the arrays of a CPU.

A training step walks through hundreds of megabytes of activations. In pages of 4 KiB a processor spends a tenth to a
quarter of the step on finding out where they lie. Most Linux systems give pages of 2 MiB to memory that asks for them
("madvise"), and glibc since 2.35 lets malloc ask; it reads that wish from the environment when a process starts.
"""

import os
import sys

_ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"
_TUNABLE = "glibc.malloc.hugetlb"


def restart_with_them() -> None:
  """Starts this program again in its own place, with malloc asking for huge pages, where that changes anything.

  Process number, open files and arguments stay. To be called first thing in a program: what has run before runs again.
  GLIBC_TUNABLES=glibc.malloc.hugetlb=0 in the environment keeps it from happening.
  """
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if _TUNABLE in tunables or not sys.executable or not _on_request():
    return
  os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
  sys.stdout.flush()
  sys.stderr.flush()
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_request() -> bool:
  """Whether the system has huge pages and gives them to those who ask, and not to all or none."""
  try:
    with open(_ENABLED) as f:
      return "[madvise]" in f.read()
  except OSError:
    return False
