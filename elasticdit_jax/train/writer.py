"""TensorBoard events: scalars, pictures and texts, on the first process only."""

import concurrent.futures
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX


class Writer:
  """Writes events.out.tfevents... into a workdir; use it as a context manager.

  Args:
    workdir: must exist.
    start: first step of this start of the run; TensorBoard drops what an interrupted start wrote beyond it.
  """

  def __init__(self, workdir: str | os.PathLike, start: int = 0):
    self._events = None
    if jax.process_index() == 0:
      self._events = tensorboardX.SummaryWriter(os.fspath(workdir), purge_step=start, flush_secs=30)
    self._encoder = concurrent.futures.ThreadPoolExecutor(1)  # PNG encoding takes seconds; training goes on
    self._encoding: list[concurrent.futures.Future] = []

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self.close()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one number per name; "/" in a name groups the charts."""
    if self._events:
      for name, value in values.items():
        self._events.add_scalar(name, float(value), step)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3], in the background.

    Raises:
      ValueError: for another shape or dtype.
    """
    image = np.array(image)  # a copy: the caller may reuse its buffer
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      raise ValueError(f"Writer.image {name!r}: expected uint8 [H, W, 3], got {image.dtype} {image.shape}")
    if self._events:
      self._encoding.append(self._encoder.submit(self._events.add_image, name, image, step, dataformats="HWC"))

  def text(self, step: int, name: str, text: str) -> None:
    """Writes a Markdown text."""
    if self._events:
      self._events.add_text(name, text, step)

  def close(self) -> None:
    """Waits for the pictures and writes everything out."""
    self._encoder.shutdown(wait=True)
    for picture in self._encoding:
      picture.result()
    self._encoding.clear()
    if self._events:
      self._events.close()
