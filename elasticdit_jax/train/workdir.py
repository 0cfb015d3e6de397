"""A workdir belongs to one configuration: workdir/config.json says which."""

import fcntl
import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from elasticdit_jax import distributed


def check_workdir(
  workdir: str | os.PathLike, config: Any, neutral: Collection[str] = (), absent: Mapping[str, Any] | None = None
) -> None:
  """Refuses a workdir that holds a run with another configuration; writes nothing.

  Args:
    workdir: may be missing or empty.
    config: a ConfigDict or a mapping that JSON can hold.
    neutral: dotted names (of leaves or of whole sub-configs) that may change between runs: "train.log_every".
    absent: dotted names of fields that came or went with a later version, and what a run without them does.

  Raises:
    ValueError: naming the fields that differ, the old and the new values, and the remedy; or for a file.
  """
  if os.path.exists(workdir) and not os.path.isdir(workdir):
    raise ValueError(f"workdir: {os.fspath(workdir)} is a file; choose another --workdir")
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path):
    return
  try:
    with open(path) as f:
      old = {**(absent or {}), **_leaves(json.load(f))}
  except (ValueError, AttributeError) as e:
    raise ValueError(f"workdir: {path} is no readable JSON ({e}); restore it or choose another --workdir") from e
  new = {**(absent or {}), **_leaves(_plain(config))}
  missing = "(not set)"
  differences = [
    f"{name}: {old.get(name, missing)!r} -> {new.get(name, missing)!r}"
    for name in sorted(old.keys() | new.keys())
    if old.get(name, missing) != new.get(name, missing)
    and not any(name == n or name.startswith(f"{n}.") for n in neutral)
  ]
  if differences:
    rest = f" and {len(differences) - 6} more" if len(differences) > 6 else ""
    raise ValueError(
      f"workdir: {os.fspath(workdir)} belongs to a run with another configuration (old -> new): "
      f"{'; '.join(differences[:6])}{rest}; choose another --workdir, or give the old values to go on with that run"
    )


def claim_workdir(
  workdir: str | os.PathLike, config: Any, neutral: Collection[str] = (), absent: Mapping[str, Any] | None = None
) -> None:
  """`check_workdir`, then creates the directory and writes config.json, on process 0.

  Raises:
    ValueError: see check_workdir; or where processes see different disks.
  """
  check_workdir(workdir, config, neutral, absent)
  path = os.path.join(workdir, "config.json")
  distributed.on_first("workdir", lambda: _write(path, _plain(config)))
  absent = [i for i, seen in enumerate(distributed.exchange("workdir", str(os.path.exists(path)))) if seen == "False"]
  if absent:
    raise ValueError(
      f"workdir: {os.fspath(workdir)} of process 0 is not there on process {absent[0]}; give a --workdir on a disk that"
      " all hosts share"
    )


def lock(directory: str, workdir: str) -> int:
  """Takes a directory for this process until the returned descriptor is closed, or the process ends in any way.

  Raises:
    ValueError: where another process has it.
  """
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    raise ValueError(
      f"workdir: another process is training in {workdir}; wait for it, stop it, or choose another --workdir"
    ) from None
  except OSError:
    pass  # some network disks know no locks
  return descriptor


def _write(path: str, values: Any) -> None:
  os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  with open(f"{path}.partial", "w") as f:
    json.dump(values, f, indent=1)
    f.write("\n")
  os.replace(f"{path}.partial", path)


def flat_fields(config: Any) -> dict[str, Any]:
  """Dotted name -> value of every leaf of a config."""
  return _leaves(_plain(config))


def _plain(config: Any) -> Any:
  return json.loads(config.to_json() if hasattr(config, "to_json") else json.dumps(config))


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
  if isinstance(node, dict) and node:
    return {
      k: v for name, child in node.items() for k, v in _leaves(child, f"{prefix}.{name}" if prefix else name).items()
    }
  return {prefix: node}
