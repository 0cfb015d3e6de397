"""A workdir belongs to one configuration: workdir/config.json says which."""

import json
import os
from collections.abc import Collection
from typing import Any

import jax


def check_workdir(workdir: str | os.PathLike, config: Any, neutral: Collection[str] = ()) -> None:
  """Refuses a workdir that holds a run with another configuration; writes nothing.

  Args:
    workdir: may be missing or empty.
    config: a ConfigDict or a mapping that JSON can hold.
    neutral: dotted names (of leaves or of whole sub-configs) that may change between runs: "train.log_every".

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
      old = _leaves(json.load(f))
  except (ValueError, AttributeError) as e:
    raise ValueError(f"workdir: {path} is no readable JSON ({e}); restore it or choose another --workdir") from e
  new = _leaves(_plain(config))
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


def claim_workdir(workdir: str | os.PathLike, config: Any, neutral: Collection[str] = ()) -> None:
  """`check_workdir`, then creates the directory and writes config.json."""
  check_workdir(workdir, config, neutral)
  os.makedirs(workdir, exist_ok=True)
  if jax.process_index() == 0:
    path = os.path.join(workdir, "config.json")
    with open(f"{path}.partial", "w") as f:
      json.dump(_plain(config), f, indent=1)
      f.write("\n")
    os.replace(f"{path}.partial", path)


def _plain(config: Any) -> Any:
  return json.loads(config.to_json() if hasattr(config, "to_json") else json.dumps(config))


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
  if isinstance(node, dict) and node:
    return {
      k: v for name, child in node.items() for k, v in _leaves(child, f"{prefix}.{name}" if prefix else name).items()
    }
  return {prefix: node}
