"""Which rows an epoch of alignment is made of, and what they come to together."""

import contextlib
import dataclasses
import types
from unittest import mock

import jax
import numpy as np
import optax
from absl.testing import absltest

from elasticdit_jax.train import losses, policy, updates
from tests.train import policy_test, small

COUNT = policy_test.COUNT
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


class SplitTest(absltest.TestCase):
  def test_pictures_that_differ_are_trained_at_every_time_in_one_update(self):
    made = updater(losses.Objective(), count=2)
    parts = [part["r"] for part in made.split({"r": drawn([1, 0, -1, 2])}, 3)]
    self.assertCountEqual(np.concatenate(parts), [0, 2, 3, 4, 6, 7])
    self.assertEqual([*map(len, parts)], [4, 2])
    for part in parts:
      self.assertEqual(set(part % COUNT), set(part[part >= COUNT] - COUNT))
    again = [part["r"] for part in made.split({"r": drawn([1, 0, -1, 2])}, 3)]
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(parts))

  def test_the_last_batch_is_filled_up(self):
    weights = np.float32([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    batches = updates.micro_batches(np.arange(6) + 1, 4, weights)
    np.testing.assert_array_equal([index for index, _ in batches], [[1, 2, 3, 4], [5, 6, 0, 0]])
    np.testing.assert_array_equal(batches[0][1], weights[:, :4])
    np.testing.assert_array_equal(batches[1][1], [[5, 6, 0, 0], [2, 1, 0, 0]])


class UpdateTest(absltest.TestCase):
  def test_gradient_is_that_of_the_mean_with_equal_routes(self):
    """Against one call for each route, weights written out: three pictures of one weigh as much as one of the other."""
    # The weights in training stand for those that drew, or velocities of these are asked for.
    for lag, anchor in ((0.0, 0.0), (0.5, 0.0), (0.0, 3.0)):
      with self.subTest(lag=lag, anchor=anchor):
        self._check_gradient(dataclasses.replace(PULL, lag=lag, anchor=anchor))

  def _check_gradient(self, objective):
    made, m = updater(objective, batch=4, learning_rate=1e3), policy_test.model()
    first, second = m.routes["lite-f16"], m.routes["max-f16"]
    rollouts = {first: drawn([1, 0, -1, 2]), second: drawn([0, 0.5, 0, 0])}
    state = made.policy.create(m.params, 0)
    after, sums = made.epoch(state, m.params, rollouts, 0)
    parts = [self._gradients(made, state, route, d, 0.5) for route, d in rollouts.items()]
    grads, found = policy.add(*parts)
    step = jax.tree.map(lambda old, new: 1e-3 * (old - new), state.params, after.params)
    policy_test.close(self, step, grads, 1e-3)
    np.testing.assert_allclose(sums["kl"], found["kl"], rtol=1e-4)
    if objective.anchor:
      self.assertLess(sums["anchor"], 1e-12)  # the weights are still the given ones
    self.assertEqual(int(after.updates), 1)
    # A route without rows takes no weight from the others.
    _, sums = made.epoch(state, m.params, {first: rollouts[first], second: drawn([0, 0, 0, 0])}, 0)
    np.testing.assert_allclose(sums["kl"], 2 * parts[0][1]["kl"], rtol=1e-4)

  def _gradients(self, made, state, route, d, share):
    """Of one route, whose rows weigh `share` together, in one batch."""
    every, null, objective = np.arange(8), made.sampler.null, made.policy.objective
    chosen = np.isin(every % COUNT, np.flatnonzero(d.advantage))
    # The last time of each picture is the anchor's, where there is one.
    held = chosen & (every >= COUNT) if objective.anchor else np.zeros(8, bool)
    chosen = chosen & ~held
    args = state.params, d.x, d.row.t, d.text, null, None, every
    return policy.gradients(
      state.params,
      state.reference,
      (d.x, d.goal, d.row, d.text, d.advantage),
      null,
      None,
      every,
      np.float32(share * chosen / chosen.sum()),
      np.float32(share * held / max(held.sum(), 1)),
      policy.velocities(*args, cfg=made.policy.cfg, route=route),
      False,
      cfg=made.policy.cfg,
      route=route,
      objective=objective,
      scale=0.0,
      layout=made.policy.layout,
    )

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

  def test_weights_in_training_that_draw_are_asked_once(self):
    m, rollouts = policy_test.model(), {policy_test.model().routes["lite-f16"]: drawn([1, 0, -1, 2])}
    with mock.patch.object(policy, "velocities", side_effect=AssertionError("a second pass")):
      for lag in (0.0, 0.5):
        made = updater(dataclasses.replace(PULL, lag=lag))
        state = made.policy.create(m.params, 0)
        with self.assertRaisesRegex(AssertionError, "a second pass") if lag else contextlib.nullcontext():
          made.epoch(state, m.params, rollouts, 0)

  def test_rewards_that_say_nothing_change_nothing(self):
    m, made = policy_test.model(), updater(PULL)
    state = made.policy.create(m.params, 0)
    same, sums = made.epoch(state, m.params, {m.routes["lite-f16"]: drawn([0, 0, 0, 0])}, 0)
    small.same(self, same.params, state.params)
    self.assertEqual((int(same.updates), sums), (0, {}))


if __name__ == "__main__":
  absltest.main()
