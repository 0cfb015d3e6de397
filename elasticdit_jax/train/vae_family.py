"""Task `vae` with `config.runs`: several VAEs, one after the other, students after their teachers.

Every run lives in a directory of its own below WORKDIR and stops and resumes there as it would alone; the others are
not touched. The first VAE of each factor is also written to WORKDIR itself, which thereby is what `config.vae` takes.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import codec as codec_lib
from elasticdit_jax.train import vae_report
from elasticdit_jax.train.workdir import check_workdir, claim_workdir

Codecs = Mapping[int, codec_lib.Codec]
Check = Callable[[Any, Codecs | None], codec_lib.Config]
RunOne = Callable[[Any, str, Codecs | None], None]


def members(config: Any) -> dict[str, ConfigDict]:
  """The config of every run, teachers first: what all share, and on top of it what config.runs says under its name.

  Raises:
    ValueError: where runs wait for each other.
  """
  left = {name: _member(config, own) for name, own in config.runs.items()}
  made: dict[str, ConfigDict] = {}
  while left:
    ready = [name for name, member in left.items() if member.get("teacher") not in left]
    if not ready:
      name, member = next(iter(left.items()))
      raise ValueError(
        f"config.runs.{name}.teacher: {member.teacher!r} learns from {name!r} itself, directly or not; name another one"
      )
    made |= {name: left.pop(name) for name in ready}
  return made


def _member(config: Any, own: Any) -> ConfigDict:
  member = config.copy_and_resolve_references().unlock()
  del member.runs
  member.update(own.copy_and_resolve_references())
  return member.lock()


def run(config: Any, workdir: str, check: Check, run_one: RunOne) -> None:
  """Trains (or resumes) all runs of a config.

  Args:
    config: fields shared by all runs, and `runs`, name -> the fields of one. A run whose `teacher` is the name of
      another learns from that.
    workdir: each run gets WORKDIR/NAME.
    check: (config of a run, its teachers or None) -> shape of its VAE.
    run_one: (config of a run, its workdir, its teachers or None) trains it.

  Raises:
    ValueError: for a config or a workdir that does not fit any of the runs; nothing has been written then.
  """
  check_workdir(workdir, config, vae_report.NEUTRAL)
  runs = members(config)
  _check(runs, workdir, check)
  claim_workdir(workdir, config, vae_report.NEUTRAL)
  made: dict[str, dict[int, codec_lib.Codec]] = {}
  for name, member in runs.items():
    logging.info("vae: %s, %d of %d", name, len(made) + 1, len(runs))
    directory = os.path.join(workdir, name)
    run_one(member, directory, made.get(member.get("teacher", "")))
    made[name] = model_dir.load_codecs(directory)
  model_dir.save_codecs(workdir, _first_of_each_factor(made))
  logging.info("vae: all %d are there; use --config.vae=%s", len(runs), workdir)


def _check(runs: Mapping[str, ConfigDict], workdir: str, check: Check) -> None:
  """Everything that can be known before the first step, of every run."""
  promised: dict[str, dict[int, codec_lib.Codec]] = {}
  for name, member in runs.items():
    try:
      check_workdir(os.path.join(workdir, name), member, vae_report.NEUTRAL)
      cfg = check(member, promised.get(member.get("teacher", "")))
    except ValueError as e:
      raise ValueError(f"config.runs.{name}: {e}") from e
    # Of a teacher that is still to be trained only the shape counts here.
    promised[name] = {cfg.factor: codec_lib.Codec(cfg, codec_lib.init_shapes(cfg), None, None)}


def _first_of_each_factor(made: Mapping[str, Codecs]) -> dict[int, codec_lib.Codec]:
  found: dict[int, codec_lib.Codec] = {}
  for codecs in made.values():
    found = {**codecs, **found}
  return found
