"""An epoch of alignment on 8 host devices beside the same on one; run as a program, it writes what it found as JSON.

python -m tests.multi_device.grpo_cases
"""

import dataclasses
import json
import sys
import types
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import grpo as config_file
from elasticdit_jax import elastic
from elasticdit_jax.train import aligned, grpo, rewards, rollout, sharding
from elasticdit_jax.train.prompts import Prompt
from elasticdit_jax.train.step import FlowConfig
from tests.evals import tiny_model
from tests.multi_device.step_cases import apart, parts

# Dense, skipped, sparse.
ROUTE = elastic.Route("d2-s25-f8", (True, False, True), (0.0, 0.0, 0.5), 8)
_PROMPTS = [Prompt(text, "all", {}) for text in ("two circles", "a red square")]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Blocks:
  """Stands for an f8 codec: compilation is most of the time here."""

  gain: jax.Array

  @property
  def cfg(self):
    return types.SimpleNamespace(latent_channels=16)

  def decode(self, z):
    return jnp.repeat(jnp.repeat(self.gain * z[..., :3], 8, axis=1), 8, axis=2)


def brightness(images: np.ndarray, prompts: Sequence[str], metadata: Sequence) -> dict[str, np.ndarray]:
  """A score that moves as little as its pictures do."""
  del prompts, metadata
  return {"brightness": images.mean((1, 2, 3)) / 255}


def _run(layout):
  """State, metrics and rollout after one epoch of two updates: adapters, guidance, divergence, anchor, two steps."""
  model = tiny_model.make(())
  config = config_file.get_config("debug,fast,lora").unlock()
  config.lora.update({"rank": 4, "alpha": 8.0})
  config.objective.update({"kl": 0.1, "updates": 2, "clip": 0.1, "anchor": 0.5})
  job = types.SimpleNamespace(
    cfg=model.cfg,
    codecs={8: _Blocks(jnp.float32(0.3))},
    encoder=model.encoder,
    flow=FlowConfig(0.0, 1.0, 3.0, 16),
    layout=layout,
    config=types.SimpleNamespace(data=types.SimpleNamespace(size=64)),
  )
  plan = rollout.Plan(group=4, steps=3, guidance=2.0, rule="sde", level=0.7, window=2, first=0, last=1, batch=8)
  reward = rewards.Reward({("brightness",): brightness}, {"brightness": 1.0})
  setup = aligned.Setup(config.lock(), job, model.params, {}, ((ROUTE,),), plan, None, (), reward, None)
  run = grpo.Run(setup)
  run.policy = setup.policy(lambda trained: optax.sgd(0.1, momentum=0.9))
  run.sampler = rollout.Sampler(job, plan, run.policy.objective, "group", reward)
  drawn, original = {}, run._updates
  run._updates = lambda state, drawing, d, n: original(state, drawing, drawn.update(d) or d, n)
  before = run.policy.create(model.params, 0)
  # Away from the given weights, where divergence and anchor pull.
  before = dataclasses.replace(before, params=jax.tree.map(lambda p: p + 0.02, before.params))
  after, metrics = run._epoch(before, _PROMPTS, 0)
  return before, after, metrics, drawn[ROUTE]


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_disable_most_optimizations", True)
  _, want, want_metrics, want_drawn = _run(sharding.make(jax.devices()[:1]))
  layout = sharding.make(jax.devices(), fsdp=2, tensor=2)
  before, got, metrics, drawn = _run(layout)
  states = [dataclasses.replace(s, key=s.step) for s in (got, want)]
  names = ("x", "goal", "velocity", "rewards", "advantage")
  sys.stdout.write(
    json.dumps(
      {
        "state": max(apart(a, b) for a, b in zip(*map(jax.tree.leaves, states), strict=True)),
        "moved": float(np.abs(got.params["block_00"]["image_out"]["kernel"]["b"]).max()),
        "metrics": {k: [metrics[k], want_metrics[k]] for k in want_metrics},
        "drawn": {name: apart(getattr(drawn, name), getattr(want_drawn, name)) for name in names},
        "advantage": want_drawn.advantage.tolist(),
        "stays": [str(a.sharding) for a in jax.tree.leaves(got)] == [str(a.sharding) for a in jax.tree.leaves(before)],
        "parts": parts(got),
        "rows": drawn.x.addressable_shards[0].data.shape[0] / len(drawn.x),
      }
    )
  )


if __name__ == "__main__":
  main()
