"""Tests compile a lot and compute little: on CPU, XLA's cheapest code generation takes a third of the time."""

import importlib.metadata
import os

_CHEAP = {"xla_backend_optimization_level": "0"}
# XLA ends a process that is given a flag it does not know, and these two come and go.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  _CHEAP |= {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
for _flag, _value in _CHEAP.items():
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()
