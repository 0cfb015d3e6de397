"""The training step of diffusers' SD3 transformer (torch), of the shape of one of our backbones, as a call to time.

It is the nearest public relative: joint blocks of two streams, QK-RMSNorm, GELU MLPs of ratio 4, 2x2 patches of 16
channels. Its modulation is a projection in every block, ours one for all; that is 0.2 % of its FLOPs and a third of its
parameters, so that its optimiser has more to do.
"""

import copy
import os
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")


def installed() -> bool:
  """Whether torch and diffusers can be imported."""
  try:
    import diffusers  # noqa: F401
    import torch  # noqa: F401
  except ImportError:
    return False
  return True


def version() -> str:
  import diffusers
  import torch

  return f"torch {torch.__version__}, diffusers {diffusers.__version__}"


def make_step(
  *, width: int, depth: int, head_dim: int, text: tuple[int, int], latent: int, batch: int, dtype: str, remat: bool
) -> tuple[Callable[[], None], Callable[[], int | None]]:
  """One update: flow matching, AdamW with clipping, EMA; as ours.

  Args:
    width, depth, head_dim: of the backbone.
    text: (tokens, features) of the captions.
    latent: side of the square latents.
    batch: images.
    dtype: "float32", or "bfloat16" for autocast over float32 parameters.
    remat: whether blocks are recomputed in the backward pass.

  Returns:
    The update, and the peak of allocated bytes since the last call (None on CPU).
  """
  import torch
  from diffusers import SD3Transformer2DModel

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  model = SD3Transformer2DModel(
    sample_size=latent,
    patch_size=2,
    in_channels=16,
    num_layers=depth,
    attention_head_dim=head_dim,
    num_attention_heads=width // head_dim,
    joint_attention_dim=text[1],
    caption_projection_dim=width,
    pooled_projection_dim=text[1],
    out_channels=16,
    pos_embed_max_size=latent // 2,
    qk_norm="rms_norm",
  ).to(device)
  if remat:
    model.enable_gradient_checkpointing()
  model.train()
  ema = [p.detach().clone() for p in copy.deepcopy(model).parameters()]
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  clean = torch.randn(batch, 16, latent, latent, device=device)
  words = torch.randn(batch, *text, device=device)

  def update() -> None:
    t = torch.sigmoid(torch.randn(batch, device=device))
    noise = torch.randn_like(clean)
    mixed = torch.lerp(clean, noise, t[:, None, None, None])
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
      v = model(mixed, words, words.mean(1), 1000 * t, return_dict=False)[0]
    loss = (v.float() - (noise - clean)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch._foreach_lerp_(ema, list(model.parameters()), 1e-3)
    if device == "cuda":
      torch.cuda.synchronize()

  def peak() -> int | None:
    if device == "cpu":
      return None
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found

  return update, peak
