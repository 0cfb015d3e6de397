"""Torch's attentions as calls to time: dense SDPA, and FlexAttention over the same block lists as ours."""

import os
from collections.abc import Callable

# Threads of OpenMP that spin while they wait would count as work, theirs and that of whoever runs next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np  # noqa: E402


def installed() -> bool:
  """Whether torch can be imported."""
  try:
    import torch  # noqa: F401
  except ImportError:
    return False
  return True


def version() -> str:
  import torch

  return torch.__version__


def inputs(qkv: list[np.ndarray], dtype: str, backward: bool, gpu: bool) -> list:
  """float32 arrays [heads, tokens, D] to tensors [1, heads, tokens, D] of the dtype."""
  import torch

  device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
  tensors = [torch.from_numpy(x.copy())[None].to(device, getattr(torch, dtype)) for x in qkv]
  return [x.requires_grad_(backward) for x in tensors]


def sdpa(qkv: list, backward: bool) -> Callable[[], None]:
  """A call of torch's dense attention."""
  from torch.nn.functional import scaled_dot_product_attention

  return _call(scaled_dot_product_attention, qkv, backward)


def flex(qkv: list, kept: np.ndarray, text_len: int, block_size: int, backward: bool) -> Callable[[], None]:
  """A call of compiled FlexAttention, text in front as further blocks: every list names them, theirs name all.

  Args:
    kept: int [Tb, n], the image blocks that each block of image queries reads.
    text_len: a multiple of block_size.
  """
  import torch
  from torch.nn.attention.flex_attention import BlockMask, flex_attention

  text, blocks = text_len // block_size, len(kept)
  total = text + blocks
  lists = np.zeros((total, total), np.int32)
  lists[:text] = np.arange(total)
  lists[text:, :text] = np.arange(text)
  lists[text:, text : text + kept.shape[1]] = kept + text
  counts = np.array([total] * text + [text + kept.shape[1]] * blocks, np.int32)
  counts, lists = (torch.from_numpy(x)[None, None].to(qkv[0].device) for x in (counts, lists))
  # Given as partial blocks without a mask: the code that torch 2.13 makes for full ones on CPU does not compile.
  mask = BlockMask.from_kv_blocks(counts, lists, BLOCK_SIZE=block_size)
  compiled = torch.compile(flex_attention)
  return _call(lambda q, k, v: compiled(q, k, v, block_mask=mask), qkv, backward)


def _call(attend, qkv: list, backward: bool) -> Callable[[], None]:
  import torch

  def run() -> None:
    with torch.set_grad_enabled(backward):
      out = attend(*qkv)
      if backward:
        torch.autograd.grad(out.float().square().sum(), qkv)
    if out.is_cuda:
      torch.cuda.synchronize()

  return run
