"""Optimisers: what they move, what they leave alone, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from elasticdit_jax.train import optim


def _config(**changes):
  config = {
    "name": "adamw",
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "decay_fraction": 0.0,
    "weight_decay": 0.1,
    "b1": 0.9,
    "b2": 0.99,
    "clip_norm": 1.0,
  }
  return config | changes


def _params(seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  def block():
    return {
      "attention": {"kernel": normal(8, 12), "bias": normal(12)},
      "mlp": {"up": {"kernel": normal(8, 16)}, "down": {"kernel": normal(16, 8)}},
      "modulation": normal(6, 8),
      "conv": {"kernel": normal(3, 3, 2, 2)},
      "norm": {"scale": normal(8)},
    }

  return {
    "embed": {"kernel": normal(4, 8)},
    "block_00": block(),
    "block_01": block(),
    "norm": {"scale": normal(8)},
    "out": {"kernel": normal(8, 4)},
  }


def _grads(params, step):
  rng = np.random.default_rng(step)
  return jax.tree.map(lambda p: np.asarray(p) + rng.normal(size=p.shape).astype(np.float32), params)


def _bits(tree):
  return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


class OptimTest(parameterized.TestCase):
  @parameterized.product(name=["adamw", "muon"], static=[True, False])
  def test_frozen_leaves_and_their_state_stay_bit_equal(self, name, static):
    params = _params()
    tx = optim.make(_config(name=name), params, 1e-2)
    state = tx.init(params)
    joint = jax.jit(lambda g, s, p: optim.frozen_update(tx, g, s, p, jax.tree.map(lambda _: False, p)))
    for step in range(3):  # joint steps leave momentum behind, which would go on moving the block
      params, state = joint(_grads(params, step), state, params)
    frozen = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "block_01", params)
    if not static:
      frozen = jax.tree.map(jnp.asarray, frozen)
    before_params, before_state = params, state
    update = jax.jit(lambda g, s, p: optim.frozen_update(tx, g, s, p, frozen))
    for step in range(5):
      params, state = update(_grads(params, 10 + step), state, params)
    self.assertEqual(_bits(params["block_01"]), _bits(before_params["block_01"]))
    after_state = dict(jax.tree_util.tree_flatten_with_path(state)[0])
    owned = [(p, old) for p, old in jax.tree_util.tree_flatten_with_path(before_state)[0] if "block_01" in str(p)]
    self.assertGreaterEqual(len(owned), len(jax.tree.leaves(params["block_01"])))
    for path, old in owned:
      self.assertEqual(np.asarray(after_state[path]).tobytes(), np.asarray(old).tobytes(), path)
    for key in set(params) - {"block_01"}:
      for old, new in zip(jax.tree.leaves(before_params[key]), jax.tree.leaves(params[key]), strict=True):
        self.assertFalse(np.any(np.asarray(old) == np.asarray(new)), key)

  @parameterized.parameters("adamw", "muon")
  def test_zero_gradients_alone_do_not_freeze(self, name):
    params = _params()
    tx = optim.make(_config(name=name), params, 1e-2)
    _, state = optim.frozen_update(
      tx, _grads(params, 0), tx.init(params), params, jax.tree.map(lambda _: False, params)
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved, _ = optim.frozen_update(tx, zeros, state, params, jax.tree.map(lambda _: False, params))
    self.assertNotEqual(_bits(moved["block_01"]), _bits(params["block_01"]))

  def test_the_clipping_norm_ignores_frozen_leaves(self):
    params = {"block_00": {"kernel": jnp.ones((2, 2))}, "block_01": {"kernel": jnp.ones((2, 2))}}
    grads = {"block_00": {"kernel": jnp.full((2, 2), 0.1)}, "block_01": {"kernel": jnp.full((2, 2), 1e6)}}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    frozen = {"block_00": {"kernel": False}, "block_01": {"kernel": True}}
    new, _ = optim.frozen_update(tx, grads, tx.init(params), params, frozen)
    np.testing.assert_allclose(new["block_00"]["kernel"], 0.9, rtol=1e-6)

  def test_a_parameter_name_that_ends_like_another_is_not_confused(self):
    params = {"scale": jnp.ones(2), "norm": {"scale": jnp.ones(2)}}
    tx = optim.make(_config(), params, 1e-2)
    state = tx.init(params)
    frozen = {"scale": False, "norm": {"scale": True}}
    new, state = optim.frozen_update(tx, params, state, params, frozen)
    moments = state[1].mu
    self.assertGreater(np.abs(moments["scale"]).min(), 0)
    self.assertEqual(np.abs(moments["norm"]["scale"]).max(), 0)
    self.assertFalse(np.any(new["scale"] == params["scale"]))

  def test_muon_takes_the_kernels_inside_blocks_only(self):
    chosen = [
      jax.tree_util.keystr(path, simple=True, separator="/")
      for path, is_matrix in jax.tree_util.tree_flatten_with_path(optim.block_matrices(_params()))[0]
      if is_matrix
    ]
    self.assertEqual(
      chosen,
      [f"block_{i:02d}/{n}/kernel" for i in range(2) for n in ("attention", "mlp/down", "mlp/up")],
    )

  def test_grouped_muon_equals_the_one_of_optax(self):
    params = {k: v for k, v in _params().items() if k in ("block_00", "block_01")}
    params = jax.tree.map(lambda b: b["mlp"], params, is_leaf=lambda x: "mlp" in x)
    ours = optim.scale_by_grouped_muon()
    # Learning rate -1: updates come out as the scaled steps themselves.
    theirs = optax.contrib.muon(-1.0, consistent_rms=0.2, muon_weight_dimension_numbers=None)
    a, b = ours.init(params), theirs.init(params)
    update_ours, update_theirs = jax.jit(ours.update), jax.jit(theirs.update)
    for step in range(3):
      grads = _grads(params, step)
      x, a = update_ours(grads, a, params)
      y, b = update_theirs(grads, b, params)
      jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=2e-4, atol=2e-4), x, y)

  def test_muon_steps_have_the_size_of_adamw_steps(self):
    params = {"block_00": {"a": {"kernel": jnp.zeros((48, 192))}, "b": {"kernel": jnp.zeros((64, 64))}}}
    tx = optim.make(_config(name="muon", weight_decay=0.0, clip_norm=0.0), params, 1.0)
    updates, _ = jax.jit(tx.update)(_grads(params, 0), tx.init(params), params)
    for leaf in jax.tree.leaves(updates):
      self.assertBetween(float(jnp.sqrt(jnp.mean(leaf**2))), 0.12, 0.28)

  @parameterized.parameters("adamw", "muon")
  def test_weight_decay_spares_vectors(self, name):
    params = _params()
    tx = optim.make(_config(name=name), params, 1e-2)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    self.assertEqual(float(jnp.abs(updates["norm"]["scale"]).max()), 0.0)
    self.assertEqual(float(jnp.abs(updates["block_00"]["attention"]["bias"]).max()), 0.0)
    np.testing.assert_allclose(updates["out"]["kernel"], -1e-3 * params["out"]["kernel"], rtol=1e-5)

  def test_schedule_rises_holds_and_ends_near_zero(self):
    rate = optim.schedule(_config(learning_rate=2.0, warmup_steps=10, decay_fraction=0.25), 100)
    values = np.asarray([rate(n) for n in range(101)])
    np.testing.assert_allclose(values[:3], [0.2, 0.4, 0.6], rtol=1e-6)
    np.testing.assert_allclose(values[9:76], 2.0, rtol=1e-6)
    np.testing.assert_allclose(values[76:], 2.0 * np.arange(24, -1, -1) / 25, atol=1e-6)
    constant = optim.schedule(_config(learning_rate=2.0), 100)
    np.testing.assert_allclose([constant(0), constant(99)], 2.0)

  def test_the_rate_of_a_config_without_the_fields_of_the_schedule_is_constant(self):
    config = {k: v for k, v in _config(learning_rate=2.0).items() if k not in ("warmup_steps", "decay_fraction")}
    rate = optim.schedule(config, 100)
    np.testing.assert_allclose([rate(0), rate(99)], 2.0)
    optim.make(config, _params(), rate)

  @parameterized.parameters(
    ("name", "sgd"),
    ("learning_rate", 0.0),
    ("learning_rate", float("inf")),
    ("weight_decay", float("inf")),
    ("clip_norm", float("nan")),
    ("decay_fraction", 1.5),
    ("b1", 1.0),
    ("clip_norm", -1.0),
  )
  def test_a_bad_field_is_named(self, field, value):
    with self.assertRaisesRegex(ValueError, f"config.optimizer.{field}: expected .*{value!r}"):
      optim.make(_config(**{field: value}), _params(), 1e-3)

  def test_ema_starts_quickly_and_ends_at_its_decay(self):
    ema, params = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    np.testing.assert_allclose(optim.ema_update(ema, params, 0, 0.999)["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(optim.ema_update(ema, params, 10**6, 0.999)["w"], 0.001, rtol=1e-3)
    same = {"w": jnp.linspace(-3.0, 3.0, 1000)}
    for step in (0, 1, 7, 10**6):
      np.testing.assert_array_equal(jax.jit(optim.ema_update)(same, same, step, 0.97)["w"], same["w"])


if __name__ == "__main__":
  absltest.main()
