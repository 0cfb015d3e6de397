"""Attention over 2 x 2 host devices beside the same on one; run as a program, it writes what it found as JSON.

python -m tests.multi_device.attention_cases
"""

import itertools
import json
import sys
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from elasticdit_jax.ops import attention, blocks, gating
from elasticdit_jax.ops.sparse_attention import sparse_attention
from tests.ops.sparse_attention_test import make_case

TEXTS = ("full", "sparse", "skipped")
AXES = {"batch_axes": "data", "head_axes": "model"}
SPLITS = {
  "whole": (),
  "batch": ("data",),
  "heads": (None, None, "model"),
  "both": ("data", None, "model"),
  "tokens": (None, "data"),
}
MASKS = {"none": None, "shared": 1, "per_head": 4}


def sparse(mesh, per_head, text):
  """Largest difference of outputs and gradients from those on one device."""
  qkv, kept, options, weight = make_case(4, 6, 2, 3, batch=2, heads=4, per_head=per_head, text=text)
  return _apart(mesh, qkv, weight, lambda *qkv, **axes: sparse_attention(*qkv, kept, **options, **axes))[0]


def dense_in_parts(mesh, heads):
  """The same for dense attention of many tokens, and how often the devices gather something."""
  qkv, _, options, weight = make_case(4, 6, 2, 3, batch=2, heads=4)
  rng = np.random.default_rng(0)
  image_mask = None if heads is None else rng.random((2, heads, 24, 24)) < 0.5
  call = {"text_len": 5, "text_mask": options["text_mask"], "image_mask": image_mask}
  with mock.patch.multiple(attention, _MANY_LOGITS=100, _QUERIES=8):
    return _apart(mesh, qkv, weight, lambda *qkv, **axes: attention.dense_attention(*qkv, **call, **axes))


def explicit(mesh, per_head):
  """By name of a split: largest difference where arrays carry it, from raster to raster; how results are split."""
  grid, text_len = blocks.BlockGrid(6, 5, 2, 1), 6
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, text_len + 30, 4, 8)).astype(np.float32)
  text_mask = np.arange(text_len) < np.array([[6], [3]])
  valid = grid.valid()[None]

  def run(x, text_mask, valid):
    cut = blocks.to_blocks(x, grid, text_len)
    pooled = blocks.pool(cut[:, text_len:], grid.block_size, valid)
    real = blocks.block_mask(valid, grid.block_size)
    kept = gating.select_blocks(pooled, pooled, 4, per_head=per_head, force_self=True, block_mask=real)
    options = {"text_len": text_len, "text_mask": text_mask}
    sparse = sparse_attention(cut, cut, cut, kept, block_size=grid.block_size, key_mask=valid, **options)
    back, dense = blocks.from_blocks(sparse, grid, text_len), attention.dense_attention(x, x, x, **options)
    return jnp.sum(jnp.sin(back + dense)), {"tokens": (cut, pooled, sparse, back, dense), "lists": kept}

  program = jax.value_and_grad(run, has_aux=True)
  want = jax.jit(program)(x, text_mask, valid)
  report = {}
  for name, spec in SPLITS.items():
    with jax.set_mesh(mesh):
      places = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (spec, spec[:1], ()))
      given = [jax.device_put(*pair) for pair in zip((x, text_mask, valid), places, strict=True)]
      # Outside jit as well, once: every operation is compiled alone then.
      got = (program if name == "both" and per_head else jax.jit(program))(*given)
    report[name] = _difference(got, want), jax.tree.map(lambda x: list(x.sharding.spec), got[0][1])
  return report


def beside_explicit(axis_types):
  """Largest differences, and counts of gathers, where explicit axes are not all there is or are not all in use."""
  qkv, kept, options, _ = make_case(4, 6, 2, 3, batch=2, heads=4, text_len=0)
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axis_types)
  rows = PartitionSpec("data")

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  def sparse(q, k, v, kept, **axes):
    return sparse_attention(q, k, v, kept, **options, **axes)

  def dense(q, k, v, _, **axes):
    return attention.dense_attention(q, k, v, 0, **axes)

  report = {}
  for name, call in (("sparse", sparse), ("dense", dense)):
    want = call(*qkv, kept)
    given = *(put(x, "data", None, "model") for x in qkv), put(kept, "data")
    report[f"{name}, mesh not set"] = _difference(jax.jit(call)(*given), want), 0
    with jax.set_mesh(mesh):
      program = jax.jit(partial(call, head_axes="model")).lower(*given).compile()
      report[f"{name}, one axis named"] = _difference(program(*given), want), program.as_text().count(" all-gather(")
      inside = jax.shard_map(call, in_specs=rows, out_specs=rows, axis_names={"data"})
      rowwise = [put(x, "data") for x in (*qkv, kept)]
      apart = _difference(jax.jit(inside)(*rowwise), want)
      if name == "dense":  # Of the automatic axes that the sparse form makes in there, JAX has no gradient.
        apart = max(apart, _difference(_gradients(inside)(*rowwise), _gradients(call)(*qkv, kept)))
      report[f"{name}, inside a partial shard_map"] = apart, 0
  return report


def _gradients(call):
  return jax.jit(jax.grad(lambda *inputs: jnp.sum(jnp.sin(call(*inputs))), (0, 1, 2)))


def _apart(mesh, qkv, weight, attend):
  def run(**axes):
    def loss(*qkv):
      out = attend(*qkv, **axes)
      return jnp.sum(weight * out), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

  want = run()(*qkv)
  with jax.set_mesh(mesh):
    place = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    program = run(**AXES).lower(*(jax.device_put(x, place) for x in qkv)).compile()
    got = program(*(jax.device_put(x, place) for x in qkv))
  return _difference(got, want), program.as_text().count(" all-gather(")


def _difference(got, want):
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  # The sum of the loss alone is over all devices; arrays are compared.
  return float(np.max([np.max(np.abs(np.asarray(a) - np.asarray(b))) for a, b in pairs if a.ndim]))


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 4)
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  report = {
    f"sparse {text} {per_head}": sparse(mesh, per_head, text) for per_head, text in itertools.product((0, 1), TEXTS)
  }
  by_hand = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
  report |= {f"explicit {per_head}": explicit(by_hand, per_head) for per_head in (0, 1)}
  free, own = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
  report |= {"explicit": beside_explicit((own, own)), "mixed": beside_explicit((own, free))}
  report |= {f"dense {name}": dense_in_parts(mesh, heads) for name, heads in MASKS.items()}
  sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
  main()
