"""Floating-point operations of a function, counted in its jaxpr; nothing is compiled or run.

Counts 2 * (multiply-accumulates) of matrix products and convolutions, the convention of the paper's tables;
element-wise work, normalisation and softmax are left out, as there.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(fn: Callable[..., Any], *args: Any, attention: bool = True) -> int:
  """FLOPs of one call fn(*args).

  Args:
    fn: any function that JAX can trace: jitted, checkpointed, differentiated, with custom derivatives.
    *args: arrays or jax.ShapeDtypeStruct; only shapes and dtypes are read. Bind static arguments (a Route) beforehand.
    attention: False leaves out the products of attention. Rule: a dot_general with batch dimensions multiplies two
      activations per sample and head (q k^T and weights v); a weight matrix has no batch axis. A weight product under
      jax.vmap over weights looks the same and is left out too. A Pallas kernel counts as attention.

  Returns:
    Scans count their length, conditionals their dearest branch, code under shard_map all of its devices. Zeros that a
    transposed convolution inserts into its input are not counted; zeros of padding are, as usual.

  Raises:
    ValueError: for products inside a while loop, whose number of rounds is not known, and for a Pallas kernel without
      a cost estimate.
  """
  return _count(jax.make_jaxpr(fn)(*args).jaxpr, attention)


def _count(jaxpr: core.Jaxpr, attention: bool) -> int:
  return sum(_count_equation(equation, attention) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn, attention: bool) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot_general(equation, attention)
  if name == "conv_general_dilated":
    return _conv_general_dilated(equation)
  if name == "pallas_call":
    return _pallas_call(params, attention)
  inner = [_count(jaxpr, attention) for jaxpr in _jaxprs(params)]
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "cond":
    return max(inner)
  if name == "while" and sum(inner):
    raise ValueError(
      "count_flops: a while loop of unknown length holds products; use jax.lax.scan or a static fori_loop"
    )
  if name == "shard_map":
    # "manual_axes" or "newly_manual_axes", by the version of JAX.
    axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
    return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
  return sum(inner)


def _jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
  """Every program inside an equation; jit, checkpoint, custom derivatives, scan, cond and while keep them in params."""
  found = []
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found


def _dot_general(equation: core.JaxprEqn, attention: bool) -> int:
  (contracted, _), (batch, _) = equation.params["dimension_numbers"]
  if batch and not attention:
    return 0
  left = equation.invars[0].aval.shape
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _conv_general_dilated(equation: core.JaxprEqn) -> int:
  # The kernel's input axis is already divided by feature_group_count, so groups need no factor of their own.
  kernel = equation.invars[1].aval.shape
  out_axis = equation.params["dimension_numbers"].rhs_spec[0]
  per_output = math.prod(size for axis, size in enumerate(kernel) if axis != out_axis)
  inserted = math.prod(equation.params["lhs_dilation"])
  return 2 * math.prod(equation.outvars[0].aval.shape) * per_output // inserted


def _pallas_call(params: dict[str, Any], attention: bool) -> int:
  if not attention:
    return 0
  if params.get("cost_estimate") is None:
    raise ValueError("count_flops: a Pallas kernel has no cost_estimate; pass one to pallas_call")
  return int(params["cost_estimate"].flops)
