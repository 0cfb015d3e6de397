"""Noisy step rules against a flow known in closed form, scipy's normal distribution and the published schedule."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from elasticdit_jax.flow import path, sampler, stochastic

MEAN, STD = 0.5, 0.3

# Stable Diffusion 3.5 in ten steps at shift 3, noise level 0.7: t, noise std, coefficient of x, of v, and the factor
# between mean((v - v_ref)^2) and the divergence.
GOLDEN = """
1.0000 .7000 .7550 -.0399 .00006
.9601  .7430 .7125 -.0582 .00014
.9133  .5362 .8426 -.0693 .00046
.8577  .4459 .8841 -.0838 .00119
.7904  .3918 .9029 -.1034 .00290
.7073  .3528 .9120 -.1309 .00723
.6022  .3191 .9155 -.1709 .01969
.4649  .2820 .9145 -.2326 .06355
.2780  .2254 .9087 -.3351 .29744
"""


def published_times():
  """The schedule of that model: its range is shifted once, the points in it once more."""
  grid = np.linspace(1.0, 3 * 1e-3 / (1 + 2e-3), 10)
  return np.append(3 * grid / (1 + 2 * grid), 0.0)


def gaussian_velocity(x, t):
  """E[eps - x0 | x_t = x] for data N(MEAN, STD^2)."""
  t = t.reshape(-1, *([1] * (x.ndim - 1)))
  variance = (1 - t) ** 2 * STD**2 + t**2
  return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def draw(rule, level, steps, rows=10_000):
  times = sampler.times(steps, 3.0)
  key, noise = jax.random.split(jax.random.key(1))
  table = stochastic.RULES[rule](times, level)
  x = sampler.sample(
    gaussian_velocity, jax.random.normal(noise, (rows, 1)), times, step=stochastic.step(table), key=key
  )
  return float(x.mean()), float(x.std())


class StochasticTest(parameterized.TestCase):
  def test_golden_table(self):
    table = stochastic.sde(published_times(), 0.7)
    expected = np.array([line.split() for line in GOLDEN.split("\n") if line], float)
    found = np.stack([table.t, table.std, table.x, table.v, table.v**2 / (2 * table.kl_std**2)], axis=1)
    np.testing.assert_allclose(found[:9, :4], expected[:, :4], atol=6e-5)
    np.testing.assert_allclose(found[:9, 4], expected[:, 4], atol=6e-6)
    self.assertEqual((table.x[9], table.v[9], table.std[9]), (1.0, table.dt[9], 0.0))
    self.assertEqual(table.x.dtype, np.float64)
    # In closed form: one number for v at every step but the first.
    np.testing.assert_allclose(table.v[1:9] / table.dt[1:9], 1 + 0.7**2 / 2)

  @parameterized.parameters(("sde", 0.7, 0.01), ("constant", 0.3, 0.01), ("sde", 1.2, 0.01))
  def test_many_steps_keep_the_marginals_of_the_flow(self, rule, level, tolerance):
    found = draw(rule, level, 400)
    np.testing.assert_allclose(found, (MEAN, STD), atol=tolerance)

  def test_cps_is_narrower_than_the_data_as_its_formula_says(self):
    # 1000 steps give .240 for data of standard deviation .300: it is a rule for few steps.
    mean, std = draw("cps", 0.8, 1000)
    np.testing.assert_allclose((mean, std), (MEAN, 0.24), atol=0.01)

  def test_cps_holds_signal_and_noise_of_the_next_time(self):
    times = sampler.times(6, 3.0)
    table, t, t_next = stochastic.cps(times, 0.8), times[:-2], times[1:-1]
    x0, eps = 1.7, -0.6
    mean = table.x[:-1] * ((1 - t) * x0 + t * eps) + table.v[:-1] * (eps - x0)
    np.testing.assert_allclose(mean, (1 - t_next) * x0 + np.sqrt(t_next**2 - table.std[:-1] ** 2) * eps, rtol=1e-5)

  @parameterized.parameters("sde", "constant", "cps")
  def test_without_noise_it_is_the_ode(self, rule):
    times = sampler.times(8, 3.0)
    noise = jax.random.normal(jax.random.key(0), (5, 3))
    step = stochastic.step(stochastic.RULES[rule](times, 0.0))
    found = sampler.sample(gaussian_velocity, noise, times, step=step, key=jax.random.key(1))
    np.testing.assert_allclose(found, sampler.sample(gaussian_velocity, noise, times), rtol=1e-5, atol=1e-6)

  @parameterized.parameters("sde", "constant")
  def test_log_prob_is_the_mean_log_density(self, rule):
    table = stochastic.RULES[rule](sampler.times(5, 2.0), 0.5)
    rng = np.random.default_rng(0)
    x, v, x_next = rng.normal(size=(3, 4, 2, 3)).astype(np.float32)
    for row in range(4):
      at = jax.tree.map(lambda column, row=row: column[row], table)
      expected = stats.norm(at.x * x + at.v * v, at.std).logpdf(x_next).mean(axis=(1, 2))
      np.testing.assert_allclose(stochastic.log_prob(x_next, stochastic.mean(x, v, at), at), expected, rtol=2e-5)
    rows = jax.tree.map(lambda column: column[np.array([2, 0, 1, 3])], table)
    mixed = stochastic.log_prob(x_next, stochastic.mean(x, v, rows), rows)
    at = jax.tree.map(lambda column: column[1], table)
    np.testing.assert_allclose(mixed[2], stochastic.log_prob(x_next, stochastic.mean(x, v, at), at)[2], rtol=1e-6)

  def test_log_prob_of_cps_has_no_constants(self):
    at = jax.tree.map(lambda column: column[1], stochastic.cps(sampler.times(5), 0.8))
    np.testing.assert_allclose(stochastic.log_prob(jnp.ones((2, 3)), jnp.full((2, 3), 3.0), at), [-4.0, -4.0])

  def test_divergence_is_that_of_two_normals_without_dt(self):
    table = stochastic.sde(sampler.times(5, 2.0), 0.5)
    at = jax.tree.map(lambda column: column[2], table)
    a, b = np.float32([[0.1, 0.2]]), np.float32([[0.3, -0.2]])
    true = np.mean((a - b) ** 2) / (2 * at.std**2)
    np.testing.assert_allclose(stochastic.divergence(a, b, at), true * -at.dt, rtol=1e-6)

  def test_the_step_to_the_data_is_the_guess(self):
    x, v = np.random.default_rng(3).normal(size=(2, 4, 2, 2, 3)).astype(np.float32)
    t = jnp.float32([0.0, 0.2, 0.7, 1.0])
    row = stochastic.to_data(t)
    np.testing.assert_allclose(stochastic.mean(x, v, row), path.predict_x0(x, v, t), rtol=1e-6)
    np.testing.assert_allclose(row.t + row.dt, 0)
    self.assertFalse(row.noisy.any())

  def test_window(self):
    times = sampler.times(6, 3.0)
    table = stochastic.sde(times, 0.7)
    inside = stochastic.window(table, 1, 2)
    np.testing.assert_array_equal(inside.noisy, [False, True, True, False, False, False])
    for name in stochastic.Steps._fields:
      np.testing.assert_array_equal(getattr(inside, name)[1:3], getattr(table, name)[1:3])
      np.testing.assert_allclose(getattr(inside, name)[3:], getattr(stochastic.ode(times), name)[3:], rtol=1e-6)
    for first, size in ((-1, 2), (4, 2), (0, 6), (2, 0)):
      with self.assertRaisesRegex(ValueError, r"window: expected steps within 0\.\.4"):
        stochastic.window(table, first, size)

  def test_noise_stays_float32_under_a_bfloat16_model(self):
    times = sampler.times(4)
    path, velocities = sampler.trajectory(
      lambda x, t: x.astype(jnp.bfloat16),
      jnp.ones((2, 8)),
      times,
      step=stochastic.step(stochastic.sde(times, 0.7)),
      key=jax.random.key(0),
    )
    self.assertEqual((path.shape, path.dtype), ((5, 2, 8), jnp.float32))
    self.assertEqual((velocities.shape, velocities.dtype), ((4, 2, 8), jnp.float32))
    self.assertTrue(np.any(np.asarray(path[1]) != np.asarray(path[1].astype(jnp.bfloat16), np.float32)))

  @parameterized.parameters(
    (lambda: stochastic.sde(sampler.times(4), -0.1), "level: expected a finite amount"),
    (lambda: stochastic.cps(sampler.times(4), 1.5), r"level: cps takes a share of noise in \[0, 1\], got 1.5"),
    (lambda: stochastic.ode(np.array([0.0, 1.0])), "times: expected two or more numbers falling"),
  )
  def test_bad_arguments(self, call, message):
    with self.assertRaisesRegex(ValueError, message):
      call()


if __name__ == "__main__":
  absltest.main()
