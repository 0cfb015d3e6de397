"""What an alignment is made of before its first picture: the model, prompts, rewards, routes. Bad input stops here."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from elasticdit_jax import distributed
from elasticdit_jax.data import pipeline, scene_prompts
from elasticdit_jax.elastic import Route, select_route
from elasticdit_jax.flow import stochastic
from elasticdit_jax.interop import model_dir
from elasticdit_jax.train import job as job_lib
from elasticdit_jax.train import losses, optim, phases, reward_local, rewards, scoring, sharding
from elasticdit_jax.train import prompts as prompts_lib
from elasticdit_jax.train.policy import Policy
from elasticdit_jax.train.prompts import Prompt, Prompts
from elasticdit_jax.train.ranges import check_ranges
from elasticdit_jax.train.rollout import Plan
from elasticdit_jax.train.step import FlowConfig
from elasticdit_jax.train.watch import Limits

# Steps of "cps" have a distance in place of a density, of which GRPO-Guard needs the scale.
_RULES = {
  "grpo": tuple(stochastic.RULES),
  "grpo-guard": tuple(rule for rule in stochastic.RULES if rule != "cps"),
  "nft": ("ode", *stochastic.RULES),
}


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything fixed over a run.

  Attributes:
    config: as given.
    job: data, codecs, encoder, held-out pictures; its config has everything that the model decides filled in.
    weights: the given ones.
    routes: every route of the model, by name.
    groups: routes that are trained, in turn; those of one group share prompts and updates.
    plan: how pictures are drawn.
    prompts, watched: of training; held-out ones to watch.
    reward: scores pictures.
    limits: when to stop early.
  """

  config: Any
  job: job_lib.Job
  weights: Any
  routes: Mapping[str, Route]
  groups: tuple[tuple[Route, ...], ...]
  plan: Plan
  prompts: Prompts
  watched: Sequence[Prompt]
  reward: rewards.Reward
  limits: Limits

  def policy(self, optimizer: Callable[[Any], optax.GradientTransformation]) -> Policy:
    """The static part of the updates; `optimizer` gets the shapes of what is trained."""
    config = self.config
    objective = objective_of(config.objective)
    made = Policy(
      self.job.layout.bind(self.job.cfg),
      objective,
      None,
      config.train.ema_decay,
      config.lora.rank,
      config.lora.alpha,
      self.job.layout,
    )
    shapes = jax.eval_shape(lambda: made.trained(self.weights, jax.random.key(0)))
    return dataclasses.replace(made, tx=optimizer(shapes))


def objective_of(config: Any) -> losses.Objective:
  """config.objective as a value."""
  fields = {field.name: config[field.name] for field in dataclasses.fields(losses.Objective)}
  return losses.Objective(**fields)


def prepare(config: Any, workdir: str) -> Setup:
  """Reads the model, prompts and held-out pictures, has every watched prompt scored once, and checks that all fits.

  Raises:
    ValueError: naming the field of the config that does not fit; nothing has been written.
  """
  _check(config)
  if not config.init:
    raise ValueError("config.init: alignment needs a finished model; give its directory, a workdir, or 'shipped'")
  # Cheap checks first: pictures are read last.
  optim.schedule(config.optimizer, config.train.epochs)
  layout = _layout(config)
  model = scoring.together(lambda: model_dir.load(job_lib.init_directory(config)))
  resolved = _resolved(config, model)
  check_ranges(resolved)
  groups = _groups(config, model)
  prompts = _prompts(config, model)
  reward = scoring.together(lambda: rewards.from_config(config.rewards))
  _check_captions(prompts, reward.names)
  job = scoring.together(lambda: _job(resolved, workdir, model, layout))
  watched = prompts.held_out[: config.watch.prompts]
  blank = np.zeros((len(watched), job.config.data.size, job.config.data.size, 3), np.uint8)
  # A reward that does not know a prompt, or whose server is not there, says so now.
  scoring.settle(reward, [reward.submit(blank, [row.text for row in watched], [row.metadata for row in watched])])
  limits = Limits(config.watch.loss, config.watch.diversity, config.watch.patience)
  return Setup(config, job, model.params, model.routes, groups, _plan(config), prompts, watched, reward, limits)


