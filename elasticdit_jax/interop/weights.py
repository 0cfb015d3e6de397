"""Weight files: a nested dict of arrays <-> one safetensors file.

Tensor names are the key paths joined by "/": `block_00/mlp/up/kernel`. The files hold plain tensors and a table of
strings, nothing that runs when it is read, and any safetensors reader opens them.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

Tree = dict[str, Any]
_DTYPES = {"float16": np.float16, "float32": np.float32}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict as {"a/b/c": leaf}, sorted by name; raises ValueError for keys that are no plain names."""
  flat = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    keys = [getattr(key, "key", None) for key in path]
    if not keys or any(not isinstance(key, str) or not key or "/" in key for key in keys):
      raise ValueError(f"weights: expected nested dicts with plain string keys, got the path {path}")
    flat["/".join(keys)] = leaf
  return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> Tree:
  """The inverse of `flatten`."""
  tree: Tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def save_tree(
  path: str | os.PathLike,
  tree: Mapping[str, Any],
  *,
  dtype: str | None = None,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a nested dict of arrays, atomically: a reader never sees half a file.

  Args:
    path: of the .safetensors file; its directory must exist.
    tree: nested dict of arrays. bfloat16 leaves are stored as float32, which holds them exactly.
    dtype: "float16" or "float32" for all floating-point leaves; None keeps each leaf's own.
    metadata: strings stored in the header (command, seed, ...).

  Raises:
    ValueError: for an unknown dtype, non-string metadata, bad keys, or values that are not finite in `dtype`.
  """
  if dtype is not None and dtype not in _DTYPES:
    raise ValueError(f"save_tree.dtype: expected one of {', '.join(_DTYPES)} or None, got {dtype!r}")
  metadata = dict(metadata or {})
  wrong = {k: v for k, v in metadata.items() if not isinstance(k, str) or not isinstance(v, str)}
  if wrong:
    raise ValueError(f"save_tree.metadata: expected strings, got {wrong!r}; encode other values as JSON text")
  tensors = {name: _storable(name, leaf, dtype) for name, leaf in flatten(tree).items()}
  partial = f"{os.fspath(path)}.partial"
  safetensors_numpy.save_file(tensors, partial, metadata=metadata)
  os.replace(partial, path)


def _storable(name: str, leaf: Any, dtype: str | None) -> np.ndarray:
  array = np.asarray(leaf, order="C")
  if not jax.numpy.issubdtype(array.dtype, np.floating):
    return array
  if array.dtype == jax.numpy.bfloat16:
    array = array.astype(np.float32)
  if dtype is not None:
    with np.errstate(over="ignore"):  # an overflow is reported below, by name
      array = array.astype(_DTYPES[dtype])
  if not np.isfinite(array).all():
    raise ValueError(f"save_tree: {name} holds values that are not finite as {array.dtype}; nothing was written")
  return array


def load_tree(path: str | os.PathLike) -> Tree:
  """Reads a safetensors file into a nested dict of numpy arrays; floating-point leaves become float32.

  Raises:
    ValueError: where the file is missing, truncated or no safetensors file; the message names it.
  """
  with open_file(path) as f:
    flat = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (the handle is no mapping)
  widened = {k: v.astype(np.float32) if jax.numpy.issubdtype(v.dtype, np.floating) else v for k, v in flat.items()}
  return unflatten(widened)


def load_metadata(path: str | os.PathLike) -> dict[str, str]:
  """The strings in the header of a safetensors file; raises ValueError like `load_tree`."""
  with open_file(path) as f:
    return dict(f.metadata() or {})


def open_file(path: str | os.PathLike) -> Any:
  """A handle of safetensors.safe_open; raises ValueError, naming the file, where it is missing or damaged."""
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise ValueError(f"weights: no file {path}; check the path, or run the task that writes it")
  try:
    return safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as e:
    size = os.path.getsize(path)
    raise ValueError(
      f"weights: {path} ({size} bytes) is truncated or no safetensors file ({e}); copy or write it again"
    ) from e


def check_tree(expected: Mapping[str, Any], loaded: Mapping[str, Any], source: str = "weights") -> None:
  """Compares names and shapes of two nested dicts.

  Args:
    expected: leaves with a `shape`: arrays, or the result of `jax.eval_shape`.
    loaded: what was read.
    source: where it was read from, for the message.

  Raises:
    ValueError: naming the first few tensors that are missing, unexpected or of another shape.
  """
  want = {name: tuple(leaf.shape) for name, leaf in flatten(expected).items()}
  have = {name: tuple(leaf.shape) for name, leaf in flatten(loaded).items()}
  differences = [f"{name} is missing" for name in want if name not in have]
  differences += [f"{name} is not part of the model" for name in have if name not in want]
  differences += [
    f"{name} has shape {have[name]} where the model has {want[name]}"
    for name in want
    if name in have and want[name] != have[name]
  ]
  if differences:
    rest = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
    raise ValueError(
      f"{source}: {len(differences)} of {len(want)} tensors do not fit the model: {'; '.join(differences[:4])}{rest};"
      " use the configuration these weights were made with"
    )
