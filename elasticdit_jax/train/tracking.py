"""Weights & Biases beside TensorBoard: what a run writes there is shown here as well."""

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from absl import logging

from elasticdit_jax import distributed

_FINISH_SECONDS = 60.0


@contextlib.contextmanager
def mirrored(project: str | None, workdir: str, config: Any) -> Iterator[None]:
  """Sends TensorBoard's events of this run to a project of Weights & Biases, from process 0 alone.

  The run takes the name of the workdir, and every start of one workdir is in the group of that name. wandb's own
  variables decide the rest: WANDB_MODE=offline keeps everything in WANDB_DIR (./wandb) for `wandb sync`, WANDB_RUN_ID
  goes on with an earlier one. Once training has begun nothing of wandb can end it or hold it up for long.

  Args:
    project: its name; None or "" mirrors nothing.
    workdir: of the run; nothing is written there.
    config: a ConfigDict.

  Raises:
    ValueError: where wandb is missing or does not start, or where processes name different projects; before the run
      starts. OSError on the other processes.
  """
  distributed.check_same("--wandb", {"--wandb": project or ""})
  runs: list[Any] = []
  code: int | None = None
  try:
    if project:
      distributed.on_first("--wandb", lambda: runs.append(_start(project, workdir, config)))
    yield
    code = 0
  except SystemExit as e:
    code = e.code if isinstance(e.code, int) else int(e.code is not None)
    raise
  finally:
    # After an error the other processes stay in their collectives until this one is gone.
    if code is not None or not distributed.several():
      for run in runs:
        _finish(run, 1 if code is None else code)


def _start(project: str, workdir: str, config: Any) -> Any:
  name = os.path.basename(os.path.abspath(workdir))
  told = {"project": project, "name": name, "group": name, "config": config.to_dict()}
  try:
    importlib.import_module("tensorboard")  # with which wandb reads tensorboardX's events
    wandb = importlib.import_module("wandb")
    start, failures = wandb.init, (wandb.errors.Error, OSError)
  except (ImportError, AttributeError) as e:  # a ./wandb of earlier runs imports as an empty package
    raise ValueError(f'--wandb: {e}; pip install "elasticdit_jax[wandb]", or leave --wandb out') from e
  try:
    return start(**told, resume="allow", sync_tensorboard=True)
  except failures as e:
    raise ValueError(f"--wandb: {e}; log in with `wandb login`, or set WANDB_MODE=offline") from e


def _finish(run: Any, code: int) -> None:
  def finish() -> None:
    try:
      run.finish(exit_code=code)
    except Exception as e:  # whatever it is, training is over and its files are there
      logging.warning("--wandb: %s; what is missing there can be sent with `wandb sync`", e)

  thread = threading.Thread(target=finish, daemon=True)
  thread.start()
  thread.join(_FINISH_SECONDS)
  if thread.is_alive():
    logging.warning("--wandb: not finished after %.0f s; send the rest with `wandb sync`", _FINISH_SECONDS)
