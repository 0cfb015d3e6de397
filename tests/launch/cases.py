"""Runs launch scripts with stand-ins for the programs they call."""

import os
import pathlib
import subprocess

LAUNCH = pathlib.Path(__file__).resolve().parent.parent.parent / "launch"

# Writes its arguments, one line per call, then does what the test wants.
_STAND_IN = """#!/usr/bin/env bash
(IFS=$'\\t'; printf '%s\\n' "$*" >>"$0.calls")
{body}
"""


class StandIns:
  """A directory at the front of PATH whose programs record how they are called."""

  def __init__(self, directory: str):
    self._directory = pathlib.Path(directory)

  def add(self, name: str, body: str = "") -> None:
    path = self._directory / name
    path.write_text(_STAND_IN.format(body=body))
    path.chmod(0o755)

  def calls(self, name: str) -> list[list[str]]:
    """The arguments of every call, in order."""
    file = self._directory / f"{name}.calls"
    return [line.split("\t") for line in file.read_text().splitlines()] if file.exists() else []

  def environment(self, **values: str) -> dict[str, str]:
    return {"PATH": f"{self._directory}:{os.environ['PATH']}", "HOME": str(self._directory), **values}

  def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
      ["bash", str(LAUNCH / script), *arguments],
      env=self.environment(**environment),
      cwd=self._directory,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    process = self.start(script, *arguments, **environment)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
