"""Variants of alignment at equal CPU time: reward, held-out scores and what they cost.

    python benchmarks/alignment.py --init=runs/uwco --variants nft fast --minutes=5

One run per variant (arguments of configs/grpo.py) and seed in OUT/VARIANT-SEED, each stopped at the first look after
the given minutes of CPU time, all threads together. Writes OUT/alignment.md, one line per variant, OUT/alignment.json
with the curves, and OUT/alignment.png with their picture (needs matplotlib: pip install '.[notebook]'). On an
accelerator give --wall: CPU time means little there. A finished run is not repeated; one that was interrupted cannot go
on, because its clock is lost.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from elasticdit_jax.configs import grpo as grpo_config
from elasticdit_jax.train import aligned, grpo, watch

# Options that decide what a run is.
_OF_RUN = ("init", "routes", "minutes", "every", "epochs", "per_task", "wall")
VARIANTS = ("paper", "fast", "cps", "guard", "nft")


class TimedRun(grpo.Run):
  """A run that ends at the first look after `seconds`, and notes when it looked.

  Attributes:
    spent: seconds until each look, without those of the looks.
  """

  def __init__(self, setup: aligned.Setup, seconds: float, wall: bool):
    super().__init__(setup)
    self._now = time.perf_counter if wall else time.process_time
    self._seconds, self._mark = seconds, 0.0
    self.spent: list[float] = []

  def look(self, n: int, state: Any) -> Any:
    """As every run, on a clock that stands still meanwhile."""
    self.spent.append(self.spent[-1] + self._now() - self._mark if self.spent else 0.0)
    state = super().look(n, state)
    self._mark = self._now()
    return state

  def decide(self, verdict: watch.Verdict) -> watch.Verdict:
    """Adds the end of the time to the reasons to stop."""
    if verdict.stop or self.spent[-1] < self._seconds:
      return verdict
    return watch.Verdict(verdict.best, "the time is over")


def trained_alone(setup: aligned.Setup) -> aligned.Setup:
  """Without the routes that are not trained: scoring them would take longer than a short run."""
  names = {route.name for group in setup.groups for route in group}
  return dataclasses.replace(setup, routes={name: r for name, r in setup.routes.items() if r.name in names})


def measure(options: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
  """One run; returns its curves, and scores and losses of the trained routes before and after.

  Raises:
    ValueError: there is a finished run of other options, or an interrupted one.
  """
  workdir = os.path.join(options.out, f"{variant.replace(',', '-')}-{seed}")
  done = os.path.join(workdir, "alignment.json")
  given = {name: getattr(options, name) for name in _OF_RUN}
  if os.path.isfile(done):
    with open(done) as f:
      found = json.load(f)
    if found.get("options") != given:
      told = found.get("options", "options that it does not tell")
      raise ValueError(f"{workdir} was measured with {told}, not {given}; give another --out, or remove it")
    return found
  if os.path.isdir(workdir):
    raise ValueError(f"{workdir} was interrupted, and its clock is lost; remove it and give the same command again")
  config = grpo_config.get_config(variant).unlock()
  config.init, config.seed = options.init, seed
  default = grpo_config.get_config()
  config.rollout.routes, config.watch.prompts = options.routes or default.rollout.routes, default.watch.prompts
  config.report.per_task = options.per_task
  config.train.epochs, config.watch.every = options.epochs, options.every
  run = TimedRun(trained_alone(aligned.prepare(config.lock(), workdir)), 60 * options.minutes, options.wall)
  run.execute()
  with open(os.path.join(workdir, "report.json")) as f:
    before, after = (snapshot["routes"] for snapshot in json.load(f)["snapshots"])
  names = [route.name for route in run.trainable]
  found = {
    "variant": variant,
    "seed": seed,
    "seconds": run.spent,
    "options": given,
    "records": run.watch.records,
    "best": watch.judge(run.watch.records, run.setup.limits).best,
    "before": {name: before[name] for name in names},
    "after": {name: after[name] for name in names},
  }
  with open(done, "w") as f:
    json.dump(found, f, indent=1)
  return found


def table(runs: Sequence[Mapping[str, Any]]) -> str:
  """Markdown: one line per variant, means and standard deviations over seeds, of the mean over routes."""
  head = ["variant", "seeds", "epochs", "held-out reward", "strict unseen %", "gain", "counting, gain", "loss rise %"]
  lines = [head, ["---", *["---:"] * (len(head) - 1)]]
  for variant in dict.fromkeys(run["variant"] for run in runs):
    rows = [run for run in runs if run["variant"] == variant]
    columns = [
      [run["records"][run["best"]]["reward"] for run in rows],
      [100 * _score(run["after"], "overall") for run in rows],
      [100 * (_score(run["after"], "overall") - _score(run["before"], "overall")) for run in rows],
      [100 * (_score(run["after"], "counting") - _score(run["before"], "counting")) for run in rows],
      [100 * (_loss(run["after"]) / _loss(run["before"]) - 1) for run in rows],
    ]
    epochs = np.mean([run["records"][-1]["step"] for run in rows])
    texts = [f"{np.mean(column):.2f} ± {np.std(column):.2f}" for column in columns]
    lines.append([variant, f"{len(rows)}", f"{epochs:.0f}", *texts])
  return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _score(routes: Mapping[str, Any], task: str) -> float:
  return float(np.mean([route["score"]["unseen"]["strict"][task] for route in routes.values()]))


def _loss(routes: Mapping[str, Any]) -> float:
  return float(np.mean([route["loss"] for route in routes.values()]))


def curves(runs: Sequence[Mapping[str, Any]], path: str) -> None:
  """PNG: rewards of training, of held-out prompts, and the rise of the held-out loss over time; a line per run."""
  try:
    from matplotlib import figure
  except ImportError:
    logging.warning("no picture of the curves without matplotlib; pip install '.[notebook]'")
    return
  paper = figure.Figure(figsize=(15, 4.5), layout="constrained")
  panels = paper.subplots(1, 3)
  variants = list(dict.fromkeys(run["variant"] for run in runs))
  for run in runs:
    color = f"C{variants.index(run['variant'])}"
    label = run["variant"] if run["seed"] == 0 else None
    for panel, values in zip(panels, _curves(run["records"]), strict=True):
      panel.plot(np.array(run["seconds"]) / 60, values, color=color, label=label, alpha=0.8, linewidth=1.2)
  titles = ("reward of training prompts", "reward of held-out prompts", "held-out flow-matching loss, rise in %")
  for panel, title in zip(panels, titles, strict=True):
    panel.set(title=title, xlabel="minutes of " + ("the clock" if runs[0]["options"]["wall"] else "CPU time"))
    panel.grid(alpha=0.3)
  panels[0].legend()
  paper.savefig(path, dpi=100)


def _curves(records: Sequence[watch.Record]) -> tuple[list[float], list[float], list[float]]:
  """Per look: reward of training since the look before (NaN at first), held-out reward, loss over the first in %."""
  losses = [np.mean([route["loss"] for route in record["routes"].values()]) for record in records]
  training = [np.nan if r["training_reward"] is None else r["training_reward"] for r in records]
  return training, [record["reward"] for record in records], [100 * (loss / losses[0] - 1) for loss in losses]


def main() -> None:
  """Runs every variant and seed in turn, seeds outermost: there is a table early."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--init", default="shipped", help="model to align")
  parser.add_argument("--routes", default="", help="as config.rollout.routes; empty: those of the default")
  parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="arguments of configs/grpo.py")
  parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
  parser.add_argument("--minutes", type=float, default=5.0, help="time of a run")
  parser.add_argument("--every", type=int, default=10, help="epochs between looks")
  parser.add_argument("--epochs", type=int, default=100_000, help="most epochs of a run")
  parser.add_argument("--per_task", type=int, default=40, help="prompts per task in the scores before and after")
  parser.add_argument("--wall", action="store_true", help="seconds of the clock instead of the processors")
  parser.add_argument("--out", default="runs/alignment", help="where runs and tables go")
  options = parser.parse_args()
  logging.set_verbosity(logging.INFO)
  os.makedirs(options.out, exist_ok=True)
  runs = []
  for seed in range(options.seeds):
    for variant in options.variants:
      runs.append(measure(options, variant, seed))
      with open(os.path.join(options.out, "alignment.json"), "w") as f:
        json.dump(runs, f, indent=1)
      with open(os.path.join(options.out, "alignment.md"), "w") as f:
        f.write(table(runs))
      curves(runs, os.path.join(options.out, "alignment.png"))
      logging.info("\n%s", table(runs))


if __name__ == "__main__":
  main()
