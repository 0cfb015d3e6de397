"""What chips can do, from their makers' pages: dense bf16 products, memory, links."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip; per second where it says so.

  Attributes:
    flops: bf16 multiply-adds times two, dense, per second.
    hbm: bytes of memory.
    hbm_bandwidth: bytes per second.
    ici: bytes per second over the links to neighbours, both directions and all links together; 0 where not known.
    dcn: bytes per second to other slices, both directions together; 0 where not known.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  ici: float = 0.0
  dcn: float = 0.0


# By jax.Device.device_kind. Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; data sheets of the GPUs, without
# sparsity. DCN: 6.4 Tbit/s a pod of 256 (v5e), 50 Gbit/s a chip (v5p).
CHIPS = {
  "TPU v4": Chip(275e12, 32 * 2**30, 1200e9),
  "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 400e9, 6.4e12 / 8 / 256),
  "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 1200e9, 50e9 / 8),
  "TPU v6 lite": Chip(918e12, 32 * 2**30, 1638e9, 800e9),
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9),
  "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9),
  "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9),
  "NVIDIA H200": Chip(989e12, 141e9, 4800e9),
  "NVIDIA L4": Chip(121e12, 24e9, 300e9),
}
