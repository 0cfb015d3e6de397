"""ElasticDiT: a joint text-image diffusion transformer whose depth, sparsity and latent grid are one static Route.

Blocks carry explicit names (block_00 ...): a skipped block must not shift the names, and so the weights, of those
behind it. A skipped block is left out of the traced program; parameters never depend on the route.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from elasticdit_jax.elastic import VAE_FACTORS, Route
from elasticdit_jax.models import rope
from elasticdit_jax.models.attention import JointAttention, Sparsity
from elasticdit_jax.models.layers import ACTIVATIONS, MLP, modulate, patchify, timestep_features, unpatchify
from elasticdit_jax.ops import placement
from elasticdit_jax.types import Text

STREAMS = ("image", "text")
TEXT_POOLS = ("mean", "flatten")
# Those of jax.checkpoint_policies that are policies; the others there make policies and would silently save everything.
REMAT = (
  "none",
  "full",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
  "everything_saveable",
  "nothing_saveable",
)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Shape of the backbone. The paper gives no sizes; `SIZES` are this project's.

  Attributes:
    width, depth, head_dim: channels, blocks, channels per head; width is a multiple of head_dim.
    mlp_ratio, activation: hidden width of the MLPs over width; "gelu", "silu" or "relu2".
    patch: latent cells along one side of a token; 2 in the paper.
    latent_channels: 16 in the paper, for f8 and f16 alike.
    text_dim, text_length: features and number of the text tokens.
    text_pool: how the tokens join the timestep embedding: "mean" over present tokens, or "flatten" (order-aware,
      for short captions only, its size grows with text_length).
    block_side: tokens along one side of a sparse block: 8 in the paper; 2 where an image has an 8x8 token grid.
    per_head: sparse layers select key blocks for every head; the paper's one list serves all heads.
    force_self: in sparse layers, every block of queries keeps its own keys, within what it keeps.
    sparse_text: in sparse layers, text queries read as many image blocks as others; in the paper's listing, all.
    rope_theta: base of the rotary frequencies, in units of 16 pixels.
    remat: "none", "full", or the name of a jax.checkpoint_policies policy (see REMAT), applied to every block.
    dtype: compute dtype of the blocks; parameters are always float32.
    batch_axes, head_axes: where a program is split over devices, the names of the axes that samples and heads are split
      over (see ops.sparse_attention); None on one device. They change where numbers are computed, not which.
  """

  width: int
  depth: int
  head_dim: int
  mlp_ratio: float = 4.0
  activation: str = "gelu"
  patch: int = 2
  latent_channels: int = 16
  text_dim: int = 2048
  text_length: int = 128
  text_pool: str = "mean"
  block_side: int = 8
  per_head: bool = False
  force_self: bool = False
  sparse_text: bool = False
  rope_theta: float = 1000.0
  remat: str = "none"
  dtype: str = "float32"
  batch_axes: tuple[str, ...] | None = None
  head_axes: tuple[str, ...] | None = None

  def __post_init__(self):
    for field in ("width", "depth", "head_dim", "patch", "latent_channels", "text_dim", "text_length", "block_side"):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"DiTConfig.{field}: expected a positive int, got {value!r}")
    for field in ("per_head", "force_self", "sparse_text"):
      if not isinstance(getattr(self, field), bool):
        raise ValueError(f"DiTConfig.{field}: expected a bool, got {getattr(self, field)!r}")
    for field in ("mlp_ratio", "rope_theta"):
      if not getattr(self, field) > 0:
        raise ValueError(f"DiTConfig.{field}: expected a positive number, got {getattr(self, field)!r}")
    if self.width % self.head_dim or self.head_dim % 4:
      raise ValueError(
        f"DiTConfig.width: expected a multiple of head_dim, and head_dim of 4, got width={self.width} and"
        f" head_dim={self.head_dim}"
      )
    if self.depth < 2:
      raise ValueError(
        f"DiTConfig.depth: expected at least 2 (the first and last block are protected), got {self.depth}"
      )
    for field, known in (
      ("activation", tuple(ACTIVATIONS)),
      ("text_pool", TEXT_POOLS),
      ("dtype", ("float32", "bfloat16")),
      ("remat", REMAT),
    ):
      if getattr(self, field) not in known:
        raise ValueError(f"DiTConfig.{field}: expected one of {', '.join(known)}, got {getattr(self, field)!r}")


SIZES = {
  "tiny": DiTConfig(
    96, 8, 32, 2.5, "relu2", text_dim=64, text_length=8, text_pool="flatten", block_side=2, rope_theta=100.0
  ),
  "S": DiTConfig(512, 16, 64),
  "B": DiTConfig(768, 24, 64),
  "L": DiTConfig(1024, 30, 128),
}


def _zeros_dense(features: int, name: str) -> nn.Dense:
  return nn.Dense(features, kernel_init=nn.initializers.zeros, name=name)


