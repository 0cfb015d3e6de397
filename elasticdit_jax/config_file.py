"""Config files: finding, loading and checking them. Never imports jax: a config must not touch a device.

A config file holds `get_config(arg=None) -> ConfigDict`; `configs/uwco.py:debug,steps=10` calls it with
"debug,steps=10". A path is tried as it is, then among the config files inside the installed package.
"""

import difflib
import glob
import importlib.util
import os
import re
import types
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags

_PARSERS = {bool: flags.BooleanParser(), int: flags.IntegerParser(), float: flags.FloatParser()}


def available() -> list[str]:
  """The config files of the installed package, as one types them: "configs/uwco.py"."""
  names = sorted(os.path.basename(p) for d in _package_directories() for p in glob.glob(os.path.join(d, "*.py")))
  return [f"configs/{name}" for name in names if name not in ("__init__.py", "common.py")]


def _package_directories() -> list[str]:
  spec = importlib.util.find_spec("elasticdit_jax.configs")
  return list(spec.submodule_search_locations or []) if spec else []


def resolve(path: str) -> str:
  """The file that a path on the command line means.

  Raises:
    ValueError: listing the config files there are.
  """
  candidates = [path]
  if os.path.dirname(path) in ("", "configs"):
    candidates += [os.path.join(d, os.path.basename(path)) for d in _package_directories()]
  for candidate in candidates:
    if os.path.isfile(candidate) and os.path.basename(candidate) != "common.py":
      return candidate
  raise ValueError(
    f"--config: no config file {path!r}, neither here nor in the package; there are {', '.join(available())}"
  )


def load(spec: str) -> ml_collections.ConfigDict:
  """Loads "file.py" or "file.py:arg" and returns its locked config.

  Raises:
    ValueError: for a missing or broken file, or an argument that its `get_config` refuses.
  """
  path, colon, arg = spec.partition(":")
  file = resolve(path)
  try:
    config = _load_module(file).get_config(*([arg] if colon else []))
  except ValueError as e:
    raise ValueError(f"--config={spec}: {e}") from e
  except ModuleNotFoundError as e:
    raise ValueError(f"--config: {file}: {e}; install the package first (pip install -e . in its directory)") from e
  except Exception as e:
    raise ValueError(f"--config: {file} cannot be read: {type(e).__name__}: {e}") from e
  if not isinstance(config, ml_collections.ConfigDict) or "task" not in config:
    raise ValueError(f"--config: get_config of {file} must return a ConfigDict with a field `task`")
  return config.lock()


def _load_module(file: str) -> types.ModuleType:
  spec = importlib.util.spec_from_file_location("config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def check_fields(config: ml_collections.ConfigDict, argv: Sequence[str]) -> None:
  """Raises ValueError for a `--config.a.b=value` on the command line that the config does not have or cannot hold."""
  for match in filter(None, (re.match(r"--?([\w.]+)", arg) for arg in argv)):
    if match[1].split(".")[0] in config:
      raise ValueError(f"{match[0]}: unknown option; did you mean --config.{match[1]}?")
  for match in filter(None, (re.match(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", arg, re.DOTALL) for arg in argv)):
    node, name = config, "config"
    for key in match[1].split("."):
      fields = list(node) if isinstance(node, ml_collections.ConfigDict) else []
      if key not in fields:
        close = difflib.get_close_matches(key, fields, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"--config.{match[1]}: {hint}{name} has {', '.join(fields) or 'no fields'}")
      node, name = node[key], f"{name}.{key}"
    if match[2] is not None and type(node) in _PARSERS:
      try:
        _PARSERS[type(node)].parse(match[2])
      except (TypeError, ValueError):
        raise ValueError(f"--{name}: expected {type(node).__name__} like {node!r}, got {match[2]!r}") from None


def check_overrides(default: Any, config: Any, name: str = "config") -> None:
  """Refuses overrides that exchanged a whole sub-config or the type of a value.

  The command line can replace a sub-config even of a locked config (`--config.train={}`), which would surface as a
  missing attribute in the middle of a run.

  Raises:
    ValueError: naming the field.
  """
  if not isinstance(default, ml_collections.ConfigDict):
    if not _same_kind(default, config):
      raise ValueError(f"--{name}: expected {type(default).__name__} like {default!r}, got {config!r}")
    return
  if not isinstance(config, ml_collections.ConfigDict) or set(config) != set(default):
    raise ValueError(
      f"--{name}: expected the fields {', '.join(default)}; set single ones (--{name}.{min(default)}=...)"
    )
  for field in default:
    check_overrides(default[field], config[field], f"{name}.{field}")


def _same_kind(default: Any, value: Any) -> bool:
  if isinstance(default, tuple):
    return isinstance(value, tuple) and all(_same_kind(default[0], v) for v in value if default)
  if isinstance(default, float) and isinstance(value, int):
    return not isinstance(value, bool)
  return default is None or type(value) is type(default)
