"""Weights & Biases beside TensorBoard: what a run writes there is shown here as well."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

from elasticdit_jax.train import distributed


@contextlib.contextmanager
def mirrored(project: str | None, workdir: str, config: Any) -> Iterator[None]:
  """Sends TensorBoard's events of this run to a project of Weights & Biases, from process 0 alone.

  The run takes the name of the workdir, and every start of one workdir is in the group of that name. wandb's own
  variables decide the rest: WANDB_MODE=offline keeps everything in WANDB_DIR (./wandb) for `wandb sync`, WANDB_RUN_ID
  goes on with an earlier one.

  Args:
    project: its name; None or "" mirrors nothing. Every process gives the same.
    workdir: of the run; nothing is written there.
    config: a ConfigDict.

  Raises:
    ValueError: where wandb is missing or does not start, before the run does; OSError on the other processes.
  """
  runs: list[Any] = []
  if project:
    distributed.on_first("--wandb", lambda: runs.append(_start(project, workdir, config)))
  code = 1
  try:
    yield
    code = 0
  except SystemExit as e:
    code = int(e.code or 0) if isinstance(e.code, int | None) else 1
    raise
  finally:
    for run in runs:
      run.finish(exit_code=code)


def _start(project: str, workdir: str, config: Any) -> Any:
  try:
    importlib.import_module("tensorboard")  # with which wandb reads tensorboardX's events
    wandb = importlib.import_module("wandb")
  except ImportError as e:
    raise ValueError(f'--wandb: {e.name} is missing; pip install "elasticdit_jax[wandb]", or leave --wandb out') from e
  name = os.path.basename(os.path.abspath(workdir))
  try:
    return wandb.init(
      project=project, name=name, group=name, config=config.to_dict(), resume="allow", sync_tensorboard=True
    )
  except (wandb.errors.Error, OSError) as e:
    raise ValueError(f"--wandb: {e}; log in with `wandb login`, or set WANDB_MODE=offline") from e
