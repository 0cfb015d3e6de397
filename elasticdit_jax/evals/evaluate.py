"""Task `evaluate`: scores, losses, costs and pictures of the routes of a finished model; or VAEs by themselves."""

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from elasticdit_jax.data import pipeline as data_pipeline
from elasticdit_jax.evals import benchmark, benchmark_tables, profile, reconstruction, report, scene_eval
from elasticdit_jax.evals.validation import Validation, make_validation
from elasticdit_jax.generate import Pipeline, parse_routes


def run(config: Any, workdir: str) -> None:
  """Writes WORKDIR/report.json, report.md and images/routes.png; with config.vaes see `reconstruction.run`.

  Args:
    config: fields checkpoint ("" = the weights inside the package), routes ("all", or names separated by commas),
      steps, guidance, seed, solver, per_task (prompts per task and split; 0 = no scores), pictures, validation (number
      of pictures whose loss is measured), repeats (of the timing) and data (as in training: where captions and
      validation pictures come from; size 0 = the model's).
    workdir: is created.

  Raises:
    ValueError: in one line; nothing has been written then.
  """
  if "vaes" in config:
    return reconstruction.run(config, workdir)
  if "benchmark" in config:
    return benchmark.run(config, workdir)
  if "runs" in config:
    return benchmark_tables.run(config, workdir)
  return _report(config, workdir)


def _report(config: Any, workdir: str) -> None:
  _check(config, workdir)
  pipeline = Pipeline.load(config.checkpoint or None)
  names = parse_routes(config.routes, pipeline)
  sampling = {"steps": config.steps, "guidance": config.guidance, "solver": config.solver}
  for name in names:
    pipeline.arguments([""], name, seed=config.seed, **sampling)
  validation, captions = held_out(config.data, pipeline, config.validation)
  prompts = scene_eval.fixed_prompts(config.pictures) if config.data.source == "scenes" else captions(config.pictures)
  measured = {}
  for name in names:
    route = pipeline.select(name)
    by_time = validation.by_time(pipeline.model.params, route)
    measured[name] = {"active_blocks": len(route.active), "loss": float(by_time.mean()), "loss_by_time": by_time}
    logging.info("loss: %s %.4f", name, measured[name]["loss"])
  if config.per_task and config.data.source == "scenes":
    scores = scene_eval.evaluate_routes(pipeline, names, config.per_task, seed=config.seed, **sampling)
    for name, score in scores.items():
      measured[name]["score"] = score
  report.write(
    workdir,
    title=f"Evaluation of {config.checkpoint or 'the weights inside the package'}",
    snapshots=[{"step": 0, "label": "given weights", "routes": measured}],
    profiles=profile.profile_routes(pipeline, names, repeats=config.repeats, **sampling),
    prompts=prompts,
    drawn={"given weights": {name: pipeline(prompts, name, seed=config.seed, **sampling) for name in names}},
    config=json.loads(config.to_json()),
  )
  logging.info("done: open %s", os.path.join(workdir, "report.md"))


def _check(config: Any, workdir: str) -> None:
  if os.path.exists(os.path.join(workdir, "config.json")):
    raise ValueError(f"workdir: {workdir} holds a training run, whose report would be lost; choose another --workdir")
  for field, least in (("per_task", 0), ("pictures", 1), ("validation", 1), ("repeats", 1)):
    if config[field] < least:
      raise ValueError(f"config.{field}: expected at least {least}, got {config[field]}")


def held_out(data: Any, pipeline: Pipeline, count: int) -> tuple[Validation, Callable[[int], list[str]]]:
  """Inputs of the validation losses of a finished model.

  Args:
    data: as in training: where captions and pictures come from; size 0 = the model's.
    pipeline: the model.
    count: of held-out pictures.

  Returns:
    The losses' inputs, and a function from a number to the captions of that many held-out pictures.

  Raises:
    ValueError: where the data is not there or not what the model was trained on.
  """
  model, data = pipeline.model, data.copy_and_resolve_references()
  with data.unlocked():
    data.size = data.size or model.size
  if data.source == "scenes" and not scene_eval.knows_scenes(pipeline):
    raise ValueError(
      "config.data.source: this model was not trained on the embedded scenes; give its pictures with"
      " --config.data.source=folder --config.data.path=DIR"
    )
  _, source, _ = data_pipeline.source_from_config(data)
  (batch,) = data_pipeline.validation_batch(source, model.encoder, count, 1)
  order = source.order(None)

  def captions(number: int) -> list[str]:
    return [model.encoder.clip(caption) for caption in source.read(np.array([order[i] for i in range(number)]))[1]]

  return make_validation(model.cfg, model.codecs, batch), captions