class Block(nn.Module):
  """One joint block: attention over both streams, then an MLP per stream, all gated by adaLN-single.

  Attributes:
    cfg: the backbone.
    text_output: False in the last block, whose text output nobody reads; it then has no parameters for it.
  """

  cfg: DiTConfig
  text_output: bool

  @nn.compact
  def __call__(self, image, text, text_mask, modulation, table, sparsity: Sparsity, kept=None):
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    # adaLN-single (PixArt-alpha, arXiv 2310.00426): one projection for all blocks, a learned offset for each.
    offset = self.param("modulation", nn.initializers.zeros, (len(STREAMS), 6, cfg.width))
    mod = (modulation + offset)[:, :, :, None].astype(dtype)
    image_mod, text_mod = (jnp.moveaxis(mod[:, i], 1, 0) for i in range(len(STREAMS)))
    places = (cfg.batch_axes, cfg.head_axes)
    attended = JointAttention(cfg.head_dim, dtype, self.text_output, *places, name="attention")(
      modulate(image, *image_mod[:2]), modulate(text, *text_mod[:2]), text_mask, table, sparsity, kept
    )
    image = self._update("image", image, attended[0], image_mod)
    if self.text_output:
      text = self._update("text", text, attended[1], text_mod)
    return image, text

  def _update(self, stream: str, x: jax.Array, attended: jax.Array, mod: jax.Array) -> jax.Array:
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    x = x + mod[2] * nn.Dense(cfg.width, dtype=dtype, name=f"{stream}_out")(attended)
    mlp = MLP(cfg.mlp_ratio, cfg.activation, dtype, name=f"{stream}_mlp")
    return x + mod[5] * mlp(modulate(x, mod[3], mod[4]))


class Conditioning(nn.Module):
  """Timestep, VAE factor and pooled text (zero where absent) to one vector [B, width]."""

  cfg: DiTConfig

  @nn.compact
  def __call__(self, t: jax.Array, text: jax.Array, text_mask: jax.Array, vae: int) -> jax.Array:
    width = self.cfg.width
    time = nn.Dense(width, name="time_in")(timestep_features(t))
    time = nn.Dense(width, name="time_out")(nn.silu(time))
    if self.cfg.text_pool == "flatten":
      missing = self.cfg.text_length - text.shape[1]
      pooled = jnp.pad(text, ((0, 0), (0, missing), (0, 0))).reshape(text.shape[0], -1)
    else:
      pooled = text.sum(1) / jnp.maximum(text_mask.sum(1, keepdims=True), 1)
    pooled = nn.Dense(width, name="text_out")(nn.silu(nn.Dense(width, name="text_in")(pooled)))
    factor = nn.Embed(len(VAE_FACTORS), width, embedding_init=nn.initializers.normal(0.02), name="vae_factor")
    return nn.silu(time + pooled + factor(jnp.asarray(VAE_FACTORS.index(vae))))


