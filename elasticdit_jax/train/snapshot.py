"""What a run measures at the ends of its phases, kept as files so that an interrupted run still tells the whole story.

WORKDIR/snapshots/<step>.json   scores and validation loss of every route, and the importance analysis
WORKDIR/snapshots/<step>.npz    the fixed prompts drawn by the lite routes
"""

import dataclasses
import glob
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from elasticdit_jax import distributed
from elasticdit_jax.elastic import Route
from elasticdit_jax.evals import pictures, profile, report, scene_eval
from elasticdit_jax.evals.validation import Validation
from elasticdit_jax.generate import Pipeline
from elasticdit_jax.interop import model_dir
from elasticdit_jax.train.importance import Importance
from elasticdit_jax.train.job import Job
from elasticdit_jax.train.writer import Writer

_PICTURE_SEED = 1
_PATIENCE_SECONDS = 6 * 3600.0  # other processes wait while the first one draws


class Snapshots:
  """Takes snapshots of a run and writes its final report."""

  def __init__(self, job: Job, writer: Writer):
    self._job, self._writer = job, writer
    self._validation: Validation | None = None
    self._directory = os.path.join(job.workdir, "snapshots")
    os.makedirs(self._directory, exist_ok=True)

  def take(
    self,
    step: int,
    label: str,
    params: Any,
    routes: Mapping[str, Route],
    importance: Importance | None,
  ) -> None:
    """Evaluates every route and writes both files; all processes must call it, process 0 draws and writes."""
    begin = time.perf_counter()
    pipeline = Pipeline(self._job.model(self._job.layout.local(params), routes, {}))
    if self._validation is None:
      self._validation = self._job.validation()
    found = {}
    for name, route in pipeline.routes.items():
      by_time = self._validation.by_time(params, route)
      found[name] = {
        "active_blocks": len(route.active),
        "loss": float(by_time.mean()),
        "loss_by_time": by_time.tolist(),
      }
    record = {"step": step, "label": label, "routes": found}
    if importance is not None:
      record["importance"] = dataclasses.asdict(importance)
    distributed.on_first(f"snapshot {label}", lambda: self._draw_and_write(pipeline, record, begin), _PATIENCE_SECONDS)

  def _draw_and_write(self, pipeline: Pipeline, record: dict[str, Any], begin: float) -> None:
    settings, found = self._job.config.report, record["routes"]
    if self._scored and settings.per_task:
      scores = scene_eval.evaluate_routes(
        pipeline, tuple(found), per_task=settings.per_task, steps=settings.steps, guidance=settings.guidance
      )
      for name, score in scores.items():
        found[name]["score"] = score
    drawn = self._draw(pipeline)
    self._write(record["step"], record, drawn)
    self._show(record["step"], record["label"], found, drawn, time.perf_counter() - begin)

  def report(self, step: int, model: model_dir.Model, title: str = "", notes: Sequence[str] = ()) -> None:
    """Profiles the routes and writes report.json, report.md and the pictures from all snapshots; on process 0.

    Args:
      step: the last one to tell of.
      model: as it was saved, on this process's device.
      title, notes: see evals.report.write.
    """
    distributed.on_first("report", lambda: self._report(step, model, title, notes), _PATIENCE_SECONDS)

  def _report(self, step: int, model: model_dir.Model, title: str, notes: Sequence[str]) -> None:
    records, drawn = [], {}
    for path in sorted(glob.glob(os.path.join(self._directory, "*.json"))):
      with open(path) as f:
        record = json.load(f)
      if record["step"] > step:
        continue
      records.append(record)
      with np.load(path.replace(".json", ".npz")) as stored:
        drawn[f"{record['label']} (step {record['step']})"] = {name: stored[name] for name in stored.files}
    settings = self._job.config.report
    pipeline = Pipeline(model)
    report.write(
      self._job.workdir,
      title=title or f"{self._job.config.task}: {self._job.config.model.size}",
      snapshots=records,
      profiles=profile.profile_routes(pipeline, steps=settings.steps, guidance=settings.guidance),
      prompts=self._prompts(),
      drawn=drawn,
      config=json.loads(self._job.config.to_json()),
      notes=notes,
    )

  @property
  def _scored(self) -> bool:
    return self._job.config.data.source == "scenes"

  def _prompts(self) -> list[str]:
    """Fixed prompts: of every task in turn; for other data the first validation captions."""
    return scene_eval.fixed_prompts(self._job.config.report.pictures) if self._scored else list(self._job.captions)

  def _draw(self, pipeline: Pipeline) -> dict[str, np.ndarray]:
    settings = self._job.config.report
    return {
      name: pipeline(self._prompts(), name, settings.steps, settings.guidance, _PICTURE_SEED)
      for name in pipeline.routes
    }

  def _write(self, step: int, record: dict[str, Any], drawn: dict[str, np.ndarray]) -> None:
    stem = os.path.join(self._directory, f"{step:08d}")
    np.savez_compressed(f"{stem}.npz", **drawn)
    with open(f"{stem}.json.partial", "w") as f:
      json.dump(record, f, indent=1)
    os.replace(f"{stem}.json.partial", f"{stem}.json")

  def _show(
    self, step: int, label: str, found: Mapping[str, Any], drawn: dict[str, np.ndarray], seconds: float
  ) -> None:
    for name, values in found.items():
      numbers = {f"validation/{name}": values["loss"]}
      text = f"loss {values['loss']:.4f}"
      for split, table in values.get("score", {}).items():
        numbers[f"score_{split}/{name}"] = table["strict"]["overall"]
        text += f", {split} {table['strict']['overall']:.3f}"
      self._writer.scalars(step, numbers)
      logging.info("%s, %s: %s", label, name, text)
    self._writer.image(step, "routes", pictures.grid(self._prompts(), drawn))
    logging.info("%s: snapshot in %.0f s", label, seconds)
