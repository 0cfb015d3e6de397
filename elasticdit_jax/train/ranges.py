"""Ranges of config values, checked before a run writes anything: a bad one would only fail in the middle of it."""

import math
from collections.abc import Callable
from typing import Any


def _at_least(least: float) -> Callable[[float], bool]:
  return lambda x: least <= x < math.inf


# Field of a training config -> what it must satisfy, in code and in words.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
  "seed": (lambda x: 0 <= x < 2**32, "a number from 0 to 4294967295"),
  "data.size": (lambda x: 0 < x <= 16384, "1 to 16384 pixels"),
  "data.batch_size": (_at_least(1), "at least 1 picture"),
  "data.caption_dropout": (lambda x: 0 <= x <= 1, "a share in [0, 1]"),
  "data.max_bad_fraction": (lambda x: 0 <= x <= 1, "a share in [0, 1]"),
  "data.text_length": (_at_least(1), "at least 1 word"),
  "data.text_dim": (_at_least(1), "at least 1 feature"),
  "data.max_words": (_at_least(1), "at least 1 word"),
  "flow.mean": (math.isfinite, "a finite number"),
  "flow.std": (lambda x: 0 < x < math.inf, "a positive number"),
  "flow.shift": (lambda x: 0 < x < math.inf, "a positive number"),
  "flow.tokens": (_at_least(1), "at least 1 token"),
  "loss.l1": (_at_least(0), "zero or a positive number"),
  "loss.noise": (_at_least(0), "zero or a positive number"),
  "loss.energy": (_at_least(0), "zero or a positive number"),
  "stage1.steps": (_at_least(1), "at least 1 step"),
  "stage1.l1": (_at_least(0), "zero or a positive number"),
  "stage1.noise": (_at_least(0), "zero or a positive number"),
  "stage1.energy": (_at_least(0), "zero or a positive number"),
  "stage2.steps": (_at_least(1), "at least 1 step"),
  "stage2.l2": (_at_least(0), "zero or a positive number"),
  "stage2.l1": (_at_least(0), "zero or a positive number"),
  "stage2.perceptual": (_at_least(0), "a weight, or 0 for none"),
  "stage2.gan": (_at_least(0), "a weight, or 0 for no critic"),
  "stage2.gan_start": (_at_least(0), "a number of steps within stage 2"),
  "stage2.noise": (_at_least(0), "zero or a positive number"),
  "critic.learning_rate": (lambda x: 0 < x < math.inf, "a positive number"),
  "critic.b1": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
  "report.per_task": (_at_least(0), "a number of prompts, or 0 for no scores"),
  "report.steps": (_at_least(1), "at least 1 step"),
  "report.guidance": (_at_least(0), "a finite number of at least 0; 1 switches guidance off"),
  "report.pictures": (_at_least(1), "at least 1 picture"),
  "train.steps": (_at_least(1), "at least 1 step"),
  "train.ema_decay": (lambda x: 0 <= x < 1, "a share in [0, 1)"),
  "train.distill": (_at_least(0), "a weight, or 0 for no distillation"),
  "train.log_every": (_at_least(1), "at least 1 step"),
  "train.save_every": (_at_least(1), "at least 1 step"),
  "train.keep": (_at_least(1), "at least 1 checkpoint"),
  "train.validation_batches": (_at_least(1), "at least 1 batch"),
  "train.accumulate": (_at_least(1), "at least 1 part of a batch"),
  "guard.rollbacks": (_at_least(0), "a number of times, or 0 to stop at once"),
  "guard.spike": (lambda x: x == 0 or 1 < x < math.inf, "a factor above 1, or 0 for no guard against spikes"),
  "guard.hang_seconds": (_at_least(0), "seconds, or 0 for never"),
}


def check_ranges(config: Any) -> None:
  """Checks the fields of a training config; those it does not have are passed over.

  Raises:
    ValueError: naming the first field outside its range, what it got and what it expected.
  """
  for field, (good, expected) in _RANGES.items():
    section, _, name = field.rpartition(".")
    value = (config.get(section, {}) if section else config).get(name)
    if value is not None and not good(value):
      raise ValueError(f"config.{field}: expected {expected}, got {value!r}")