def _resolved(config: Any, model: model_dir.Model) -> Any:
  """The config with everything about the data that the model decides."""
  config = config.copy_and_resolve_references().unlock()
  config.data = ConfigDict(
    {
      **config.data,
      "size": config.data.size or model.size,
      "split": "train",
      "seed": 0,
      "max_bad_fraction": 0.05,
      "text_length": model.encoder.length,
      "text_dim": model.encoder.dim,
      "max_words": 20_000,
    }
  )
  return config.lock()


def _layout(config: Any) -> sharding.Layout:
  layout = sharding.from_config(config)
  if config.rollout.batch % layout.batch_shards:
    raise ValueError(
      f"config.rollout.batch: expected a multiple of the {layout.batch_shards} parts that config.mesh splits a batch"
      f" into, got {config.rollout.batch}"
    )
  return layout


def _job(config: Any, workdir: str, model: model_dir.Model, layout: sharding.Layout) -> job_lib.Job:
  cfg = dataclasses.replace(model.cfg, remat=config.model.remat, dtype=config.model.dtype)
  job_lib.check_size(config.data.size, max(model.codecs) * cfg.patch)
  source, held_out, _ = pipeline.source_from_config(config.data)
  batches = pipeline.validation_batch(held_out, model.encoder, config.watch.pictures, 1)
  captions = held_out.read(np.arange(config.report.pictures))[1]
  flow = FlowConfig(0.0, 1.0, model.flow.shift, model.flow.tokens)
  captions = tuple(model.encoder.clip(caption) for caption in captions)
  return job_lib.Job(config, workdir, cfg, flow, model.codecs, source, model.encoder, tuple(batches), captions, layout)


def _groups(config: Any, model: model_dir.Model) -> tuple[tuple[Route, ...], ...]:
  groups = []
  for names in phases.parse_groups(config.rollout.routes, "config.rollout.routes"):
    try:
      groups.append(tuple(select_route(model.routes, name) for name in names))
    except ValueError as e:
      raise ValueError(f"config.rollout.routes: {e}") from None
    for route in groups[-1]:
      if route.vae not in model.codecs:
        raise ValueError(f"config.rollout.routes: {route.name} needs vae_f{route.vae}.safetensors in {config.init}")
  return tuple(groups)


def _prompts(config: Any, model: model_dir.Model) -> Prompts:
  found = scoring.together(lambda: _read_prompts(config))
  rows = [row for rows in found.training.values() for row in rows]
  distributed.check_same("config.prompts", {"checksum": found.checksum})
  model.encoder.encode([row.text for row in rows])
  model.encoder.encode([row.text for row in found.held_out])
  return found


def _read_prompts(config: Any) -> Prompts:
  given = config.prompts
  if given.file:
    return prompts_lib.from_file(given.file, given.tasks, given.held_out)
  if config.data.source == "scenes":
    return prompts_lib.scenes(given.tasks, given.held_out)
  raise ValueError("config.prompts.file: pictures of your own have no list of prompts; give a file, one a line")


def _check_captions(prompts: Prompts, names: Sequence[str]) -> None:
  """Scene rewards know no other captions; those of training would be asked for in the middle of the run."""
  if not set(reward_local.SCENE) & set(names):
    return
  for rows in prompts.training.values():
    for row in rows:
      try:
        scene_prompts.parse(row.text)
      except ValueError as e:
        raise ValueError(f"config.prompts.file: {e}; scene rewards need captions of the embedded world") from None


def _last(rollout: Any) -> int:
  """The last step that a window may reach."""
  return rollout.last if rollout.last >= 0 else rollout.steps - 2


def _plan(config: Any) -> Plan:
  given = config.rollout
  last = _last(given)
  window = given.window or last - given.first + 1
  return Plan(
    given.group, given.steps, given.guidance, given.noise, given.level, window, given.first, last, given.batch
  )


