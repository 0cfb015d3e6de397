"""Scores of the routes on the embedded scenes: draw the evaluation prompts, detect, compare."""

import time
from collections.abc import Sequence
from typing import Any

from absl import logging

from elasticdit_jax.data import scene_prompts
from elasticdit_jax.evals import detector, scenes_score
from elasticdit_jax.generate import Pipeline

SPLITS = ("seen", "unseen")


def knows_scenes(pipeline: Pipeline) -> bool:
  """Whether the model's vocabulary holds every word of the embedded scenes."""
  return set(scene_prompts.VOCABULARY) <= set(pipeline.model.encoder.words)


def fixed_prompts(count: int) -> list[str]:
  """`count` captions to look at: the tasks in turn from the hardest, combinations of training and held-out ones."""
  per_task = -(-count // len(scene_prompts.TASKS))
  of_split = [scene_prompts.eval_prompts(per_task, split) for split in SPLITS]
  visits = []
  for visit in range(per_task):
    for number in reversed(range(len(scene_prompts.TASKS))):
      visits.append(of_split[(visit + number) % 2][number * per_task + visit].caption)
  return visits[:count]


def evaluate_routes(
  pipeline: Pipeline,
  routes: Sequence[str],
  per_task: int,
  splits: Sequence[str] = SPLITS,
  *,
  steps: int = 20,
  guidance: float = 3.0,
  seed: int = 0,
  solver: str = "euler",
  thresholds: detector.Thresholds = detector.DEFAULT,
) -> dict[str, dict[str, dict[str, Any]]]:
  """Draws the same prompts from the same noise along every route and scores them.

  Args:
    pipeline: a model of the embedded scenes.
    routes: names.
    per_task: prompts per task and split; the tasks are six.
    splits: "seen" (combinations of training), "unseen" (held out from it).
    steps, guidance, seed, solver: of the sampler; the seed also orders the prompts.
    thresholds: of the detector.

  Returns:
    route -> split -> {"strict", "partial", "extra": {task or "overall": share}, "prompts": their number}; see
    scenes_score.Table.

  Raises:
    ValueError: where the model does not know the words of the scenes, or an argument does not fit.
  """
  if not knows_scenes(pipeline):
    raise ValueError("scores: this model does not know the words of the embedded scenes; scores need a model of them")
  prompts = {split: scene_prompts.eval_prompts(per_task, split, seed) for split in splits}
  captions = [prompt.caption for rows in prompts.values() for prompt in rows]
  results = {}
  for name in routes:
    begin = time.perf_counter()
    images = pipeline(captions, name, steps, guidance, seed, solver=solver)
    results[name], start = {}, 0
    for split, rows in prompts.items():
      table = scenes_score.evaluate(rows, images[start : start + len(rows)], thresholds)
      start += len(rows)
      results[name][split] = {
        "strict": table.strict,
        "partial": table.partial,
        "extra": table.extra,
        "prompts": len(rows),
      }
    overall = ", ".join(f"{split} {100 * table['strict']['overall']:.1f} %" for split, table in results[name].items())
    logging.info("scores: %s %s (%d pictures, %.0f s)", name, overall, len(captions), time.perf_counter() - begin)
  return results
