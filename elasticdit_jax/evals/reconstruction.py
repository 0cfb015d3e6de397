"""Task `evaluate`, `:vae`: what VAEs lose and what they cost, on any folder of pictures (Tables 3 and 5 of ElasticDiT).

    pictures --encode, decode, round to uint8--> PSNR, SSIM, weight-free distance, LPIPS where weights are given
    shapes   --jaxpr--> TFLOPs at 1024 px, in the paper's count (no attention products) and all of them
    one picture at a time, VAEs in turns --> ms to encode and to decode

Metrics are means over pictures of pictures rounded to 256 levels, as they would be saved.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from elasticdit_jax.data import arrays, folder, imagefolder, photographs, pipeline
from elasticdit_jax.evals import image_metrics, perceptual, profile, reconstruction_text
from elasticdit_jax.evals.flops import count_flops
from elasticdit_jax.interop import lpips_weights, vaes
from elasticdit_jax.models import lpips
from elasticdit_jax.models.codec import Codec, to_uint8
from elasticdit_jax.types import to_float

_LEAST = 16  # pixels a side: the windows of SSIM and the poolings of LPIPS
_FLOPS_SIZE = 1024
_SCENES_SEED = 77


@dataclasses.dataclass(frozen=True)
class Picture:
  """A name and uint8 [H, W, 3]."""

  name: str
  image: np.ndarray


def reconstruct(codec: Codec, images: np.ndarray) -> np.ndarray:
  """Pictures through a VAE and back.

  Args:
    codec: the VAE.
    images: of any kind that `data.arrays.to_rgb` takes, of any size.

  Returns:
    uint8 [N, H, W, 3].

  Raises:
    ValueError: for arrays that are no pictures.
  """
  return np.asarray(_round_trip(codec, arrays.to_rgb(images)))


@jax.jit
def _round_trip(codec: Codec, image: jax.Array) -> jax.Array:
  return to_uint8(codec.decode(codec.encode(to_float(image)), image.shape[1:3]))


def run(config: Any, workdir: str) -> None:
  """Writes WORKDIR/report.json, report.md and images/crops.png.

  Args:
    config: fields vaes (names separated by commas: "shipped", model directories, workdirs, folders of diffusers),
      images ("photographs", "scenes" or a folder), size (0 keeps their own), count (most pictures; 0 = all), crop
      (pixels), lpips (weights file, "" for none) and repeats (of the timing).
    workdir: is created.

  Raises:
    ValueError: in one line; nothing has been written then.
  """
  if os.path.exists(os.path.join(workdir, "config.json")):
    raise ValueError(f"workdir: {workdir} holds a training run, whose report would be lost; choose another --workdir")
  for field, least in (("size", 0), ("count", 0), ("crop", 8), ("repeats", 1)):
    if config[field] < least:
      raise ValueError(f"config.{field}: expected at least {least}, got {config[field]}")
  codecs = load_vaes(config.vaes)
  weights = lpips_weights.load(config.lpips) if config.lpips else None
  images, notes = load_pictures(config.images, config.size, config.count)
  rows, back = {}, {}
  for name, codec in codecs.items():
    back[name] = [reconstruct(codec, picture.image)[0] for picture in images]
    rows[name] = measure([p.image for p in images], back[name], weights) | cost(codec)
    logging.info("%s: PSNR %.2f dB, SSIM %.4f", name, rows[name]["psnr"], rows[name]["ssim"])
  for name, times in time_codecs(codecs, images[0].image, config.repeats).items():
    rows[name] |= times
  if weights is not None and "heads" not in weights:
    notes.append("The weights file has no lin tensors: a plain VGG16 feature distance, no LPIPS.")
  report = {"vaes": rows, "pictures": [f"{p.name} ({p.image.shape[1]} x {p.image.shape[0]})" for p in images]}
  reconstruction_text.write(
    workdir,
    report | {"notes": notes, "config": json.loads(config.to_json())},
    crops(images, back, config.crop),
  )
  logging.info("done: open %s", os.path.join(workdir, "report.md"))


def load_vaes(names: str) -> dict[str, Codec]:
  """Every VAE that the names (separated by commas) mean, labelled by name and factor.

  Raises:
    ValueError: where there is none, or the names hold one twice.
  """
  found = {}
  for name in filter(None, (part.strip() for part in names.split(","))):
    for factor, codec in vaes.load(name).items():
      label = f"{os.path.basename(name.rstrip('/')) or name} f{factor}"
      if label in found:
        label = f"{name} f{factor}"
      if label in found:
        raise ValueError(f"config.vaes: {name!r} is named twice in {names!r}")
      found[label] = codec
  if not found:
    raise ValueError("config.vaes: expected 'shipped', directories or both, separated by commas, got ''")
  return found


def load_pictures(source: str, size: int, count: int) -> tuple[list[Picture], list[str]]:
  """Pictures to reconstruct, and notes on those left out.

  Args:
    source: "photographs", "scenes" or a folder, searched recursively; captions are not needed.
    size: side of the squares they are cropped and scaled to; 0 keeps each picture's own size.
    count: most pictures; 0 takes all (of scenes: 64).

  Raises:
    ValueError: where none can be used, with the reason of the first.
  """
  if size and size < _LEAST:
    raise ValueError(f"config.size: expected 0 or at least {_LEAST} pixels, got {size}")
  if source == "scenes":
    made = pipeline.ScenesSource(_SCENES_SEED, size or 128, "any").read(np.arange(count or 64))[0]
    return [Picture(f"scene {i}", image) for i, image in enumerate(made)], []
  if source == "photographs":
    files = photographs.photographs()
  elif source:
    path = os.path.expanduser(source)
    files = {name: os.path.join(path, name) for name, _ in imagefolder.list_examples(path, "")}
  else:
    raise ValueError("config.images: expected 'photographs', 'scenes' or a folder, got ''")
  images, left_out = [], []
  for name, path in files.items():
    if count and len(images) == count:
      break
    try:
      images.append(Picture(name, folder.load_image(path, size or None, _LEAST)))
    except MemoryError:
      raise
    except Exception as e:  # Pillow raises nearly every kind for damaged files
      left_out.append(f"Left out: {name}: {' '.join(str(e).split()) or type(e).__name__}.")
      logging.warning(left_out[-1])
  if not images:
    raise ValueError(f"config.images: none of the {len(files)} pictures in {source} can be used; {left_out[0]}")
  return images, left_out


def measure(images: Sequence[np.ndarray], back: Sequence[np.ndarray], weights: Any = None) -> dict[str, float]:
  """Means over pictures of psnr (dB), ssim, distance (evals.perceptual) and, with LPIPS weights, lpips.

  Args:
    images, back: originals and reconstructions, uint8 [H, W, 3] each.
    weights: from interop.lpips_weights, or None.
  """
  found: dict[str, list[float]] = {}
  for one, other in zip(images, back, strict=True):
    for name, value in _metrics(one[None], other[None], weights).items():
      found.setdefault(name, []).append(float(value[0]))
  return {name: float(np.mean(values)) for name, values in found.items()}


@jax.jit
def _metrics(image: jax.Array, back: jax.Array, weights: Any) -> dict[str, jax.Array]:
  a, b = to_float(image), to_float(back)
  values = {
    "psnr": image_metrics.psnr((a + 1) / 2, (b + 1) / 2),
    "ssim": image_metrics.ssim((a + 1) / 2, (b + 1) / 2),
    "distance": perceptual.distance(a, b),
  }
  return values if weights is None else values | {"lpips": lpips.distance(weights, a, b)}


def cost(codec: Codec) -> dict[str, float]:
  """Parameters, and TFLOPs to encode and decode one picture of 1024 px: the paper's count, and with attention."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), codec)
  image = jax.ShapeDtypeStruct((1, _FLOPS_SIZE, _FLOPS_SIZE, 3), jnp.float32)

  def both(codec, image):
    return codec.decode(codec.encode(image), image.shape[1:3])

  return {
    "parameters": sum(x.size for x in jax.tree.leaves(codec.params)),
    "tflops": count_flops(both, shapes, image, attention=False) / 1e12,
    "tflops_true": count_flops(both, shapes, image) / 1e12,
  }


