"""Steps on 8 host devices beside the same steps on one; run as a program, it writes what it found as JSON.

python -m tests.multi_device.step_cases
"""

import dataclasses
import functools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from elasticdit_jax import elastic
from elasticdit_jax.train import optim, sharding, state, step
from tests.evals import tiny_model
from tests.train import small

# name -> sizes of fsdp and tensor, parts of accumulation
CASES = {
  "data": (1, 1, 1),
  "fsdp": (sharding.REST, 1, 2),
  "tensor": (1, 2, 1),
  "mix": (2, 2, 1),
}
STEPS = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pool:
  """Stands for an f8 codec: compilation is most of the time here."""

  gain: jax.Array

  def encode(self, image):
    pooled = image.reshape(len(image), 8, 8, 8, 8, 3).mean((2, 4))
    return self.gain * pooled @ jnp.eye(3, 16)


def _run(layout, accumulate=1):
  """State, metrics and number of traces after a few steps of a route, beside a frozen block and a teacher."""
  model = tiny_model.make(())
  cfg, tx = layout.bind(model.cfg), optax.sgd(0.05, momentum=0.9)
  # A dense block, a frozen one, a sparse one: one program for all of them.
  group = (elastic.Route("d2-s25-f8", (True, False, True), (0.0, 0.0, 0.5), 8),)
  current = layout.build(functools.partial(state.create, tx=tx, seed=0, teacher=True), model.params)
  flow = step.FlowConfig(**small.FLOW)
  update = step.make_step(cfg, flow, tx, ema_decay=0.9, accumulate=accumulate, out_shardings=layout.results(current))
  codecs = layout.replicate({8: _Pool(jnp.float32(2))})
  for i in range(STEPS):
    batch = layout.put_batch(small.batch(model.cfg, rows=16, seed=i))
    with layout.active():
      current, metrics = update(current, codecs, batch, group=group, trainable=group)
  return current, metrics, update._cache_size()


def apart(a, b):
  """Largest difference of two arrays, over the largest value."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-12))


def parts(tree):
  """Name -> share of an array on one device, for arrays that are split."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  shares = {
    jax.tree_util.keystr(path, simple=True, separator="/"): x.addressable_shards[0].data.size / x.size
    for path, x in flat
  }
  return {name: share for name, share in shares.items() if share < 1}


def muon():
  """An update by Muon over 2 x 2 x 2 devices: how far it is from that on one device, and what is exchanged."""
  keys = jax.random.split(jax.random.key(0), 6)
  blocks = [f"block_{i:02d}" for i in range(3)]  # an uneven number for the 4 devices that share them
  params = {
    block: {"qkv": {"kernel": jax.random.normal(a, (8, 24))}, "image_out": {"kernel": jax.random.normal(b, (32, 8))}}
    for block, a, b in zip(blocks, keys[:3], keys[3:], strict=True)
  }
  grads = jax.tree.map(lambda x: x**2, params)
  options = dict(small.optimizer(learning_rate=1.0, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0))
  found = {}
  for devices in (jax.devices()[:1], jax.devices()):
    layout = sharding.make(devices, **({"fsdp": 2, "tensor": 2} if len(devices) > 1 else {}))
    tx = optim.make(options | {"name": "muon"}, params, 1.0, layout.places)
    args = layout.build(lambda params, grads, tx=tx: (grads, tx.init(params), params), params, grads)
    with layout.active():
      program = jax.jit(tx.update).lower(*args).compile()
    found[len(devices)] = program(*args)[0], program.as_text()
  (want, _), (got, text) = found[1], found[8]
  apart_by = max(apart(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
  groups = list(_groups(text))
  across = [group for group in groups if len({device // 4 for device in group}) > 1]
  return {"apart": apart_by, "exchanges": text.count(" all-to-all("), "across": across}


def _groups(program):
  """Lists of the devices that exchange something, from the text of a compiled program in its three notations."""
  for listed in re.findall(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", program):
    yield from ([int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed))
  for shape, order in re.findall(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", program):
    yield from _devices(order).reshape(_numbers(shape)).tolist()
  named = r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(([^ ]+)\))? \{([^}]+)\}"
  for mesh, order, axes in re.findall(named, program):
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", mesh), strict=True)
    sizes, chosen = [int(n) for n in sizes], [names.index(axis) for axis in re.findall(r"'(\w+)'", axes)]
    devices = (_devices(order) if order else np.arange(math.prod(sizes))).reshape(sizes)
    members = math.prod(sizes[i] for i in chosen)
    yield from np.moveaxis(devices, chosen, range(-len(chosen), 0)).reshape(-1, members).tolist()


def _devices(order):
  """Numbers of devices in an order such as [2,4]T(1,0)."""
  dims, _, moved = order.partition("T")
  devices = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return devices.transpose(_numbers(moved)) if moved else devices


def _numbers(text):
  return [int(n) for n in text.strip("[]()").split(",")]


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_disable_most_optimizations", True)
  alone = sharding.make(jax.devices()[:1])
  want, want_metrics, _ = _run(alone)
  report = {"frozen": apart(want.params["block_01"]["modulation"], want.teacher["block_01"]["modulation"])}
  report["muon"] = muon()
  for name, (fsdp, tensor, accumulate) in CASES.items():
    layout = sharding.make(jax.devices(), fsdp=fsdp, tensor=tensor)
    got, metrics, traces = _run(layout, accumulate)
    leaves = zip(*(jax.tree.leaves(dataclasses.replace(s, key=s.step)) for s in (got, want)), strict=True)
    report[name] = {
      "state": max(apart(a, b) for a, b in leaves),
      "metrics": max(apart(metrics[k], want_metrics[k]) for k in want_metrics),
      "traces": traces,
      "parts": parts(got),
      "described": layout.describe(),
    }
  sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
  main()
