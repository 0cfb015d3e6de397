"""Compiled programs are given back after every module.

A process may hold some 65,000 memory maps, and all tests together compile more than that.
"""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _release_programs() -> Iterator[None]:
  import jax  # here, because tests/__init__.py sets XLA's flags before

  yield
  jax.clear_caches()