def _check(config: Any) -> None:
  """Ranges and combinations of the fields that only alignment has."""
  r, o, w = config.rollout, config.objective, config.watch
  last, of_steps = _last(r), r.noise != "ode"  # without noise pictures are trained at times of their own
  noise = ", ".join(_RULES.get(o.name, ()))
  level = 1.0 if r.noise == "cps" else math.inf
  for field, good, expected in (
    ("objective.name", o.name in losses.OBJECTIVES, f"one of {', '.join(losses.OBJECTIVES)}"),
    ("rollout.prompts", r.prompts >= 1, "at least 1 prompt an epoch"),
    ("rollout.group", r.group >= 2, "at least 2 pictures of a prompt: an advantage is a comparison within the group"),
    ("rollout.steps", r.steps >= 2, "at least 2 steps: the last one is never trained"),
    ("rollout.guidance", 0 <= r.guidance < math.inf, "a scale of at least 0; 1 switches guidance off"),
    ("rollout.noise", r.noise in _RULES.get(o.name, ()), f"one of {noise}"),
    (
      "rollout.level",
      r.noise == "ode" or 0 < r.level <= level and r.level < math.inf,
      "noise above 0, up to 1 for cps",
    ),
    ("rollout.first", of_steps or r.first == 0, "0 where no step has noise: there is no window to place"),
    ("rollout.last", of_steps or r.last == -1, "-1 where no step has noise: there is no window to place"),
    ("rollout.first", 0 <= r.first <= last, f"a step from 0 to {last}"),
    ("rollout.last", last <= r.steps - 2, f"a step up to {r.steps - 2}; the last step is never trained"),
    ("rollout.window", of_steps or r.window >= 1, "at least 1 time at which a picture is trained"),
    (
      "rollout.window",
      not of_steps or 0 <= r.window <= last - r.first + 1,
      f"at most the {last - r.first + 1} steps from first to last",
    ),
    ("rollout.batch", r.batch >= 1, "at least 1 picture at a time"),
    ("objective.updates", o.updates >= 1, "at least 1 update an epoch"),
    ("objective.clip", 0 < o.clip < 1, "half the width of the range of ratios, in (0, 1)"),
    ("objective.kl", 0 <= o.kl < math.inf, "a weight of at least 0"),
    ("objective.anchor", 0 <= o.anchor < math.inf, "a weight of at least 0"),
    ("objective.guidance", 0 <= o.guidance < math.inf, "a scale of at least 0; 1 switches guidance off"),
    ("objective.guidance", o.guidance == 1 or o.kl > 0, "1 where objective.kl is 0: there is no divergence to guide"),
    (
      "objective.guidance",
      1 in (o.guidance, r.guidance),
      "1 where rollout.guidance is not, because the reference is then guided like the sampler",
    ),
    ("objective.divergence", o.divergence in losses.DIVERGENCES, f"one of {', '.join(losses.DIVERGENCES)}"),
    ("objective.divergence", o.name != "nft" or o.divergence == "v", "'v' for nft, which has no steps"),
    ("objective.spread", o.spread in losses.SPREADS, f"one of {', '.join(losses.SPREADS)}"),
    ("objective.strength", 0 < o.strength < math.inf, "a positive number"),
    ("objective.lag", 0 <= o.lag < 1, "a share of at least 0, below 1"),
    ("objective.lag", o.name == "nft" or o.lag == 0, "0 where it is not nft: the weights in training draw"),
    ("lora.rank", config.lora.rank >= 0, "0 for full weights, or a rank"),
    ("lora.alpha", config.lora.alpha > 0, "a positive number"),
    (
      "optimizer.name",
      not config.lora.rank or config.optimizer.name != "muon",
      "'adamw' for adapters: muon is for whole matrices of weights",
    ),
    ("train.epochs", config.train.epochs >= 1, "at least 1 epoch"),
    ("watch.every", w.every >= 1, "at least 1 epoch"),
    ("watch.prompts", w.prompts >= 1, "at least 1 prompt"),
    ("watch.pictures", w.pictures >= 1, "at least 1 picture"),
    ("watch.patience", w.patience >= 1, "at least 1 look"),
    ("watch.loss", 0 <= w.loss < math.inf, "the rise that is allowed, as a share"),
    ("watch.diversity", 0 <= w.diversity <= 1, "the fall that is allowed, as a share"),
  ):
    if not good:
      section, name = field.split(".")
      raise ValueError(f"config.{field}: expected {expected}, got {config[section][name]!r}")
