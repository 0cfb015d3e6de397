"""Which rows an epoch of alignment is made of, and what they come to together."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from elasticdit_jax.train import losses, policy, updates
from tests.train import policy_test, small

COUNT, TRAINED = policy_test.COUNT, policy_test.TRAINED
PULL = losses.Objective("nft", kl=2.0, divergence="v", guidance=1.5)


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def updater(objective, count=1, batch=8, learning_rate=1e-3):
  model = policy_test.model()
  made = policy.Policy(model.cfg, objective, optax.sgd(learning_rate), 0.5, 0, 1.0)
  sampler = types.SimpleNamespace(null=model.encoder.encode([""]), scale=None, plan=types.SimpleNamespace(batch=batch))
  return updates.Updater(made, sampler, count, 7, tuple(model.routes.values()))


def drawn(advantage):
  """Stands for a rollout: only what updates read."""
  x, goal, row, text, _ = policy_test.rows()
  return types.SimpleNamespace(x=x, goal=goal, row=row, text=text, advantage=np.float32(advantage))


class SplitTest(parameterized.TestCase):
  @parameterized.parameters((losses.Objective(kl=1.0), 0), (losses.Objective("nft", divergence="v"), 0), (PULL, COUNT))
  def test_pictures_that_differ_are_taught_at_every_time_and_a_divergence_reaches_all(self, objective, anchored):
    made = updater(objective, count=2)
    parts = made.split({"r": drawn([1, 0, -1, 2])}, 3)
    taught = [part["r"].taught.reshape(-1, TRAINED) for part in parts]
    for rows in taught:
      np.testing.assert_array_equal(rows[:, 1], rows[:, 0] + COUNT)
    self.assertCountEqual(np.concatenate(taught)[:, 0], [0, 2, 3])
    self.assertCountEqual(np.concatenate([part["r"].anchored for part in parts]), range(anchored))
    again = made.split({"r": drawn([1, 0, -1, 2])}, 3)
    for a, b in zip(parts, again, strict=True):
      np.testing.assert_array_equal(a["r"].taught, b["r"].taught)

  def test_the_last_batch_is_filled_up(self):
    batches = updates.micro_batches(np.arange(6) + 1, 4, 0.5)
    np.testing.assert_array_equal([index for index, _ in batches], [[1, 2, 3, 4], [5, 6, 0, 0]])
    np.testing.assert_array_equal(batches[1][1], [0.5, 0.5, 0, 0])


class UpdateTest(absltest.TestCase):
  def test_gradient_is_that_of_both_means_with_equal_routes(self):
    """Against single calls: three rows of one route and one of the other weigh the same, kind by kind."""
    made, m = updater(PULL, learning_rate=0.1), policy_test.model()
    routes = m.routes["lite-f16"], m.routes["max-f16"]
    state = made.policy.create(m.params, 0)
    rollouts = dict(zip(routes, (drawn([1, 0, -1, 2]), drawn([0, 0.5, 0, 0])), strict=True))
    after, sums = made.epoch(state, m.params, rollouts, 0)
    total = jax.tree.map(jnp.zeros_like, state.params)
    for route, d in rollouts.items():
      taught = np.concatenate([np.flatnonzero(d.advantage) + COUNT * time for time in range(TRAINED)])
      for index, old in ((taught, True), (np.arange(COUNT), False)):
        (padded, weight), *_ = updates.micro_batches(index, 8, 0.5 / len(index))
        null = made.sampler.null
        args = m.params, d.x, d.row.t, d.text, null, None, padded
        v_old = policy.velocities(*args, cfg=m.cfg, route=route) if old else None
        rows = d.x, d.goal, d.row, d.text, d.advantage
        grads, _ = policy.gradients(
          m.params,
          state.reference,
          rows,
          null,
          None,
          padded,
          weight,
          v_old,
          False,
          cfg=m.cfg,
          route=route,
          objective=PULL,
          scale=0.0,
          layout=made.policy.layout,
        )
        total = policy.add(total, grads)
    step = jax.tree.map(lambda old, new: 10 * (old - new), state.params, after.params)
    policy_test.close(self, step, total, 5e-3)
    self.assertGreater(sums["kl"], 0.0)
    self.assertEqual(int(after.updates), 1)

  def test_a_divergence_moves_weights_where_rewards_say_nothing(self):
    m = policy_test.model()
    rollouts = {m.routes["lite-f16"]: drawn([0, 0, 0, 0])}
    pulled = updater(PULL)
    state = pulled.policy.create(m.params, 0)
    after, first = pulled.epoch(state, m.params, rollouts, 0)
    _, second = pulled.epoch(after, m.params, rollouts, 0)
    self.assertLess(second["kl"], first["kl"])
    silent = updater(dataclasses.replace(PULL, kl=0.0, guidance=1.0))
    same, sums = silent.epoch(state, m.params, rollouts, 0)
    small.same(self, same.params, state.params)
    self.assertEqual((int(same.updates), sums), (0, {}))


if __name__ == "__main__":
  absltest.main()
