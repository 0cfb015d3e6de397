"""Scores of how well pictures fit their prompts and please people, from CLIP models whose weights the user has.

  clip_score   cosine of picture and prompt (Hessel et al. 2021, arXiv 2104.08718, without its factor 2.5)
  pick_score   exp(logit_scale) cosine / 26 (Kirstain et al. 2023, arXiv 2305.01569; / 26 as in Flow-GRPO)
  hps_v2       cosine (Wu et al. 2023, arXiv 2306.09341; v2.0 and v2.1 differ in the weights); tables show it x 100

  score = preference.load("pick_score", directory)
  score(images, prompts)                                  # {"pick_score": float32 [B]}

CLIPScore and PickScore cut the middle square out of a picture, HPSv2 pads it to a square.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from elasticdit_jax.interop import clip_tokenizer, clip_weights
from elasticdit_jax.models import clip

KINDS = ("clip_score", "pick_score", "hps_v2")
_MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])
_STD = np.float32([0.26862954, 0.26130258, 0.27577711])
_PICK_SCALE = 26.0


def crop(image: np.ndarray, size: int) -> np.ndarray:
  """Preprocessing of CLIP: shorter side to `size` (bicubic), middle square.

  Args:
    image: uint8 [H, W, 3].
    size: S.

  Returns:
    float32 [S, S, 3] in [0, 1].
  """
  height, width = image.shape[:2]
  short = min(height, width)
  new = size * width // short, size * height // short
  resized = np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BICUBIC))
  top, left = (new[1] - size) // 2, (new[0] - size) // 2
  return resized[top : top + size, left : left + size].astype(np.float32) / 255


def pad(image: np.ndarray, size: int) -> np.ndarray:
  """Preprocessing of HPSv2: longer side to `size` (bicubic with antialiasing, not rounded), black around it.

  Arguments and result as of `crop`; values may leave [0, 1] by what bicubic interpolation overshoots.
  """
  height, width = image.shape[:2]
  scale = size / max(height, width)
  rows, columns = round(height * scale), round(width * scale)
  out = np.zeros((size, size, 3), np.float32)
  top, left = (size - rows) // 2, (size - columns) // 2
  for channel in range(3):
    plane = Image.fromarray(image[..., channel].astype(np.float32) / 255)
    resized = np.asarray(plane.resize((columns, rows), Image.Resampling.BICUBIC))
    out[top : top + rows, left : left + columns, channel] = resized
  return out


@functools.partial(jax.jit, static_argnames=("cfg", "method"))
def _embed(params: Any, inputs: jax.Array, *, cfg: clip.CLIPConfig, method: str) -> jax.Array:
  # Accelerators would multiply in bfloat16 or TF32, an error as large as the differences between pictures of a prompt.
  with jax.default_matmul_precision("float32"):
    return clip.CLIP(cfg).apply({"params": params}, inputs, method=method)


class Preference:
  """One model as a source of scores, see train.rewards."""

  def __init__(
    self, kind: str, cfg: clip.CLIPConfig, params: Any, tokenize: clip_tokenizer.Tokenize, batch_size: int = 16
  ):
    """Takes loaded parts; `load` reads them.

    Args:
      kind: one of KINDS.
      cfg, params: of models.clip.CLIP.
      tokenize: texts to ids int32 [B, L].
      batch_size: pictures, and texts, that one program embeds; smaller numbers are padded to it.

    Raises:
      ValueError: for an unknown kind or a batch size below 1.
    """
    _check_kind(kind)
    if batch_size < 1:
      raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    self.kind, self.cfg, self._params, self._tokenize, self._batch_size = kind, cfg, params, tokenize, batch_size
    self._scale = {"pick_score": float(np.exp(params["logit_scale"])) / _PICK_SCALE}.get(kind, 1.0)

  def __call__(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
  ) -> dict[str, np.ndarray]:
    """Scores of B pictures.

    Args:
      images: uint8 [B, H, W, 3].
      prompts: B; equal ones are embedded once.
      metadata: not read.

    Returns:
      {kind: float32 [B]}.
    """
    del metadata
    if not len(images):
      return {self.kind: np.zeros(0, np.float32)}
    fit = pad if self.kind == "hps_v2" else crop
    pixels = np.stack([(fit(image, self.cfg.size) - _MEAN) / _STD for image in np.asarray(images)])
    different = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    pictures = self._in_batches(pixels, "embed_images")
    texts = self._in_batches(self._tokenize(list(different)), "embed_texts")
    cosine = np.sum(pictures * texts[[different[prompt] for prompt in prompts]], axis=1)
    return {self.kind: np.float32(self._scale) * cosine}

  def _in_batches(self, inputs: np.ndarray, method: str) -> np.ndarray:
    parts = []
    for start in range(0, len(inputs), self._batch_size):
      part = inputs[start : start + self._batch_size]
      filled = np.concatenate([part, np.repeat(part[:1], self._batch_size - len(part), axis=0)])
      embedded = _embed(self._params, jnp.asarray(filled), cfg=self.cfg, method=method)
      parts.append(np.asarray(embedded, np.float32)[: len(part)])
    return np.concatenate(parts)


def _check_kind(kind: str) -> None:
  if kind not in KINDS:
    raise ValueError(f"preference: unknown score {kind!r}; there are {', '.join(KINDS)}")


def directories(text: str, field: str) -> dict[str, str]:
  """ "pick_score=DIR,hps_v2=DIR" as {kind: directory}; "" is none.

  Raises:
    ValueError: naming the config field: an unknown kind, one that is given twice, or a directory that is not there.
  """
  found: dict[str, str] = {}
  for item in filter(None, (item.strip() for item in text.split(","))):
    kind, _, path = (part.strip() for part in item.partition("="))
    if kind not in KINDS or kind in found:
      raise ValueError(f"{field}: expected {'=DIRECTORY, '.join(KINDS)}=DIRECTORY, each at most once, got {item!r}")
    if not os.path.isdir(path):
      raise ValueError(f"{field}: {kind}: no directory {path!r}; give the one that holds its weights")
    found[kind] = path
  return found


def load(kind: str, directory: str | os.PathLike, batch_size: int = 16) -> Callable[..., dict[str, np.ndarray]]:
  """Reads a model.

  Args:
    kind: one of KINDS.
    directory: config.json, safetensors and tokenizer files; see interop.clip_weights.
    batch_size: see Preference.

  Raises:
    ValueError: in one line: an unknown kind, or files that are missing or do not fit.
  """
  _check_kind(kind)
  if not os.path.isdir(directory):
    raise ValueError(f"{kind}: no directory {os.fspath(directory)}; give the one that holds its weights")
  tokenize = clip_tokenizer.load(directory, clip_weights.read_config(directory).length)
  cfg, params = clip_weights.load(directory)
  return Preference(kind, cfg, params, tokenize, batch_size)
