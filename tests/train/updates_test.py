"""Which rows an epoch of alignment is made of, and what they come to together."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from elasticdit_jax.train import losses, policy, updates
from tests.train import policy_test, small

COUNT = policy_test.COUNT
NOISY = losses.Objective(kl=2.0, divergence="v")
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
  @parameterized.parameters(
    (losses.Objective("nft", divergence="v"), 0), (losses.Objective(kl=1.0), 6), (PULL, 3), (NOISY, 3)
  )
  def test_pictures_that_differ_are_trained_at_every_time_and_pulled_at_one_or_all(self, objective, pulled):
    made = updater(objective, count=2)
    parts = made.split({"r": drawn([1, 0, -1, 2])}, 3)
    rows = [part["r"].index for part in parts]
    self.assertCountEqual(np.concatenate(rows), [0, 2, 3, 4, 6, 7])
    self.assertEqual([len(part["r"]) for part in parts], [4, 2])
    for each in rows:  # both times of a picture lie in one update
      self.assertEqual(set(each % COUNT), set(each[each >= COUNT] - COUNT))
    found = np.concatenate([part["r"].index[: part["r"].pulled] for part in parts])
    self.assertLen(found, pulled)
    self.assertLen(set(found % COUNT), min(pulled, 3))
    again = made.split({"r": drawn([1, 0, -1, 2])}, 3)
    for a, b in zip(parts, again, strict=True):
      np.testing.assert_array_equal(a["r"].index, b["r"].index)

  def test_pulls_reach_every_time(self):
    made = updater(PULL)
    found = [made.split({"r": drawn([1, 0, 0, 0])}, n)[0]["r"].index[0] for n in range(20)]
    self.assertEqual(set(found), {0, COUNT})

  def test_routes_with_rows_weigh_the_same_and_others_nothing(self):
    made = updater(PULL, batch=4)
    (parts,) = made.split({"a": drawn([1, 0, -1, 2]), "b": drawn([0, 0, 0, 0]), "c": drawn([0, 1, 0, 0])}, 0)
    self.assertEmpty([*made._batches(parts["b"], parts)])
    for name, pictures, programs in (("a", [0, 2, 3], [True, False]), ("c", [1], [True])):
      batches = [*made._batches(parts[name], parts)]
      self.assertEqual([pull is not None for _, _, pull in batches], programs)
      index, weight = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
      pull = np.concatenate([np.zeros(4, np.float32) if batch[2] is None else batch[2] for batch in batches])
      self.assertCountEqual(index[weight > 0], [p + COUNT * time for p in pictures for time in (0, 1)])
      self.assertCountEqual(index[pull > 0] % COUNT, pictures)
      for each in (weight, pull):
        np.testing.assert_allclose(each.sum(), 0.5, rtol=1e-6)
        self.assertLen(set(each[each > 0]), 1)

  def test_the_last_batch_is_filled_up(self):
    batches = updates.micro_batches(np.arange(6) + 1, 4)
    np.testing.assert_array_equal([index for index, _ in batches], [[1, 2, 3, 4], [5, 6, 0, 0]])
    np.testing.assert_array_equal(batches[1][1], [1, 1, 0, 0])


class UpdateTest(absltest.TestCase):
  def test_gradient_is_that_of_both_means_with_equal_routes(self):
    """Against one call for each route, weights written out: three pictures of one weigh as much as one of the other."""
    made, m = updater(PULL, batch=2, learning_rate=1e3), policy_test.model()
    routes = m.routes["lite-f16"], m.routes["max-f16"]
    state = made.policy.create(m.params, 0)
    rollouts = dict(zip(routes, (drawn([1, 0, -1, 2]), drawn([0, 0.5, 0, 0])), strict=True))
    after, sums = made.epoch(state, m.params, rollouts, 0)
    (parts,) = made.split(rollouts, 0)
    total, kl, null = jax.tree.map(jnp.zeros_like, state.params), 0.0, made.sampler.null
    for route, d in rollouts.items():
      every = np.arange(8)
      weight = 0.5 * np.isin(every % COUNT, np.flatnonzero(d.advantage)) / len(parts[route])
      pulled = parts[route].index[: parts[route].pulled]
      pull = 0.5 * np.isin(every, pulled) / len(pulled)
      args = m.params, d.x, d.row.t, d.text, null, None, every
      grads, found = policy.gradients(
        m.params,
        state.reference,
        (d.x, d.goal, d.row, d.text, d.advantage),
        null,
        None,
        every,
        np.float32(weight),
        np.float32(pull),
        policy.velocities(*args, cfg=m.cfg, route=route),
        False,
        cfg=m.cfg,
        route=route,
        objective=PULL,
        scale=0.0,
        layout=made.policy.layout,
      )
      total, kl = policy.add(total, grads), kl + found["kl"]
    step = jax.tree.map(lambda old, new: 1e-3 * (old - new), state.params, after.params)
    policy_test.close(self, step, total, 1e-3)
    np.testing.assert_allclose(sums["kl"], kl, rtol=1e-4)
    self.assertEqual(int(after.updates), 1)

  def test_only_the_first_update_is_fresh_and_later_ones_know_their_own_rows(self):
    m, rollouts = policy_test.model(), {policy_test.model().routes["lite-f16"]: drawn([1, 0.5, -1, 2])}
    ratios = {}
    for rate in (0.0, 1e-2):
      made = updater(losses.Objective(), count=2, batch=2, learning_rate=rate)
      after, sums = made.epoch(made.policy.create(m.params, 0), m.params, rollouts, 0)
      self.assertEqual(int(after.updates), 2)
      ratios[rate] = sums["ratio_off"]
    self.assertLess(ratios[0.0], 1e-6)
    self.assertGreater(ratios[1e-2], 1e-5)

  def test_rewards_that_say_nothing_change_nothing(self):
    m, made = policy_test.model(), updater(PULL)
    state = made.policy.create(m.params, 0)
    same, sums = made.epoch(state, m.params, {m.routes["lite-f16"]: drawn([0, 0, 0, 0])}, 0)
    small.same(self, same.params, state.params)
    self.assertEqual((int(same.updates), sums), (0, {}))


if __name__ == "__main__":
  absltest.main()
