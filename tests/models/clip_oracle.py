"""CLIP in plain numpy, float64, from tensors under the names of transformers: an oracle that shares no code with ours.

Checked against transformers where that is installed (tests/interop/clip_weights_test.py).
"""

import numpy as np
from scipy import special

TEXT = {
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 24,
  "vocab_size": 40,
  "max_position_embeddings": 7,
  "eos_token_id": 39,
  "hidden_act": "quick_gelu",
}
VISION = {
  "hidden_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
  "intermediate_size": 20,
  "image_size": 12,
  "patch_size": 4,
  "hidden_act": "gelu",
}
CONFIG = {"model_type": "clip", "projection_dim": 8, "text_config": TEXT, "vision_config": VISION}


def tensors(seed=0):
  """Random tensors of CONFIG under the names of transformers."""
  rng = np.random.default_rng(seed)
  shapes = {
    "logit_scale": (),
    "text_model.embeddings.token_embedding.weight": (40, 16),
    "text_model.embeddings.position_embedding.weight": (7, 16),
    "vision_model.embeddings.class_embedding": (24,),
    "vision_model.embeddings.patch_embedding.weight": (24, 3, 4, 4),
    "vision_model.embeddings.position_embedding.weight": (10, 24),
    "text_projection.weight": (8, 16),
    "visual_projection.weight": (8, 24),
  }
  norms = {"text_model.final_layer_norm": 16, "vision_model.pre_layrnorm": 24, "vision_model.post_layernorm": 24}
  for tower, part in (("text_model", TEXT), ("vision_model", VISION)):
    width, hidden = part["hidden_size"], part["intermediate_size"]
    for i in range(part["num_hidden_layers"]):
      layer = f"{tower}.encoder.layers.{i}"
      norms |= {f"{layer}.layer_norm1": width, f"{layer}.layer_norm2": width}
      shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in ("q", "k", "v", "out")}
      shapes |= {f"{layer}.self_attn.{name}_proj.bias": (width,) for name in ("q", "k", "v", "out")}
      shapes |= {f"{layer}.mlp.fc1.weight": (hidden, width), f"{layer}.mlp.fc1.bias": (hidden,)}
      shapes |= {f"{layer}.mlp.fc2.weight": (width, hidden), f"{layer}.mlp.fc2.bias": (width,)}
  for name, width in norms.items():
    shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
  return {name: np.asarray(rng.normal(0, 0.4, shape), np.float32) for name, shape in shapes.items()}


def _norm(x, t, name):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * t[f"{name}.weight"] + t[f"{name}.bias"]


def _dense(x, t, name):
  return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)


def _activation(x, name):
  return x * special.expit(1.702 * x) if name == "quick_gelu" else x * special.ndtr(x)


def _transformer(x, t, tower, part, causal):
  heads = part["num_attention_heads"]
  for i in range(part["num_hidden_layers"]):
    layer = f"{tower}.encoder.layers.{i}"
    y = _norm(x, t, f"{layer}.layer_norm1")
    q, k, v = (_dense(y, t, f"{layer}.self_attn.{n}_proj").reshape(*y.shape[:2], heads, -1) for n in "qkv")
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if causal:
      logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    mixed = np.einsum("bhqk,bkhd->bqhd", special.softmax(logits, -1), v).reshape(x.shape)
    x = x + _dense(mixed, t, f"{layer}.self_attn.out_proj")
    y = _activation(_dense(_norm(x, t, f"{layer}.layer_norm2"), t, f"{layer}.mlp.fc1"), part["hidden_act"])
    x = x + _dense(y, t, f"{layer}.mlp.fc2")
  return x


def embed_texts(t, ids, end=39):
  """ids [B, L] -> unit vectors [B, 8]; end None takes the largest id of a row."""
  x = np.float64(t["text_model.embeddings.token_embedding.weight"])[ids]
  x = x + t["text_model.embeddings.position_embedding.weight"][: ids.shape[1]]
  x = _norm(_transformer(x, t, "text_model", TEXT, True), t, "text_model.final_layer_norm")
  place = [list(row).index(max(row) if end is None else end) for row in ids]
  return _unit(_dense(x[np.arange(len(ids)), place], t, "text_projection"))


def embed_images(t, pixels):
  """pixels [B, 12, 12, 3] -> unit vectors [B, 8]."""
  size, kernel = VISION["patch_size"], np.float64(t["vision_model.embeddings.patch_embedding.weight"])
  rows = []
  for y in range(0, pixels.shape[1], size):
    for x in range(0, pixels.shape[2], size):
      rows.append(np.einsum("bhwc,ochw->bo", pixels[:, y : y + size, x : x + size], kernel))
  first = np.broadcast_to(t["vision_model.embeddings.class_embedding"], rows[0].shape)
  x = np.stack([first, *rows], axis=1) + t["vision_model.embeddings.position_embedding.weight"]
  x = _transformer(_norm(x, t, "vision_model.pre_layrnorm"), t, "vision_model", VISION, False)
  return _unit(_dense(_norm(x[:, 0], t, "vision_model.post_layernorm"), t, "visual_projection"))


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def open_clip_names(t):
  """The same tensors as open_clip stores them: q, k, v joint, projections transposed."""
  renamed = {"logit_scale": t["logit_scale"], "attn_mask": np.zeros((7, 7), np.float32)}
  fixed = {
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
  }
  renamed |= {theirs: t[name] for name, theirs in fixed.items()}
  renamed |= {"visual.proj": t["visual_projection.weight"].T, "text_projection": t["text_projection.weight"].T}
  for kind in ("weight", "bias"):
    for name, theirs in (
      ("text_model.final_layer_norm", "ln_final"),
      ("vision_model.pre_layrnorm", "visual.ln_pre"),
      ("vision_model.post_layernorm", "visual.ln_post"),
    ):
      renamed[f"{theirs}.{kind}"] = t[f"{name}.{kind}"]
    for tower, prefix, part in (("text_model", "", TEXT), ("vision_model", "visual.", VISION)):
      for i in range(part["num_hidden_layers"]):
        layer, block = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
        joint = [t[f"{layer}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
        renamed[f"{block}.attn.in_proj_{kind}"] = np.concatenate(joint)
        renamed[f"{block}.attn.out_proj.{kind}"] = t[f"{layer}.self_attn.out_proj.{kind}"]
        renamed |= {f"{block}.ln_{n}.{kind}": t[f"{layer}.layer_norm{n}.{kind}"] for n in (1, 2)}
        renamed[f"{block}.mlp.c_fc.{kind}"] = t[f"{layer}.mlp.fc1.{kind}"]
        renamed[f"{block}.mlp.c_proj.{kind}"] = t[f"{layer}.mlp.fc2.{kind}"]
  return {name: np.array(tensor, order="C") for name, tensor in renamed.items()}
