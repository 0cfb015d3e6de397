"""Shapes of T-DVAEs: the fields of a configuration, their checks, and the named ones."""

import dataclasses


def _is_int(value: object, least: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Shape of a T-DVAE.

  Attributes:
    factor: spatial compression, 8 or 16.
    widths: channels of the stages at H/2, H/4, ... H/factor.
    encoder_blocks, decoder_blocks: residual blocks per stage.
    flow: channels of the convolution that injects each wavelet level.
    latent_channels: 16 in the paper, for both factors.
    shortcut: linear 1x1 path between the deepest wavelet level and the latents, beside the network. It starts
      training near the best linear code, which small budgets need.
    groups: of the convolutions in the residual blocks of each stage; () for dense ones.
    mid_blocks, mid_groups: residual blocks at the lowest resolution, in both halves, and their groups.
    norm_groups: most groups of a GroupNorm; a power of two.
    narrow_upsample: whether the convolution after an upsampling already goes to the width of the next stage.
    decoder_norm: GroupNorm and SiLU before the last prediction of bands.
    carried_bands: 3 for LL, cH, cV as in the paper; 1 for LL alone, 4 for all.
    branches: whether the parameters are in training form, with several branches per 3x3 convolution; `deploy` in
      models/tdvae.py merges them.
  """

  factor: int = 8
  widths: tuple[int, ...] = (16, 48, 96)
  encoder_blocks: tuple[int, ...] = (0, 1, 1)
  decoder_blocks: tuple[int, ...] = (1, 1, 2)
  flow: int = 24
  latent_channels: int = 16
  shortcut: bool = True
  groups: tuple[int, ...] = ()
  mid_blocks: int = 0
  mid_groups: int = 1
  norm_groups: int = 8
  narrow_upsample: bool = True
  decoder_norm: bool = False
  carried_bands: int = 3
  branches: bool = False

  def __post_init__(self):
    for field in ("widths", "encoder_blocks", "decoder_blocks", "groups"):
      if not isinstance(getattr(self, field), tuple | list):
        raise ValueError(f"VAEConfig.{field}: expected one number per stage, got {getattr(self, field)!r}")
      object.__setattr__(self, field, tuple(getattr(self, field)))
    levels = {8: 3, 16: 4}.get(self.factor)
    if levels is None:
      raise ValueError(f"VAEConfig.factor: expected 8 or 16, got {self.factor}")
    for field in ("widths", "encoder_blocks", "decoder_blocks", *(["groups"] if self.groups else [])):
      if len(getattr(self, field)) != levels:
        raise ValueError(f"VAEConfig.{field}: f{self.factor} has {levels} stages, got {getattr(self, field)}")
    self._check_numbers()
    self._check_groups()

  def _check_numbers(self) -> None:
    for field in ("encoder_blocks", "decoder_blocks", "mid_blocks"):
      value = getattr(self, field)
      if not all(_is_int(n, 0) for n in (value if isinstance(value, tuple) else (value,))):
        raise ValueError(f"VAEConfig.{field}: expected numbers of blocks, 0 or more, got {value!r}")
    for field in ("widths", "flow", "latent_channels", "groups", "mid_groups", "norm_groups"):
      value = getattr(self, field)
      if not all(_is_int(n, 1) for n in (value if isinstance(value, tuple) else (value,))):
        what = "groups" if field.endswith("groups") else "channels"
        raise ValueError(f"VAEConfig.{field}: expected positive numbers of {what}, got {value!r}")
    if self.norm_groups & (self.norm_groups - 1):
      raise ValueError(f"VAEConfig.norm_groups: expected a power of two, got {self.norm_groups}")
    if self.carried_bands not in (1, 3, 4) or isinstance(self.carried_bands, bool):
      raise ValueError(f"VAEConfig.carried_bands: expected 1, 3 or 4, got {self.carried_bands!r}")
    for field in ("shortcut", "narrow_upsample", "decoder_norm", "branches"):
      if not isinstance(getattr(self, field), bool):
        raise ValueError(f"VAEConfig.{field}: expected true or false, got {getattr(self, field)!r}")

  def _check_groups(self) -> None:
    """Every grouped convolution needs channels, in and out, that split evenly."""
    for level in range(self.levels):
      inputs = [self.encoder_input(level)] if self.encoder_blocks[level] else []
      inputs += [self.decoder_input(level)] if self.decoder_blocks[level] else []
      self._check_split("groups", self.stage_groups(level), {*inputs, self.widths[level]})
    if self.mid_blocks:
      self._check_split("mid_groups", self.mid_groups, {self.widths[-1], self.encoder_output})

  def _check_split(self, field: str, groups: int, channels: set[int]) -> None:
    uneven = sorted(c for c in channels if c % groups)
    if uneven:
      raise ValueError(
        f"VAEConfig.{field}: {uneven[0]} channels do not split into {groups} groups; choose widths, flow and groups"
        " that divide"
      )

  @property
  def levels(self) -> int:
    return len(self.widths)

  def stage_groups(self, level: int) -> int:
    """Groups of the residual blocks of a stage."""
    return self.groups[level] if self.groups else 1

  def encoder_input(self, level: int) -> int:
    """Channels that enter the residual blocks of an encoder stage: those of the stage before, and the flow."""
    if not level:
      return self.widths[0]
    # A stage without blocks passes on what it was given, but the strided convolution always ends in its width.
    return self.widths[level - 1] + self.flow

  @property
  def encoder_output(self) -> int:
    """Channels after the last encoder stage."""
    return self.widths[-1] if self.encoder_blocks[-1] else self.encoder_input(self.levels - 1)

  def decoder_input(self, level: int) -> int:
    """Channels that enter the residual blocks of a decoder stage."""
    if level == self.levels - 1 or self.narrow_upsample:
      return self.widths[level]
    return self.widths[level + 1]

  def band_channels(self, level: int) -> int:
    """Channels of W^(level): 12, 36, 108, 324 where three bands are carried on."""
    return 4 * 3 * self.carried_bands**level


NANO = {
  8: VAEConfig(8),
  16: VAEConfig(16, (16, 48, 80, 96), (0, 1, 1, 2), (1, 1, 1, 2)),
}
# Half of nano's parameters and FLOPs: a student of it for the embedded default.
PICO = VAEConfig(8, (12, 32, 64), flow=16)


def _large(factor: int, groups: tuple[int, ...], mid_groups: int, **changes: object) -> VAEConfig:
  levels = len(groups)
  fields = {
    "widths": (128, 256, 512, 512)[:levels],
    "encoder_blocks": (2,) * levels,
    "decoder_blocks": (3,) * levels,
    "flow": 128,
    "shortcut": False,
    "mid_blocks": 2,
    "norm_groups": 32,
    "narrow_upsample": False,
    "decoder_norm": True,
  }
  return VAEConfig(factor, groups=groups, mid_groups=mid_groups, **(fields | changes))


# The paper gives FLOPs and no sizes: these are ours, chosen to meet its 3.37 and 1.81 TFLOPs at 1024 px (f8). The dense
# one spends what fused upsampling saves on ungrouped convolutions.
PRESETS = {
  "nano-f8": NANO[8],
  "nano-f16": NANO[16],
  "pico-f8": PICO,
  "tdvae1-f8": _large(8, (1, 1, 1), 4),
  "tdvae1-f16": _large(16, (1, 1, 1, 4), 4),
  "tdvae2-f8": _large(8, (1, 8, 16), 16),
  "tdvae2-f16": _large(16, (1, 8, 16, 16), 16),
  "tdvae2-dense-f8": _large(8, (1, 1, 1), 2, widths=(96, 192, 384), decoder_blocks=(2, 3, 4), flow=96, norm_groups=32),
}
