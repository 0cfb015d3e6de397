"""A backbone, codecs and batches of a few thousand numbers for the tests of this room."""

import contextlib
import pathlib
import tempfile
from unittest import mock

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from configs import common, uwco
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import dit
from elasticdit_jax.types import Batch, Text
from tests.evals import tiny_model

FLOW = {"mean": 0.0, "std": 1.0, "shift": 2.0, "tokens": 16}


def config(workdir: pathlib.Path, factors: tuple[int, ...] = (8, 16), **phases: int) -> ConfigDict:
  """The uwco config with the small backbone, random VAEs, 64 px, no scores; phases by name."""
  vae = workdir.parent / "vae"
  model = tiny_model.make(factors)
  model_dir.save_codecs(vae, model.codecs)
  made = uwco.get_config("debug").unlock()
  made.init, made.vae = "", str(vae)
  made.data.update({"batch_size": 2, "text_dim": model.cfg.text_dim})
  made.lite.skip = 1
  made.report.update({"per_task": 0, "steps": 1, "pictures": 1})
  made.train.update({"log_every": 1, "save_every": 3})
  for name, phase in made.phases.items():
    phase.steps = phases.get(name, 0)
  return made.lock()


def small_backbone() -> contextlib.AbstractContextManager:
  """While active, model size "tiny" means the backbone of tests/evals/tiny_model.py."""
  return mock.patch.dict(dit.SIZES, {"tiny": tiny_model.make(()).cfg})


def new_workdir(test) -> pathlib.Path:
  """WORKDIR inside a directory that the test removes."""
  folder = tempfile.TemporaryDirectory()
  test.addCleanup(folder.cleanup)
  return pathlib.Path(folder.name) / "run"


def reuse_programs(test) -> None:
  """Until the test ends, a program that was compiled once is not compiled again: a second run starts at once."""
  folder = tempfile.TemporaryDirectory()
  values = {
    "jax_compilation_cache_dir": folder.name,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in values}

  def restore() -> None:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    folder.cleanup()

  test.addCleanup(restore)
  for name, value in values.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def batch(cfg: dit.DiTConfig, rows: int = 4, size: int = 64, seed: int = 0) -> Batch:
  """Random pictures and captions."""
  rng = np.random.default_rng(seed)
  text = Text(
    rng.normal(size=(rows, cfg.text_length, cfg.text_dim)).astype(np.float32), np.ones((rows, cfg.text_length), bool)
  )
  return Batch(rng.integers(0, 256, (rows, size, size, 3), np.uint8), text, np.zeros(rows, np.int32))


def same(test, a, b) -> None:
  """Every leaf bit for bit."""
  jax.tree.map(lambda x, y: test.assertEqual(np.asarray(x).tobytes(), np.asarray(y).tobytes()), a, b)


optimizer = common.adamw
