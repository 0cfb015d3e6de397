"""What a program of this directory found, read by its test."""

import json
import os
import subprocess
import sys
from typing import Any


def read(name: str) -> dict[str, Any]:
  """Runs tests.multi_device.NAME in a process of its own, because devices are counted when JAX starts."""
  command = [sys.executable, "-m", f"tests.multi_device.{name}"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
  if done.returncode:
    raise AssertionError(done.stderr)
  return json.loads(done.stdout)
