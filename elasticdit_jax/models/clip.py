"""CLIP (Radford et al. 2021, arXiv 2103.00020): a text and a picture tower that end in one space.

  ids [B, L]           -> tokens, positions -> causal transformer -> norm -> row of the end token -> projection
  pixels [B, S, S, 3]  -> patches, class token, positions -> norm -> transformer -> class token -> norm -> projection

Both transformers are pre-norm with biases everywhere. Weights come from interop.clip_weights.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS = {
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu": lambda x: nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class TowerConfig:
  """One transformer.

  Attributes:
    width, layers, heads: of the transformer.
    hidden: width of its MLPs.
    activation: one of ACTIVATIONS.
    eps: of the layer norms.
  """

  width: int
  layers: int
  heads: int
  hidden: int
  activation: str = "quick_gelu"
  eps: float = 1e-5

  def __post_init__(self):
    for field in ("width", "layers", "heads", "hidden"):
      value = getattr(self, field)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f"TowerConfig.{field}: expected a positive int, got {value!r}")
    if self.width % self.heads:
      raise ValueError(f"TowerConfig.heads: expected a divisor of the width {self.width}, got {self.heads}")
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"TowerConfig.activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Both towers.

  Attributes:
    text, vision: the transformers.
    vocabulary: number of token ids.
    length: L, tokens of a text, the start and the end token included.
    end: id of the end token; None takes the largest id of the row, which it is in the original vocabulary.
    size: S, side of the pictures in pixels.
    patch: side of a patch in pixels.
    projection: width of the common space.
  """

  text: TowerConfig
  vision: TowerConfig
  vocabulary: int = 49408
  length: int = 77
  end: int | None = None
  size: int = 224
  patch: int = 32
  projection: int = 512

  def __post_init__(self):
    for field in ("vocabulary", "length", "size", "patch", "projection"):
      value = getattr(self, field)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f"CLIPConfig.{field}: expected a positive int, got {value!r}")
    if self.size % self.patch:
      raise ValueError(f"CLIPConfig.patch: expected a divisor of the size {self.size}, got {self.patch}")


class Block(nn.Module):
  """Attention and MLP of one layer."""

  cfg: TowerConfig
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.cfg
    batch, tokens, _ = x.shape
    y = _norm(cfg, "norm1")(x)
    q, k, v = (nn.Dense(cfg.width, name=n)(y).reshape(batch, tokens, cfg.heads, -1) for n in ("q", "k", "v"))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(batch, tokens, cfg.width)
    x = x + nn.Dense(cfg.width, name="out")(y)
    y = nn.Dense(cfg.hidden, name="up")(_norm(cfg, "norm2")(x))
    return x + nn.Dense(cfg.width, name="down")(ACTIVATIONS[cfg.activation](y))


def _norm(cfg: TowerConfig, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=cfg.eps, use_fast_variance=False, name=name)


class TextTower(nn.Module):
  """Token ids to the common space."""

  cfg: CLIPConfig

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """ids int32 [B, L] -> float32 [B, projection]; what stands behind the end token does not matter."""
    cfg, tower = self.cfg, self.cfg.text
    positions = self.param("positions", nn.initializers.normal(0.01), (cfg.length, tower.width))
    x = nn.Embed(cfg.vocabulary, tower.width, name="tokens")(ids) + positions[: ids.shape[1]]
    for i in range(tower.layers):
      x = Block(tower, True, name=f"block_{i:02d}")(x)
    x = _norm(tower, "norm")(x)
    end = jnp.argmax(ids if cfg.end is None else ids == cfg.end, axis=1)
    x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    return nn.Dense(cfg.projection, use_bias=False, name="projection")(x)


class VisionTower(nn.Module):
  """Pictures to the common space."""

  cfg: CLIPConfig

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """pixels float32 [B, S, S, 3], normalised -> float32 [B, projection]."""
    cfg, tower = self.cfg, self.cfg.vision
    side = (cfg.patch, cfg.patch)
    patches = nn.Conv(tower.width, side, side, padding="VALID", use_bias=False, name="patches")(pixels)
    patches = patches.reshape(pixels.shape[0], -1, tower.width)
    first = self.param("class", nn.initializers.normal(0.01), (tower.width,))
    first = jnp.broadcast_to(first, (pixels.shape[0], 1, tower.width))
    x = jnp.concatenate([first, patches], axis=1)
    x = x + self.param("positions", nn.initializers.normal(0.01), x.shape[1:])
    x = _norm(tower, "norm_before")(x)
    for i in range(tower.layers):
      x = Block(tower, False, name=f"block_{i:02d}")(x)
    x = _norm(tower, "norm")(x[:, 0])
    return nn.Dense(cfg.projection, use_bias=False, name="projection")(x)


class CLIP(nn.Module):
  """Both towers and the learned temperature."""

  cfg: CLIPConfig

  def setup(self) -> None:
    self.text = TextTower(self.cfg)
    self.vision = VisionTower(self.cfg)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

  def __call__(self, pixels: jax.Array, ids: jax.Array) -> jax.Array:
    """Logits [B, C] of B pictures and C texts: exp(logit_scale) times the cosine."""
    return jnp.exp(self.logit_scale) * self.embed_images(pixels) @ self.embed_texts(ids).T

  def embed_images(self, pixels: jax.Array) -> jax.Array:
    """pixels float32 [B, S, S, 3], normalised -> unit vectors [B, projection]."""
    return _unit(self.vision(pixels))

  def embed_texts(self, ids: jax.Array) -> jax.Array:
    """ids int32 [B, L] -> unit vectors [B, projection]."""
    return _unit(self.text(ids))


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def init_shapes(cfg: CLIPConfig) -> dict:
  """The parameter tree as ShapeDtypeStructs; computes nothing."""
  pixels = jax.ShapeDtypeStruct((1, cfg.size, cfg.size, 3), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, cfg.length), jnp.int32)
  return jax.eval_shape(CLIP(cfg).init, jax.random.key(0), pixels, ids)["params"]
