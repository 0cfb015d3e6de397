"""Task `uwco`: Unified Weight Co-Optimization, from a backbone to one weight set that serves every route.

   step 0                                                                                            stop
     |  1-init   |  2-warmup            |  3-specialise             |  4-recover            |
     | max       | max + lite, same     | lite only, skipped blocks | max + lite            |
     |           | batches              | bit-frozen                |                       |
     +--------- hook ----------------- hook ---------------------- hook ------------------ hook
            importance analysis,     snapshot                   snapshot              snapshot, model/,
            routes.json, snapshot                                                     report, pictures

Phases are data (`train/phases.py`, where a cheap 0-coarse may come first); there is one step function
(`train/step.py`). A snapshot evaluates all four routes with the EMA weights and is kept in WORKDIR/snapshots, so that
an interrupted run still ends with the whole curve.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

from absl import logging

from elasticdit_jax import distributed, elastic
from elasticdit_jax.interop import model_dir
from elasticdit_jax.models import dit
from elasticdit_jax.train import guard, loop, optim, phases, state, step, throughput
from elasticdit_jax.train import importance as importance_lib
from elasticdit_jax.train import job as job_lib
from elasticdit_jax.train.checkpoint import Checkpointer, check_space
from elasticdit_jax.train.snapshot import Snapshots
from elasticdit_jax.train.workdir import check_workdir, claim_workdir, flat_fields
from elasticdit_jax.train.writer import Writer

# May differ between two starts of one run. The other fields of `report` say what a snapshot measures, and the snapshots
# of a run are compared.
NEUTRAL = (
  "train.log_every",
  "train.save_every",
  "train.profile",
  "train.accumulate",
  "mesh",
  "guard.rollbacks",
  "guard.hang_seconds",
  "report.per_task",
  "data.max_bad_fraction",
)


def run(config: Any, workdir: str) -> None:
  """Runs or resumes the four phases; see `train`."""
  train(config, workdir, phases.make_table(config.phases))


def train(config: Any, workdir: str, table: tuple[phases.Phase, ...]) -> None:
  """Trains the phases of `table` and leaves model/, report.json, report.md and pictures in `workdir`.

  Raises:
    ValueError: for a config or a workdir that does not fit; nothing has been written then.
  """
  check_workdir(workdir, config, NEUTRAL)
  distributed.check_same("config", flat_fields(config) | {"--workdir": os.path.abspath(workdir)})
  job = job_lib.prepare(config, workdir)
  Run(job, table).execute()


class Run:
  """One run: the job, its phases, and the routes that the importance analysis decides on the way."""

  def __init__(self, job: job_lib.Job, table: tuple[phases.Phase, ...]):
    self.job, self.table = job, table
    self.stop = table[-1].stop
    names = {name for p in table for group in p.groups for name in group}
    importance_lib.check_skip(job.cfg.depth, job.config.lite.skip)
    self._families = phases.shallow_routes(job.cfg.depth, job.config.lite.skip)
    self._given = job_lib.given_routes(job, names - set(self._families))
    self.routes = elastic.standard_routes(job.cfg.depth) | self._given
    self._routes_path = os.path.join(job.workdir, "routes.json")
    self._analysis_step = max((p.stop for p in table if p.name in phases.BACKBONE), default=0)
    phases.check_families(table, self._families)
    job_lib.check_routes(names, self.routes | {name: family[0] for name, family in self._families.items()}, job.codecs)

  def execute(self) -> None:
    """Restores or initialises, trains, and reports."""
    job, config, layout = self.job, self.job.config, self.job.layout
    schedule = optim.schedule(config.optimizer, self.stop)
    tx = optim.make(config.optimizer, dit.init_shapes(job.cfg), schedule, layout.places)
    spike = config.guard.spike
    create = functools.partial(
      state.create, tx=tx, seed=config.seed, teacher=config.train.distill > 0, spikes=spike > 0
    )
    current = layout.build(create, job_lib.initial_params(job))
    update = step.make_step(
      layout.bind(job.cfg),
      job.flow,
      tx,
      ema_decay=config.train.ema_decay,
      distill=config.train.distill,
      accumulate=config.train.accumulate,
      round_once=layout.slices > 1,
      spike=spike,
      out_shardings=layout.results(current),
    )
    self._codecs = layout.replicate(dict(job.codecs))
    settings = self._settings()
    distributed.on_first("workdir", lambda: check_space(job.workdir, current))
    claim_workdir(job.workdir, config, NEUTRAL)
    ends = {p.stop for p in self.table}
    with Checkpointer(job.workdir, keep=config.train.keep, keep_steps=ends) as checkpoint:
      current, start, skipped = self._restore(checkpoint, current)
      logging.info("%s", layout.describe())
      with Writer(job.workdir, start) as writer:
        writer.text(start, "config", f"```\n{config.to_json(indent=1)}\n```")
        self.snapshots = Snapshots(job, writer)
        self._writer = writer
        loop.run(
          current,
          job.batches,
          lambda s, batch, n: self._step(update, s, batch, n),
          settings,
          start=start,
          skipped=skipped,
          checkpoint=checkpoint,
          writer=writer,
          hooks={n: lambda s, n=n: self._boundary(n, s) for n in {*ends, self._analysis_step}},
        )

  def _restore(self, checkpoint: Checkpointer, template: state.TrainState) -> tuple[state.TrainState, int, int]:
    restored = checkpoint.restore_latest(template)
    if not restored:
      return template, 0, 0
    current, meta = restored
    self._take_routes(meta)
    return current, int(current.step), meta.get("skipped", 0)

  def _take_routes(self, meta: Mapping[str, Any]) -> None:
    self.routes = elastic.routes_from_json(meta["routes"])

  def _settings(self) -> loop.Settings:
    config, job = self.job.config, self.job
    flops = throughput.StepFlops(
      job.cfg, job.flow, job.codecs, config.data.batch_size, config.data.size, config.train.distill
    )
    return loop.Settings(
      stop=self.stop,
      log_every=config.train.log_every,
      save_every=config.train.save_every,
      batch_size=config.data.batch_size,
      resume_command=f"the same command with --workdir={job.workdir}",
      phase=lambda n: f"{config.task} {phases.phase_at(self.table, n).label}",
      meta=lambda n: {"phase": phases.phase_at(self.table, n).name, "routes": elastic.routes_to_json(self.routes)},
      restored=self._take_routes,
      flops=lambda n: flops.of(*self._group(n)),
      guard=guard.Guard(config.guard.rollbacks, config.guard.hang_seconds),
      profile=guard.parse_window(config.train.profile, "config.train.profile"),
      profile_dir=os.path.join(job.workdir, "profile"),
    )

  def _group(self, n: int) -> tuple[step.Group, bool]:
    """The routes of update n, and whether they learn from the teacher: the backbone in training has none."""
    phase = phases.phase_at(self.table, n)
    return phase.group_at(n, self.routes, self._families), phase.name not in phases.BACKBONE

  def _step(self, update, current: state.TrainState, batch: Any, n: int):
    group, distilled = self._group(n)
    trainable = phases.phase_at(self.table, n).trained(self.routes, self._families)
    batch = self.job.layout.put_batch(batch)
    with self.job.layout.active():
      return update(current, self._codecs, batch, group=group, trainable=trainable, distilled=distilled)

  def _boundary(self, n: int, current: state.TrainState) -> state.TrainState:
    """Between phases: decide flex-lite once, take a snapshot, and at the end write everything a user came for."""
    importance = None
    if n == self._analysis_step:
      importance = self._analyse(current)
      if current.teacher is not None:
        current = dataclasses.replace(current, teacher=state.copy(current.ema))
    given = "given weights" if self.job.config.init else "random weights"
    label = next((f"after {p.label}" for p in self.table if p.stop == n), given)
    self.snapshots.take(n, label, current.ema, self.routes, importance)
    self._writer.text(n, "routes", f"```\n{json.dumps(elastic.routes_to_json(self.routes), indent=1)}\n```")
    if n == self.stop:
      weights = self.job.layout.local(current.ema)
      model = self.job.model(weights, self.routes, {"task": self.job.config.task, "steps": str(n)})
      distributed.on_first("model", lambda: model_dir.save(os.path.join(self.job.workdir, "model"), model))
      self.snapshots.report(n, model)
      logging.info("done: open %s", os.path.join(self.job.workdir, "report.md"))
    return current

  def _analyse(self, current: state.TrainState) -> importance_lib.Importance:
    logging.info(
      "importance analysis: which %d of %d blocks flex-lite skips", self.job.config.lite.skip, self.job.cfg.depth
    )
    every = elastic.standard_routes(self.job.cfg.depth)
    full = [route for name, route in every.items() if name.startswith("max") and route.vae in self.job.codecs]
    importance = importance_lib.analyse(self.job.validation(), current.ema, full, self.job.config.lite.skip)
    self.routes = elastic.standard_routes(self.job.cfg.depth, importance.skipped) | self._given
    distributed.on_first("routes.json", lambda: elastic.save_routes(self._routes_path, self.routes))
    return importance
