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


def drawn(advantage, held=0, velocity=None):
  """Stands for a rollout: only what updates read."""
  x, goal, row, text, _ = policy_test.rows()
  advantage = np.float32(advantage)
  return types.SimpleNamespace(x=x, goal=goal, row=row, text=text, advantage=advantage, held=held, velocity=velocity)


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
    np.testing.assert_array_equal(updates.micro_batches(np.arange(6) + 1, 4), [[1, 2, 3, 4], [5, 6, 0, 0]])
    first, last = updates.micro_batches(np.float32([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]), 4)
    np.testing.assert_array_equal(first, [[1, 2, 3, 4], [6, 5, 4, 3]])
    np.testing.assert_array_equal(last, [[5, 6, 0, 0], [2, 1, 0, 0]])
    self.assertLen(updates.micro_batches(np.arange(8), 4), 2)
    self.assertEmpty(updates.micro_batches(np.arange(0), 4))


class UpdateTest(absltest.TestCase):
  def test_gradient_is_that_of_the_mean_with_equal_routes(self):
    """Against one call for each route, weights written out: three pictures of one weigh as much as one of the other."""
    # The weights in training stand for those that drew, or velocities of these are asked for.
    for lag, anchor in ((0.0, 0.0), (0.5, 0.0), (0.0, 3.0), (0.5, 3.0)):
      with self.subTest(lag=lag, anchor=anchor):
        self._check_gradient(dataclasses.replace(PULL, lag=lag, anchor=anchor))

  def _check_gradient(self, objective):
    made, m = updater(objective, batch=4, learning_rate=1e3), policy_test.model()
    first, second = m.routes["lite-f16"], m.routes["max-f16"]
    held = COUNT if objective.anchor else 0
    rollouts = {first: drawn([1, 0, -1, 2], held), second: drawn([0, 0.5, 0, 0], held)}
    state = made.policy.create(m.params, 0)
    if held:  # away from the given weights, where the anchor pulls
      state = dataclasses.replace(state, params=jax.tree.map(lambda p: 1.01 * p, state.params))
    after, sums = made.epoch(state, state.params, rollouts, 0)
    parts = [self._gradients(made, state, route, d, 0.5) for route, d in rollouts.items()]
    grads, found = policy.add(*parts)
    step = jax.tree.map(lambda old, new: 1e-3 * (old - new), state.params, after.params)
    policy_test.close(self, step, grads, 1e-3)
    np.testing.assert_allclose(sums["kl"], found["kl"], rtol=1e-4)
    if objective.anchor:
      self.assertGreater(sums["anchor"], 1e-6)
      np.testing.assert_allclose(sums["anchor"], found["anchor"], rtol=1e-4)
    self.assertEqual(int(after.updates), 1)
    # A route without rows takes no weight from the others.
    _, sums = made.epoch(state, state.params, {first: rollouts[first], second: drawn([0, 0, 0, 0], held)}, 0)
    np.testing.assert_allclose(sums["kl"], 2 * parts[0][1]["kl"], rtol=1e-4)

  def _gradients(self, made, state, route, d, share):
    """Of one route, whose rows weigh `share` together, in one batch."""
    every, null, objective = np.arange(8), made.sampler.null, made.policy.objective
    chosen = np.isin(every % COUNT, np.flatnonzero(d.advantage))
    # The last time of each picture is the anchor's, where there is one.
    held = chosen & (every >= len(every) - d.held)
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

  def test_velocities_that_the_sampler_asked_for_are_not_asked_for_again(self):
    m = policy_test.model()
    route, made = m.routes["lite-f16"], updater(losses.Objective(), count=2, batch=2, learning_rate=1e-2)
    d, every = drawn([1, 0.5, -1, 2]), np.arange(8)
    sampler = made.sampler
    known = policy.velocities(
      m.params, d.x, d.row.t, d.text, sampler.null, sampler.scale, every, cfg=made.policy.cfg, route=route
    )
    after, sums = made.epoch(made.policy.create(m.params, 0), m.params, {route: d}, 0)
    with mock.patch.object(policy, "velocities", side_effect=AssertionError("a second pass")):
      d = drawn(d.advantage, velocity=known)
      again, found = made.epoch(made.policy.create(m.params, 0), m.params, {route: d}, 0)
    policy_test.close(self, again.params, after.params, 1e-5)
    self.assertGreater(found["ratio_off"], 1e-5)
    np.testing.assert_allclose(found["ratio_off"], sums["ratio_off"], rtol=1e-2)

  def test_rows_of_the_anchor_come_last_and_need_no_velocities_of_the_weights_that_drew(self):
    m, rollouts = policy_test.model(), {policy_test.model().routes["lite-f16"]: drawn([1, 0, -1, 2], held=COUNT)}
    made = updater(dataclasses.replace(PULL, lag=0.5, anchor=1.0), batch=2)
    (part,) = made.split(rollouts, 0)
    self.assertCountEqual(part[m.routes["lite-f16"]][3:], [4, 6, 7])
    state = made.policy.create(m.params, 0)
    with mock.patch.object(policy, "velocities", side_effect=policy.velocities) as asked:
      made.epoch(state, m.params, rollouts, 0)
    rows = np.concatenate([call.args[6] for call in asked.call_args_list])
    self.assertCountEqual(rows, [0, 2, 3, 0])  # the last batch is filled up

  def test_rewards_that_say_nothing_change_nothing(self):
    m, made = policy_test.model(), updater(PULL)
    state = made.policy.create(m.params, 0)
    same, sums = made.epoch(state, m.params, {m.routes["lite-f16"]: drawn([0, 0, 0, 0])}, 0)
    small.same(self, same.params, state.params)
    self.assertEqual((int(same.updates), sums), (0, {}))


if __name__ == "__main__":
  absltest.main()
