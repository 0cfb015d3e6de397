"""The compiled parts of an update on a few thousand parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from elasticdit_jax.flow import stochastic
from elasticdit_jax.flow.sampler import times
from elasticdit_jax.train import losses, policy, step, updates
from tests.evals import tiny_model
from tests.train import small

COUNT, TRAINED = 4, 2  # pictures, times of each


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def model():
  return tiny_model.make(())


def rows():
  """(x, goal, row, text, advantage) of a made-up rollout along f16 at 64 px."""
  rng = np.random.default_rng(0)
  x, goal = rng.normal(size=(2, TRAINED * COUNT, 4, 4, 16)).astype(np.float32)
  table = stochastic.sde(times(4, 3.0), 0.7)
  row = jax.tree.map(lambda column: np.repeat(column[1:3], COUNT), table).to_device()
  text = jax.tree.map(jnp.asarray, model().encoder.encode(["two circles", "a red square", "a circle", "a big circle"]))
  return jnp.asarray(x), jnp.asarray(goal), row, text, jnp.float32([1.0, -1.0, 2.0, 0.5])


def gradients(
  trained, index, weight, *, guidance=None, objective=None, fresh=True, scale=0.0, v_old=None, hold=(), null=None
):
  """Filled up to eight rows: one program serves most tests."""
  null, missing = null or model().encoder.encode([""]), 8 - len(index)
  index, weight = [*index, *[7] * missing], [*weight, *[0.0] * missing]
  v_old = None if v_old is None else jnp.concatenate([v_old, jnp.zeros((missing, *v_old.shape[1:]))])
  return policy.gradients(
    trained,
    model().params,
    rows(),
    null,
    None if guidance is None else jnp.float32(guidance),
    np.int32(index),
    np.float32(weight),
    np.float32([*hold, *[0.0] * (8 - len(hold))]),
    jnp.zeros((8, 4, 4, 16)) if v_old is None else v_old,
    fresh,
    cfg=model().cfg,
    route=model().routes["lite-f16"],
    objective=objective or losses.Objective(),
    scale=scale,
  )


def close(test, a, b, tolerance=1e-4):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(np.abs(y).max() + 1e-12))


class PolicyTest(absltest.TestCase):
  def test_parts_add_up_and_padding_counts_nothing(self):
    index = np.array([5, 0, 3, 6, 1, 2])
    whole = gradients(model().params, index, [1 / 6] * 6)
    batches = updates.micro_batches(index, 4), updates.micro_batches(np.full(6, 1 / 6, np.float32), 4)
    parts = [gradients(model().params, *batch) for batch in zip(*batches, strict=True)]
    close(self, policy.add(*parts), whole)
    self.assertEqual(float(whole[1]["ratio_off"]), 0.0)
    np.testing.assert_allclose(whole[1]["ratio"], 1.0, rtol=1e-6)

  def test_unconditional_branch_passes_no_gradient(self):
    """Against the guided velocity written out, with the empty branch as a constant."""
    m, index = model(), np.array([1, 6])
    x, goal, row, text, advantage = rows()
    route = m.routes["lite-f16"]
    part = jax.tree.map(lambda a: a[index % COUNT], text)
    null = jax.tree.map(lambda a: jnp.asarray(np.repeat(a, 2, axis=0)), m.encoder.encode([""]))
    at = jax.tree.map(lambda column: column[index], row)
    velocity = jax.jit(step.velocity, static_argnums=(0, 5))
    v_null = velocity(m.cfg, m.params, x[index], at.t, null, route)

    def value(params):
      v = v_null + 3.0 * (velocity(m.cfg, params, x[index], at.t, part, route) - v_null)
      log_prob = stochastic.log_prob(goal[index], stochastic.mean(x[index], v, at), at)
      return -jnp.sum(advantage[index % COUNT] * log_prob) / 2

    found, _ = gradients(m.params, index, [0.5, 0.5], guidance=3.0)
    close(self, found, jax.jit(jax.grad(value))(m.params))

  def test_a_guided_reference_is_what_the_divergence_pulls_towards(self):
    m, index = model(), np.array([1, 6])
    x, _, row, text, _ = rows()
    part = jax.tree.map(lambda a: a[index % COUNT], text)
    null = jax.tree.map(lambda a: jnp.asarray(np.repeat(a, 2, axis=0)), m.encoder.encode([""]))
    velocity = jax.jit(step.velocity, static_argnums=(0, 5))
    v, v_null = (velocity(m.cfg, m.params, x[index], row.t[index], t, m.routes["lite-f16"]) for t in (part, null))
    objective = losses.Objective(kl=2.0, divergence="v", guidance=1.5)
    grads, found = gradients(m.params, index, [0.5, 0.5], objective=objective)
    # The weights in training are the reference's: what is left is half of what the text changes.
    np.testing.assert_allclose(found["kl"], jnp.mean(jnp.square(0.5 * (v - v_null))), rtol=1e-4)
    plain, same = gradients(m.params, index, [0.5, 0.5], objective=dataclasses.replace(objective, guidance=1.0))
    self.assertEqual(float(same["kl"]), 0.0)
    self.assertFalse(np.allclose(grads["block_00"]["image_out"]["kernel"], plain["block_00"]["image_out"]["kernel"]))

  def test_the_anchor_is_never_guided_and_needs_no_divergence(self):
    index, moved = [1, 6], jax.tree.map(lambda p: p * 1.01, model().params)
    guided = losses.Objective(kl=2.0, divergence="v", guidance=1.5, anchor=0.5)
    _, found = gradients(moved, index, [0.0, 0.0], hold=[0.5, 0.5], objective=guided)
    self.assertEqual(float(found["kl"]), 0.0)
    # A row beside that hardly weighs anything: where there is none, nothing is guided.
    three, hardly = [*index, 0], [0.0, 0.0, 1e-12]
    _, found = gradients(moved, three, hardly, hold=[0.5, 0.5], objective=guided)
    alone = losses.Objective("nft", anchor=0.5)
    grads, same = gradients(moved, index, [0.0, 0.0], hold=[0.5, 0.5], objective=alone)
    self.assertLess(float(found["kl"]), 1e-9)
    np.testing.assert_allclose(found["anchor"], same["anchor"], rtol=1e-3)
    m = model()
    x, _, row, text, _ = rows()
    args = x, row.t, text, m.encoder.encode([""]), None, np.array(index)
    now, given = (policy.velocities(w, *args, cfg=m.cfg, route=m.routes["lite-f16"]) for w in (moved, m.params))
    np.testing.assert_allclose(same["anchor"], jnp.mean(jnp.square(now - given)), rtol=1e-4)
    np.testing.assert_allclose(same["loss"], 0.5 * same["anchor"], rtol=1e-5)
    self.assertGreater(float(policy.norm(grads)), 0.0)
    # Nor where the sampler is guided.
    paper = losses.Objective(divergence="x", anchor=0.5)
    beside, sums = gradients(moved, three, hardly, guidance=3.0, hold=[0.5, 0.5], objective=paper)
    np.testing.assert_allclose(sums["anchor"], same["anchor"], rtol=1e-3)
    close(self, beside, grads, 2e-3)
    at_rest, _ = gradients(m.params, index, [0.0, 0.0], hold=[0.5, 0.5], objective=alone)
    self.assertEqual(float(policy.norm(at_rest)), 0.0)

  def test_rows_of_the_anchor_alone_compute_no_empty_branch(self):
    null = model().encoder.encode(["a circle"])
    null = jax.tree.map(lambda a: a if a.dtype == bool else np.full_like(a, np.nan), null)
    guided = losses.Objective(kl=2.0, divergence="v", guidance=1.5, anchor=0.5)
    sampled = losses.Objective(divergence="x", anchor=0.5)
    for objective, guidance in ((guided, None), (sampled, 3.0)):
      settings = {"objective": objective, "guidance": guidance, "null": null}
      grads, sums = gradients(model().params, [1, 6], [0.0, 0.0], hold=[0.5, 0.5], **settings)
      self.assertTrue(np.isfinite(policy.norm((grads, sums))))
      grads, sums = gradients(model().params, [1, 6], [0.5, 0.0], hold=[0.0, 0.5], **settings)
      self.assertFalse(np.isfinite(policy.norm((grads, sums))))

  def test_old_velocities_make_the_ratio_of_a_late_update(self):
    index = np.array([0, 1, 4, 7])
    x, _, row, text, _ = rows()
    null, m = model().encoder.encode([""]), model()
    route = m.routes["lite-f16"]
    v_old = policy.velocities(m.params, x, row.t, text, null, None, index, cfg=m.cfg, route=route)
    _, same = gradients(m.params, index, [0.25] * 4, fresh=False, v_old=v_old)
    self.assertLess(float(same["ratio_off"]), 1e-6)
    moved = jax.tree.map(lambda p: p * 1.01, m.params)
    _, later = gradients(moved, index, [0.25] * 4, fresh=False, v_old=v_old)
    self.assertGreater(float(later["ratio_off"]), 1e-5)
    _, first = gradients(moved, index, [0.25] * 4, fresh=True, v_old=v_old)
    self.assertEqual(float(first["ratio_off"]), 0.0)

  def test_adapters_train_and_the_reference_does_not(self):
    made = policy.Policy(model().cfg, losses.Objective(kl=1.0, divergence="v"), optax.sgd(0.1), 0.5, 2, 4.0)
    state = made.create(model().params, 0)
    small.same(self, made.weights(state.params, state.reference), model().params)
    grads, sums = gradients(state.params, [0, 5], [0.5, 0.5], objective=made.objective, scale=made.scale)
    self.assertEqual(float(sums["kl"]), 0.0)
    after = made.apply(state, grads, (model().routes["max-f16"],))
    small.same(self, after.reference, state.reference)
    self.assertEqual(int(after.updates), 1)
    pair = after.params["block_00"]["image_mlp"]["up"]["kernel"]
    self.assertTrue(np.any(np.asarray(pair["b"]) != 0))
    _, sums = gradients(after.params, [0, 5], [0.5, 0.5], objective=made.objective, scale=made.scale)
    self.assertGreater(float(sums["kl"]), 0.0)

  def test_what_no_trained_route_reads_keeps_every_bit(self):
    made = policy.Policy(model().cfg, losses.Objective(), optax.adamw(0.1, weight_decay=0.1), 0.5, 0, 1.0)
    state = made.create(model().params, 0)
    grads = jax.tree.map(jnp.ones_like, state.params)
    lite = model().routes["lite-f16"]
    after = made.apply(state, grads, (lite,))
    (skipped,) = set(range(3)) - set(lite.active)
    small.same(self, after.params[f"block_{skipped:02d}"], state.params[f"block_{skipped:02d}"])
    self.assertTrue(
      np.any(np.asarray(after.params["block_00"]["modulation"]) != state.params["block_00"]["modulation"])
    )

  def test_average_that_draws_follows_ever_more_slowly(self):
    made = policy.Policy(model().cfg, losses.Objective("nft", lag=0.5), optax.sgd(0.1), 0.5, 2, 4.0)
    state = made.create(model().params, 0)
    moved = jax.tree.map(lambda p: p + 1.0, state.params)
    for number, decay in ((0, 0.0), (200, 0.2), (9000, 0.5)):
      late = dataclasses.replace(state, step=jnp.int32(number), params=moved)
      expected = jax.tree.map(lambda o, p, d=decay: d * o + (1 - d) * p, state.old, moved)
      close(self, made.move_old(late).old, expected)


if __name__ == "__main__":
  absltest.main()
