"""Tests compile a lot and compute little: on CPU, XLA's cheapest code generation halves their time."""

import os
import unittest

if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()


class _Releasing(unittest.TestSuite):
  """The tests of a module; the programs they compiled are given back at its end.

  A process may hold some 65,000 memory maps, and all tests together compile more than that.
  """

  def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
    """As the base class."""
    import jax  # here, because the flags above must be set before

    super().run(result, debug)
    jax.clear_caches()
    return result


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
  """Called by unittest's discovery: all tests below this directory."""
  here = os.path.dirname(os.path.abspath(__file__))
  found = loader.discover(here, pattern or "*_test.py", os.path.dirname(here))
  return unittest.TestSuite([tests, *map(_releasing, found)])


def _releasing(found: unittest.TestSuite | unittest.TestCase) -> unittest.TestSuite | unittest.TestCase:
  """The same tests, with a releasing suite wherever a suite holds the classes of a module."""
  if not isinstance(found, unittest.TestSuite):
    return found
  cases = [test for suite in found if isinstance(suite, unittest.TestSuite) for test in suite]
  kind = _Releasing if any(isinstance(case, unittest.TestCase) for case in cases) else unittest.TestSuite
  return kind(map(_releasing, found))