def time_codecs(codecs: Mapping[str, Codec], image: np.ndarray, repeats: int) -> dict[str, dict[str, float]]:
  """Median milliseconds to encode and to decode one picture, uint8 [H, W, 3]; all in turns in one process."""
  programs, picture = {}, jnp.asarray(to_float(image[None]))
  for name, codec in codecs.items():
    encode = jax.jit(lambda codec, x: codec.encode(x)).lower(codec, picture).compile()
    latents = encode(codec, picture)
    decode = jax.jit(lambda codec, z: codec.decode(z, image.shape[:2])).lower(codec, latents).compile()
    programs[name, "ms_encode"] = lambda run=encode, codec=codec: run(codec, picture)
    programs[name, "ms_decode"] = lambda run=decode, codec=codec, z=latents: run(codec, z)
  times = profile.interleaved(programs, repeats)
  return {
    name: {what: 1000 * float(np.median(times[name, what])) for what in ("ms_encode", "ms_decode")} for name in codecs
  }


def crops(
  images: Sequence[Picture], back: Mapping[str, Sequence[np.ndarray]], side: int
) -> tuple[list[str], dict[str, np.ndarray]]:
  """(names of pictures, row -> uint8 [N, side, side, 3]) of the window with most detail, the originals first."""
  side = min([side, *(min(p.image.shape[:2]) for p in images)])
  windows = [_busiest(p.image, side) for p in images]
  rows = {"original": [p.image for p in images]} | back
  cut = {
    name: np.stack([x[top : top + side, left : left + side] for x, (top, left) in zip(row, windows, strict=True)])
    for name, row in rows.items()
  }
  return [p.name for p in images], cut


def _busiest(image: np.ndarray, side: int) -> tuple[int, int]:
  """Upper left corner of the window, on a grid of half windows, whose neighbouring pixels differ most."""
  grey = image.astype(np.float32).mean(-1)
  detail = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
  step = max(1, side // 2)
  corners = [
    (top, left)
    for top in range(0, image.shape[0] - side + 1, step)
    for left in range(0, image.shape[1] - side + 1, step)
  ]
  return max(corners, key=lambda c: float(detail[c[0] : c[0] + side, c[1] : c[1] + side].sum()))
