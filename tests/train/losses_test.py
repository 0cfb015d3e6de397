"""Advantages and objectives against formulas written out in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.flow import sampler, stochastic
from elasticdit_jax.train import losses
from elasticdit_jax.types import Text

ROWS = 3
TABLE = jax.tree.map(lambda column: column[np.array([0, 2, 3])], stochastic.sde(sampler.times(5, 3.0), 0.7))
NO_TEXT = Text(np.zeros((ROWS, 1, 1), np.float32), np.ones((ROWS, 1), bool))


def moments(advantage=(1.0, -2.0, 0.5), weight=(0.5, 0.25, 0.25), seed=0):
  rng = np.random.default_rng(seed)
  x, goal = rng.normal(size=(2, ROWS, 2, 2, 3)).astype(np.float32)
  return losses.Moments(x, goal, NO_TEXT, np.float32(advantage), np.float32(weight), TABLE.to_device())


def velocities(count, seed=1):
  return np.random.default_rng(seed).normal(size=(count, ROWS, 2, 2, 3)).astype(np.float32)


def mean(a):
  return np.asarray(a, np.float64).mean(axis=(1, 2, 3))


def average(m, v):
  column = {name: getattr(TABLE, name)[:, None, None, None] for name in ("x", "v")}
  return column["x"] * m.x + column["v"] * v


def log_density(m, v):
  return -mean((m.goal - average(m, v)) ** 2) / (2 * TABLE.std**2)


class AdvantagesTest(parameterized.TestCase):
  REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [0.2, 0.4, 0.6, 0.8]])

  def test_deviations_from_the_mean_of_the_group(self):
    got = losses.advantages(self.REWARDS)
    centred = self.REWARDS - self.REWARDS.mean(1, keepdims=True)
    np.testing.assert_allclose(got, centred / (self.REWARDS.std(1, keepdims=True) + 1e-4), rtol=1e-6)
    epoch = losses.advantages(self.REWARDS, "epoch")
    np.testing.assert_allclose(epoch, centred / (self.REWARDS.std() + 1e-4), rtol=1e-6)

  @parameterized.parameters("group", "epoch")
  def test_a_group_of_equal_rewards_says_exactly_nothing(self, spread):
    rewards = np.array([[0.1] * 7, [0.3] * 6 + [0.9]], np.float32)
    got = losses.advantages(rewards, spread)
    self.assertEqual(np.count_nonzero(got[0]), 0)
    self.assertEqual(np.count_nonzero(got[1]), 7)

  def test_outliers_are_cut(self):
    rewards = np.array([[0.0] * 99 + [1.0]])
    self.assertEqual(losses.advantages(rewards).max(), 5.0)
    self.assertGreater(losses.advantages(rewards, most=100.0).max(), 9.0)


class PolicyTest(parameterized.TestCase):
  def test_first_update_has_ratio_one_and_the_policy_gradient(self):
    m, (v,) = moments(), velocities(1)

    def value(v):
      return losses.loss(losses.Objective(), v, jax.lax.stop_gradient(v), None, m)

    grad, sums = jax.grad(value, has_aux=True)(v)
    # Exactly: every row has ratio 1 and no row is clipped.
    self.assertEqual((float(sums["ratio"]), float(sums["ratio_off"]), float(sums["clip_fraction"])), (1.0, 0.0, 0.0))
    size = m.x[0].size
    factor = (m.weight * m.advantage / (TABLE.std**2) * TABLE.v / size)[:, None, None, None]
    np.testing.assert_allclose(grad, -factor * (m.goal - average(m, v)), rtol=2e-4, atol=1e-8)

  def test_clipped_ratio(self):
    m, (v, v_old) = moments(), velocities(2)
    objective = losses.Objective(clip=0.05)
    value, sums = losses.loss(objective, v, v_old, None, m)
    ratio = np.exp(log_density(m, v) - log_density(m, v_old))
    per_row = np.maximum(-m.advantage * ratio, -m.advantage * np.clip(ratio, 0.95, 1.05))
    np.testing.assert_allclose(value, np.sum(m.weight * per_row), rtol=1e-4)
    np.testing.assert_allclose(sums["ratio"], np.sum(m.weight * ratio), rtol=1e-4)
    self.assertAlmostEqual(float(sums["clip_fraction"]), np.sum(m.weight[np.abs(ratio - 1) > 0.05]), places=5)

  def test_what_is_already_far_enough_gets_no_gradient(self):
    (v, v_old), objective = velocities(2), losses.Objective(clip=1e-4)
    ratio = np.exp(log_density(moments(), v) - log_density(moments(), v_old))
    m = moments(advantage=np.sign(ratio - 1))  # every row moved the way its advantage wants
    grad = jax.grad(lambda v: losses.loss(objective, v, v_old, None, m)[0])(v)
    self.assertEqual(np.count_nonzero(grad), 0)
    back = jax.grad(lambda v: losses.loss(objective, v, v_old, None, moments(-np.sign(ratio - 1)))[0])(v)
    self.assertEqual(np.count_nonzero(back), v.size)

  def test_guard_centres_and_scales_the_ratio(self):
    m, (v, v_old) = moments(weight=(1.0, 1.0, 1.0)), velocities(2)
    change = log_density(m, v) - log_density(m, v_old)
    bias = mean((average(m, v) - average(m, v_old)) ** 2) / (2 * TABLE.std**2)
    ratio = np.exp((change + bias) * TABLE.std)
    per_row = np.maximum(-m.advantage * ratio, -m.advantage * np.clip(ratio, 0.9, 1.1)) / -TABLE.dt
    value, _ = losses.loss(losses.Objective(name="grpo-guard", clip=0.1), v, v_old, None, m)
    np.testing.assert_allclose(value, per_row.sum(), rtol=1e-4)

  def test_guard_has_no_bias_under_the_old_weights(self):
    # x_next drawn by the old weights: the plain log ratio is negative on average, the guarded one is 0.
    row = jax.tree.map(lambda column: np.repeat(column[1:2], 4000), TABLE).to_device()
    rng = np.random.default_rng(0)
    before = np.zeros((4000, 1, 1, 4), np.float32)
    goal = np.float32(float(TABLE.v[1]) * before + TABLE.std[1] * rng.normal(size=before.shape))
    text = Text(np.zeros((4000, 1, 1), np.float32), np.ones((4000, 1), bool))
    m = losses.Moments(np.zeros_like(before), goal, text, np.ones(4000, np.float32), np.full(4000, 1 / 4000.0), row)
    after = before + np.float32(0.8)
    shift = (TABLE.v[1] * 0.8) ** 2 / (2 * TABLE.std[1] ** 2)
    drift = np.mean(
      stochastic.log_prob(goal, TABLE.v[1] * after, row) - stochastic.log_prob(goal, TABLE.v[1] * before, row)
    )
    np.testing.assert_allclose(drift, -shift, atol=0.2 * shift)
    guarded, _ = losses.loss(losses.Objective(name="grpo-guard", clip=0.999), after, before, None, m)
    np.testing.assert_allclose(-guarded * -TABLE.dt[1], 1.0, atol=0.01)

  @parameterized.parameters("x", "v")
  def test_divergence_from_the_reference(self, form):
    m, (v, v_ref) = moments(weight=(1.0, 1.0, 1.0)), velocities(2)
    objective = losses.Objective(kl=0.5, divergence=form)
    value, sums = losses.loss(objective, v, v, v_ref, m)
    distance = mean((v - v_ref) ** 2)
    # The mean of a step moves by its coefficient of v; Flow-GRPO measures that in g = std / sqrt(-dt).
    factor = 1 if form == "v" else TABLE.v**2 / (2 * TABLE.std**2 / -TABLE.dt)
    np.testing.assert_allclose(sums["kl"], np.sum(factor * distance), rtol=1e-4)
    np.testing.assert_allclose(value, -m.advantage.sum() + 0.5 * np.sum(factor * distance), rtol=1e-4)


class AnchorTest(parameterized.TestCase):
  @parameterized.parameters(
    losses.Objective(anchor=3.0), losses.Objective("grpo-guard", anchor=3.0), losses.Objective("nft", anchor=3.0)
  )
  def test_rows_of_the_anchor_ask_for_nothing_else(self, objective):
    m, (v, v_old, v_ref) = moments(weight=(0.5, 0.5, 0.0)), velocities(3)
    # The last row is a noised picture on its way to the data, with an advantage that it must not feel.
    tables = jax.tree.map(lambda a, b: jnp.append(a[:2], b[2:]), m.row, stochastic.to_data(m.row.t))
    m = dataclasses.replace(m, row=tables, hold=np.float32([0.0, 0.0, 0.25]))
    plain, before = losses.loss(dataclasses.replace(objective, anchor=0.0), v, v_old, None, m)
    value, sums = losses.loss(objective, v, v_old, v_ref, m)
    distance = 0.25 * mean((v - v_ref) ** 2)[2]
    np.testing.assert_allclose(sums["anchor"], distance, rtol=1e-5)
    np.testing.assert_allclose(value, plain + 3 * distance, rtol=1e-5)
    self.assertNotIn("kl", sums)
    self.assertEqual({name: sums[name] for name in before}, before)
    grad = jax.grad(lambda u: losses.loss(objective, u, v_old, v_ref, m)[0])(v)
    np.testing.assert_allclose(grad[2], 3 * 0.25 * 2 * (v - v_ref)[2] / v[2].size, rtol=1e-4)


class ContrastTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 0.3)
  def test_formula(self, b):
    m, (v, v_old) = moments(), velocities(2)
    t = TABLE.t[:, None, None, None]
    better = np.clip(0.5 + m.advantage / 10, 0, 1)

    def fit(velocity):
      off = m.x - t * velocity - m.goal
      return mean(off**2) / (mean(np.abs(off)) + 1e-5)

    plus, minus = fit((1 - b) * v_old + b * v), fit((1 + b) * v_old - b * v)
    expected = np.sum(m.weight * 5 * (better * plus + (1 - better) * minus) / b)
    value, _ = losses.loss(losses.Objective("nft", strength=b), v, v_old, None, m)
    np.testing.assert_allclose(value, expected, rtol=1e-4)

  def test_good_pictures_pull_and_bad_ones_push(self):
    (v,) = velocities(1)

    def along_target(advantage):
      """How much a small step down the gradient brings the guess nearer to the finished picture, per row."""
      m = moments(advantage=(advantage,) * ROWS)
      grad = jax.grad(lambda u: losses.loss(losses.Objective("nft"), u, v, None, m)[0])(v)
      t = TABLE.t[:, None, None, None]
      return mean(-grad * (-t) * -(m.x - t * v - m.goal))

    self.assertTrue(np.all(along_target(4.0) > 0))
    self.assertTrue(np.all(along_target(-4.0) < 0))
    np.testing.assert_allclose(along_target(0.0), 0.0, atol=1e-7)

  def test_objectives_are_static_arguments(self):
    self.assertEqual(hash(losses.Objective()), hash(dataclasses.replace(losses.Objective(kl=1.0), kl=0.0)))


class DtypeTest(absltest.TestCase):
  def test_a_bfloat16_velocity_is_read_in_float32(self):
    m, (v, v_old) = moments(), velocities(2)
    value, _ = losses.loss(losses.Objective(), jnp.bfloat16(v), jnp.bfloat16(v_old), None, m)
    self.assertEqual(value.dtype, jnp.float32)


if __name__ == "__main__":
  absltest.main()
