"""How fast a chip could be, how fast a step is, and how much memory it took."""

import dataclasses
import functools
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from elasticdit_jax.evals.flops import count_flops
from elasticdit_jax.models import dit
from elasticdit_jax.models.codec import Codec
from elasticdit_jax.train import step as step_lib
from elasticdit_jax.types import Text, to_float

# Dense bf16 products per second, by jax.Device.device_kind, as their makers give them.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA L4": 121e12,
}


def peak_flops() -> float | None:
  """Of all devices together; None where it is not known, as on a CPU."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return peak and peak * jax.device_count()


def memory_gb() -> float:
  """The most memory that was in use so far, in 10^9 bytes: of the first device here, or on a CPU of the process."""
  used = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in used:
    return used["peak_bytes_in_use"] / 1e9
  unit = 1 if sys.platform == "darwin" else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """FLOPs of updates, from the programs of a group of routes: skipped blocks and dropped keys cost nothing.

  Encoder, backbone forward and backward, and the teacher where it is asked; what rematerialisation computes again does
  not count, so that a ratio to the peak is the usual MFU.

  Attributes:
    cfg, flow: the backbone and its times.
    codecs: VAE factor -> Codec.
    batch_size: images of an update over all hosts.
    size: side of the images in pixels.
    distill: see step.make_step.
  """

  cfg: dit.DiTConfig
  flow: step_lib.FlowConfig
  codecs: Mapping[int, Codec]
  batch_size: int
  size: int
  distill: float

  def of(self, group: step_lib.Group, distilled: bool) -> int:
    """FLOPs of one update; traced once for each pair of arguments."""
    if (group, distilled) not in self._counted:
      self._counted[group, distilled] = self.batch_size * self._per_image(group, distilled)
    return self._counted[group, distilled]

  @functools.cached_property
  def _counted(self) -> dict[Any, int]:
    return {}

  def _per_image(self, group: step_lib.Group, distilled: bool) -> int:
    cfg = dataclasses.replace(self.cfg, remat="none")
    params = dit.init_shapes(cfg)
    text = Text(
      jax.ShapeDtypeStruct((1, cfg.text_length, cfg.text_dim), jnp.float32),
      jax.ShapeDtypeStruct((1, cfg.text_length), jnp.bool_),
    )

    def update(params, teacher, image, text, key):
      latents = {f: self.codecs[f].encode(to_float(image)) for f in step_lib.factors(group)}
      weight = self.distill if distilled else 0.0

      def loss(params):
        return step_lib.group_losses(cfg, self.flow, params, latents, text, key, group, teacher, weight)[0]

      return jax.grad(loss)(params)

    image = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.uint8)
    return count_flops(update, params, params, image, text, jax.eval_shape(lambda: jax.random.key(0)))
