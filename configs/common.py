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


def scenes_data(*, seed: int, size: int, batch_size: int) -> ConfigDict:
  """The `data` section of a config: rendered scenes, or with `source="folder"` the captioned pictures under `path`."""
  return ConfigDict(
    {
      "source": "scenes",
      "tasks": "",  # of scenes, say "counting=2,position=1"; empty: as the weights inside the package saw them
      "path": "",
      "size": size,
      "caption_field": "text",
      "max_bad_fraction": 0.05,
      "seed": seed,
      "batch_size": batch_size,
      "caption_dropout": 0.1,
      "text_length": 8,
      "text_dim": 64,
      "max_words": 20_000,
    }
  )


def adamw(*, learning_rate: float, warmup_steps: int, decay_fraction: float, weight_decay: float) -> ConfigDict:
  """The `optimizer` section of a config; set `name` to "muon" for Muon on the matrices inside blocks."""
  return ConfigDict(
    {
      "name": "adamw",
      "learning_rate": learning_rate,
      "warmup_steps": warmup_steps,
      "decay_fraction": decay_fraction,
      "weight_decay": weight_decay,
      "b1": 0.9,
      "b2": 0.99,
      "clip_norm": 1.0,
    }
  )


def devices_and_guard() -> ConfigDict:
  """The sections `mesh` and `guard` of a training config; as they are, they suit one device and one host."""
  return ConfigDict(
    {
      # Sizes of the axes (train/sharding.py); the batch is split over all other devices. -1: all that are left.
      "mesh": {"fsdp": 1, "tensor": 1},
      "guard": {
        "rollbacks": 0,  # after NaN or infinity: times to go back to the last checkpoint and pass over the data since
        "spike": 0.0,  # leaves out updates whose loss is above this many times its mean; 0: none
        "hang_seconds": 1800.0,  # without a step: all stacks go to the log; 0: never
      },
    }
  )


def tiny_elastic(*, batch_size: int) -> ConfigDict:
  """Everything but task, init and phases of a training run of the `tiny` backbone on rendered scenes."""
  config = ConfigDict()
  config.task = ""
  config.seed = 0
  config.init = ""
  config.vae = "shipped"
  config.model = ConfigDict({"size": "tiny", "remat": "none", "dtype": "float32"})
  config.data = scenes_data(seed=0, size=128, batch_size=batch_size)
  config.flow = ConfigDict({"mean": 0.0, "std": 1.2, "shift": 10.0, "tokens": 64})
  config.optimizer = adamw(learning_rate=3e-3, warmup_steps=50, decay_fraction=0.3, weight_decay=0.01)
  config.optimizer.name = "muon"
  config.lite = ConfigDict({"skip": 2})
  config.train = ConfigDict(
    {
      "ema_decay": 0.998,
      "distill": 0.0,
      "accumulate": 1,  # parts of a batch, one after the other
      "log_every": 50,
      "save_every": 500,
      "keep": 2,
      "validation_batches": 4,
      "profile": "",  # "100:110" writes a profile of those steps for XProf
    }
  )
  config.update(devices_and_guard())
  config.report = ConfigDict({"per_task": 20, "steps": 20, "guidance": 3.0, "pictures": 8})
  return config


def shrink(config: ConfigDict) -> None:
  """The `:debug` variant: the same path through the code in a minute."""
  config.data.update({"size": 64, "batch_size": 8})
  for phase in config.phases.values():
    phase.steps = min(phase.steps, 6)
  # Phases of 6 steps, saved at their ends; 9 is one save inside a phase.
  config.train.update({"log_every": 2, "save_every": 9, "validation_batches": 1})
  # As many pictures at a time as the scores draw: one program for both.
  config.report.update({"per_task": 1, "steps": 4, "pictures": 8})
