"""A case of a benchmark in a process of its own."""

import json
import subprocess
import sys
from typing import Any


def run(script: str, case: dict[str, Any], timeout: int) -> dict[str, Any]:
  """What `script --case=JSON` prints as its last line, or {"error": why}.

  A compiler reads its flags once per process; it may need many GB, fail, or take for ever.

  Args:
    script: path of a Python file.
    case: handed over as JSON.
    timeout: seconds.
  """
  command = [sys.executable, script, f"--case={json.dumps(case)}"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
  except subprocess.TimeoutExpired:
    return {"error": f"no result within {timeout} s"}
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines:
    reason = [line for line in done.stderr.splitlines() if "Error" in line or "RESOURCE" in line]
    return {"error": (reason or ["the compiler stopped"])[-1][:400]}
  return json.loads(lines[-1])