class ElasticDiT(nn.Module):
  """velocity = ElasticDiT(cfg).apply({"params": p}, x, t, text, text_mask, route=route).

  Shapes: x [B, h, w, C] latents; t [B] in [0, 1]; text [B, L, D]; text_mask bool [B, L]; velocity float32 like x.
  The route is static: pass it through `static_argnames` under jit.

  For importance analysis only, at the cost of the full dense route and from a single program: `bypass` (bool [depth],
  traced) replaces blocks by the identity, the numbers of a route without them; `kept` (int [depth], traced) gives the
  key blocks that each block keeps, the numbers of a route of that sparsity.
  """

  cfg: DiTConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    *,
    route: Route,
    bypass: jax.Array | None = None,
    kept: jax.Array | None = None,
  ) -> jax.Array:
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    self._check(x, Text(text, text_mask), route)
    self._check_per_block(bypass=bypass, kept=kept)
    grid = (x.shape[1] // cfg.patch, x.shape[2] // cfg.patch)
    centres = rope.token_centres(grid, route.vae * cfg.patch)
    table = rope.rotary_table(centres, cfg.head_dim, cfg.rope_theta)

    # where, not a product: whatever stands in an absent token must not leak, not even a NaN.
    text = jnp.where(text_mask[..., None], text, 0)
    c = Conditioning(cfg, name="conditioning")(t, text, text_mask, route.vae)
    image = nn.Dense(cfg.width, name="image_in")(patchify(x, cfg.patch))
    image = image + nn.Dense(cfg.width, use_bias=False, name="position")(rope.position_features(centres))
    # Of the size of the words: with smaller places, order is learned late.
    place = self.param("text_position", nn.initializers.normal(0.5), (cfg.text_length, cfg.width))
    words = nn.Dense(cfg.width, name="text_in")(text) + place[: text.shape[1]]
    modulation = _zeros_dense(len(STREAMS) * 6 * cfg.width, "modulation")(c).reshape(-1, len(STREAMS), 6, cfg.width)

    image, words = image.astype(dtype), words.astype(dtype)
    # Parameters never depend on the route, not even on the one a model is initialised with.
    for i in range(cfg.depth) if self.is_initializing() else route.active:
      sparsity = Sparsity(route.sparsity[i], grid, cfg.block_side, i, cfg.per_head, cfg.force_self, cfg.sparse_text)
      block = self._block_class()(cfg, text_output=i < cfg.depth - 1, name=f"block_{i:02d}")
      outputs = block(
        image, words, text_mask, modulation, table, sparsity, None if kept is None else jnp.asarray(kept)[i]
      )
      if bypass is not None:
        outputs = (jnp.where(bypass[i], image, outputs[0]), jnp.where(bypass[i], words, outputs[1]))
      # Said at every block: else a compiler may split channels, as weights are, and send activations around.
      image, words = (placement.split(x, cfg.batch_axes) for x in outputs)

    shift, scale = jnp.split(_zeros_dense(2 * cfg.width, "final_modulation")(c)[:, None], 2, -1)
    tokens = _zeros_dense(cfg.patch**2 * cfg.latent_channels, "image_out")(
      modulate(image.astype(jnp.float32), shift, scale)
    )
    v = unpatchify(tokens, grid, cfg.patch)
    # Zero-initialised, on the raster: smooths over token borders without disturbing a model it is added to (2.1.2).
    refine = nn.Conv(cfg.latent_channels, (3, 3), kernel_init=nn.initializers.zeros, name="refine")
    return v + refine(v)

  def _block_class(self):
    if self.cfg.remat == "none":
      return Block
    policy = None if self.cfg.remat == "full" else getattr(jax.checkpoint_policies, self.cfg.remat)
    # Sparsity is static; argument 0 is the module itself.
    return nn.remat(Block, policy=policy, static_argnums=(6,))

  def _check_per_block(self, **arrays: jax.Array | None) -> None:
    for name, array in arrays.items():
      if array is not None and jnp.shape(array) != (self.cfg.depth,):
        raise ValueError(
          f"{name}: expected one value for each of the {self.cfg.depth} blocks, got shape {jnp.shape(array)}"
        )

  def _check(self, x: jax.Array, text: Text, route: Route) -> None:
    cfg = self.cfg
    if route.depth != cfg.depth:
      raise ValueError(f"route {route.name!r} is for {route.depth} blocks, this model has {cfg.depth}")
    if x.ndim != 4 or x.shape[-1] != cfg.latent_channels:
      raise ValueError(f"x: expected latents [B, h, w, {cfg.latent_channels}], got shape {x.shape}")
    if x.shape[1] % cfg.patch or x.shape[2] % cfg.patch:
      need = route.vae * cfg.patch
      height, width = (n * route.vae for n in x.shape[1:3])
      nearest = "x".join(str(max(need, round(n / need) * need)) for n in (height, width))
      raise ValueError(
        f"resolution {height}x{width}: route {route.name!r} needs multiples of {need} pixels; the nearest is {nearest}"
      )
    text.validate()
    if text.embedding.shape[1] > cfg.text_length or text.embedding.shape[2] != cfg.text_dim:
      raise ValueError(
        f"text: expected at most {cfg.text_length} tokens of {cfg.text_dim} features, got {text.embedding.shape[1:]}"
      )


def count_parameters(params, route: Route | None = None) -> int:
  """Number of parameters in a tree (arrays or shapes), or of those that `route` reads."""
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  owned = (leaf for path, leaf in flat if route is None or route.owns(str(k.key) for k in path))
  return sum(leaf.size for leaf in owned)


def init_shapes(cfg: DiTConfig) -> dict:
  """Parameter tree of jax.ShapeDtypeStruct, without allocating anything."""
  route = Route("max-f8", (True,) * cfg.depth, (0.0,) * cfg.depth, 8)
  side = 4 * cfg.patch
  x = jax.ShapeDtypeStruct((1, side, side, cfg.latent_channels), jnp.float32)
  text = jax.ShapeDtypeStruct((1, cfg.text_length, cfg.text_dim), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, cfg.text_length), jnp.bool_)
  t = jax.ShapeDtypeStruct((1,), jnp.float32)

  def init(x, t, text, mask):
    return ElasticDiT(cfg).init(jax.random.key(0), x, t, text, mask, route=route)["params"]

  return jax.eval_shape(init, x, t, text, mask)


def init(cfg: DiTConfig, key: jax.Array) -> dict:
  """Random parameters, float32. Zero-initialised where the design says so; the first velocity is exactly 0."""
  route = Route("max-f8", (True,) * cfg.depth, (0.0,) * cfg.depth, 8)
  x = jnp.zeros((1, 4 * cfg.patch, 4 * cfg.patch, cfg.latent_channels))
  text = jnp.zeros((1, cfg.text_length, cfg.text_dim))
  mask = jnp.ones((1, cfg.text_length), bool)
  return jax.jit(lambda k: ElasticDiT(cfg).init(k, x, jnp.zeros(1), text, mask, route=route)["params"])(key)
