"""Tests compile a lot and compute little: on CPU, XLA's cheapest code generation halves their time."""

import os

_CHEAP = {
  "xla_backend_optimization_level": "0",
  "xla_cpu_use_fusion_emitters": "false",  # the emitters before them take a third of the time
  "xla_cpu_parallel_codegen_split_count": "1",
}
for _flag, _value in _CHEAP.items():
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()
