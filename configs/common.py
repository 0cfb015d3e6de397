"""What follows the colon in `--config=configs/TASK.py:debug,steps=10`, and nothing else."""

from typing import Any

from ml_collections import ConfigDict

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses a config argument strictly.

  Args:
    arg: comma-separated `key=value`; a bare `key` sets a switch. None or "" gives the defaults.
    **defaults: every key there is, with its default (bool, int, float or str), which also fixes its type.

  Returns:
    A locked ConfigDict with the keys of `defaults`.

  Raises:
    ValueError: for an unknown, repeated or badly typed key; the message lists what there is.
  """
  values: dict[str, Any] = {}
  for item in arg.split(",") if arg else []:
    key, equals, text = item.partition("=")
    if key not in defaults:
      choices = ", ".join(k if isinstance(v, bool) else f"{k}=<{type(v).__name__}>" for k, v in defaults.items())
      raise ValueError(f"unknown argument {item!r} after the colon; there are: {choices or 'none'}")
    if key in values:
      raise ValueError(f"argument {key!r} is given twice")
    values[key] = _parse_value(key, text if equals else None, defaults[key])
  return ConfigDict(defaults | values).lock()


def _parse_value(key: str, text: str | None, default: Any) -> Any:
  kind = type(default)
  if kind not in (bool, int, float, str):
    raise TypeError(f"parse_arg: default of {key!r} must be bool, int, float or str, got {default!r}")
  if text is None and kind is bool:
    return True
  try:
    if text is not None:
      return _BOOLEANS[text.lower()] if kind is bool else kind(text)
  except (KeyError, ValueError):
    pass
  given = key if text is None else f"{key}={text}"
  raise ValueError(f"argument {given!r} after the colon: expected {key}=<{kind.__name__}>")
