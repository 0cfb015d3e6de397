"""One update: what it trains, what it leaves alone, what it shares between routes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from elasticdit_jax import elastic
from elasticdit_jax.flow import path
from elasticdit_jax.train import optim, state, step
from elasticdit_jax.types import to_float
from tests.evals import tiny_model
from tests.train import small

_LITE = elastic.standard_routes(3, (1,))
_losses = jax.jit(step.group_losses, static_argnums=(0, 1, 6, 8))
_velocity = jax.jit(step.velocity, static_argnums=(0, 5))


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def _leaves(tree, part):
  """Leaves whose path names `part`."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [
    np.asarray(x) for keys, x in flat if part in jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
  ]


def _roundings(program, params):
  """How often a program makes a bfloat16 matrix of a float32 one of the shape of a block's."""
  matrices = zip(jax.tree.leaves(params), jax.tree.leaves(optim.block_matrices(params)), strict=True)
  shapes = {x.shape for x, is_matrix in matrices if is_matrix}
  given = [e.invars[0].aval for e in program.eqns if e.params.get("new_dtype") == jnp.bfloat16]
  return sum(x.shape in shapes and x.dtype == jnp.float32 for x in given)


class StepTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = tiny_model.make((8,))
    cls.flow = step.FlowConfig(**small.FLOW)
    cls.batch = small.batch(cls.model.cfg)
    cls.x0 = jax.jit(lambda codec, image: codec.encode(to_float(image)))(cls.model.codecs[8], cls.batch.image)
    config = small.optimizer(learning_rate=1e-2, warmup_steps=0, decay_fraction=0.0, weight_decay=0.1)
    config.name = "muon"  # with AdamW for everything outside the blocks
    cls.tx = optim.make(config, cls.model.params, 1e-2)
    cls.update = staticmethod(step.make_step(cls.model.cfg, cls.flow, cls.tx, ema_decay=0.9))

  def _state(self):
    return state.create(jax.tree.map(jnp.copy, self.model.params), self.tx, 0)

  def test_lite_phase_freezes_skipped_blocks_and_their_optimiser_state(self):
    current, update = self._state(), self.update
    both, lite = (_LITE["max-f8"], _LITE["lite-f8"]), (_LITE["lite-f8"],)
    current, _ = update(current, self.model.codecs, self.batch, group=both, trainable=both)
    skipped = [_leaves(t, "block_01") for t in (current.params, current.opt_state)]
    kept = _leaves(current.params, "block_02")
    self.assertTrue(any(np.any(x) for x in skipped[1]), "momentum should have built up before")
    for _ in range(3):
      current, _ = update(current, self.model.codecs, self.batch, group=lite, trainable=lite)
    after = [_leaves(t, "block_01") for t in (current.params, current.opt_state)]
    small.same(self, skipped, after)
    self.assertFalse(np.array_equal(kept[0], _leaves(current.params, "block_02")[0]))

  def test_metrics_are_the_flow_matching_losses_of_each_route(self):
    routes = (_LITE["max-f8"], _LITE["lite-f8"])
    key = jax.random.key(3)
    x0 = self.x0
    loss, metrics = _losses(self.model.cfg, self.flow, self.model.params, {8: x0}, self.batch.text, key, routes)
    time_key, noise_key = jax.random.split(jax.random.fold_in(key, 8))
    t = path.sample_t(time_key, (4,), shift=self.flow.shift_at(16))
    eps = jax.random.normal(noise_key, x0.shape)
    for route in routes:
      x_t = path.interpolate(x0, eps, t)
      v = _velocity(self.model.cfg, self.model.params, x_t, t, self.batch.text, route)
      self.assertAlmostEqual(float(metrics[f"loss/{route.name}"]), float(jnp.mean((v - (eps - x0)) ** 2)), places=5)
    self.assertAlmostEqual(float(loss), float(np.mean([float(m) for m in metrics.values()])), places=5)

  def test_distillation_is_the_distance_to_the_full_backbone_with_the_weights_of_the_teacher(self):
    cfg, text, key, x0 = self.model.cfg, self.batch.text, jax.random.key(0), self.x0
    teacher = jax.tree.map(lambda x: 0.9 * x, self.model.params)
    group = (_LITE["lite-f8"], _LITE["max-f8"])

    def loss(distill, teacher):
      return _losses(cfg, self.flow, self.model.params, {8: x0}, text, key, group, teacher, distill)[0]

    x_t, t, _ = step.noised(cfg, self.flow, x0, key, 8)
    guide = _velocity(cfg, teacher, x_t, t, text, _LITE["max-f8"])
    apart = [float(jnp.mean((_velocity(cfg, self.model.params, x_t, t, text, route) - guide) ** 2)) for route in group]
    self.assertAlmostEqual(float(loss(0.5, teacher) - loss(0.0, None)), 0.5 * np.mean(apart), places=5)

  def test_teacher_gets_no_gradient_and_stays_what_it_is(self):
    current = self._state()
    current = dataclasses.replace(current, teacher=state.copy(current.params))
    before = jax.tree.map(np.asarray, current.teacher)
    update = step.make_step(self.model.cfg, self.flow, self.tx, ema_decay=0.9, distill=1.0)
    group = (_LITE["lite-f8"],)
    current, _ = update(current, self.model.codecs, self.batch, group=group, trainable=group, distilled=True)
    small.same(self, before, current.teacher)

  def test_matrices_rounded_once_make_the_same_update(self):
    cfg, tx = dataclasses.replace(self.model.cfg, dtype="bfloat16"), optax.sgd(1.0)
    group, found = (_LITE["max-f8"], _LITE["lite-f8"]), []
    before = state.create(self.model.params, tx, 0)
    for once in (False, True):
      update = step.make_step(cfg, self.flow, tx, ema_decay=0.9, round_once=once)
      args = (state.create(jax.tree.map(jnp.copy, self.model.params), tx, 0), self.model.codecs, self.batch)
      roundings = _roundings(update.trace(*args, group=group, trainable=group).jaxpr, before.params)
      current, metrics = update(*args, group=group, trainable=group)
      found.append((roundings, metrics, jax.tree.map(jnp.subtract, before.params, current.params)))
    (each, metrics, grads), (once, metrics_once, grads_once) = found
    self.assertEqual(once, sum(jax.tree.leaves(optim.block_matrices(before.params))))
    self.assertGreater(each, 1.5 * once)
    for name, value in metrics.items():
      np.testing.assert_allclose(metrics_once[name], value, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(grads_once), jax.tree.leaves(grads), strict=True):
      self.assertEqual(a.dtype, jnp.float32)
      np.testing.assert_allclose(a, b, rtol=0, atol=0.01 * np.abs(b).max() + 1e-6)

  def test_deterministic_and_one_trace_per_group(self):
    a, b, update = self._state(), self._state(), self.update
    group, sizes = (_LITE["lite-f8"],), []
    for _ in range(2):
      a, _ = update(a, self.model.codecs, self.batch, group=group, trainable=group)
      b, _ = update(b, self.model.codecs, self.batch, group=group, trainable=group)
      sizes.append(update._cache_size())
    small.same(self, a.params, b.params)
    self.assertEqual(sizes[0], sizes[1])


if __name__ == "__main__":
  absltest.main()
