"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on the matrices of attention and MLPs.

An adapter is a pair (a [in, rank], b [rank, out]) under the path of the kernel it changes: W + alpha / rank * a b. The
model runs on merged weights, so it needs no second code path, and what is saved in the end is an ordinary weight set.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Both streams; modulation, embeddings and the final layers stay as they are.
TARGETS = r"block_\d+/(attention/(image|text)/qkv|(image|text)_out|(image|text)_mlp/(up|down))/kernel$"


def init(params: Mapping[str, Any], rank: int, key: jax.Array, targets: str = TARGETS) -> dict[str, Any]:
  """Adapters that change nothing yet: a normal with variance 1 / rank, b zero.

  Args:
    params: the backbone's parameters (arrays or shapes); only names and shapes are read.
    rank: at least 1.
    key: of the random numbers.
    targets: regular expression on the path of a kernel, "block_00/image_out/kernel".

  Returns:
    A tree like params with only the targets in it, {"a": [in, rank], "b": [rank, out]} in place of each.

  Raises:
    ValueError: for a rank below 1 or targets that match no matrix.
  """
  if rank < 1:
    raise ValueError(f"lora: expected a rank of at least 1, got {rank}")
  adapters: dict[str, Any] = {}
  for number, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
    keys = [str(k.key) for k in path]
    if len(leaf.shape) != 2 or not re.search(targets, "/".join(keys)):
      continue
    rows, columns = leaf.shape
    a = jax.random.normal(jax.random.fold_in(key, number), (rows, rank)) / math.sqrt(rank)
    node = adapters
    for name in keys[:-1]:
      node = node.setdefault(name, {})
    node[keys[-1]] = {"a": a, "b": jnp.zeros((rank, columns))}
  if not adapters:
    raise ValueError(f"lora: no matrix of the backbone matches {targets!r}")
  return adapters


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
  """params with W + scale * a b in place of every W that has an adapter; differentiable in both."""
  merged = dict(params)
  for name, node in adapters.items():
    if set(node) == {"a", "b"}:
      merged[name] = params[name] + scale * (node["a"] @ node["b"])
    else:
      merged[name] = merge(params[name], node, scale)
  return merged
