"""Step rules against flows known in closed form: Gaussian data, and velocities linear in time."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.flow import sampler

MEAN, STD = 0.7, 0.4
RULES = (("euler", sampler.euler), ("heun", sampler.heun), ("ab2", sampler.ab2))


def gaussian_velocity(x, t):
  """E[eps - x0 | x_t = x] for data N(MEAN, STD^2); its flow maps noise z to MEAN + STD z exactly."""
  t = t.reshape(-1, *([1] * (x.ndim - 1)))
  variance = (1 - t) ** 2 * STD**2 + t**2
  return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def worst_error(step, steps, shift=1.0):
  noise = jnp.linspace(-2.0, 2.0, 9)[:, None]
  x = sampler.sample(gaussian_velocity, noise, sampler.times(steps, shift), step=step)
  return float(jnp.max(jnp.abs(x - (MEAN + STD * noise))))


class SamplerTest(parameterized.TestCase):
  def test_times(self):
    np.testing.assert_allclose(sampler.times(4), [1, 0.75, 0.5, 0.25, 0])
    shifted = sampler.times(10, 3.0)
    self.assertEqual((shifted[0], shifted[-1], shifted.dtype), (1.0, 0.0, np.float32))
    self.assertTrue(np.all(np.diff(shifted) < 0))
    self.assertAlmostEqual(shifted[5], 0.75, places=6)
    with self.assertRaisesRegex(ValueError, "steps: expected at least 1, got 0"):
      sampler.times(0)
    with self.assertRaisesRegex(ValueError, "shift"):
      sampler.times(4, 0.0)

  @parameterized.named_parameters(
    ("euler", sampler.euler, 1, 0.02), ("heun", sampler.heun, 2, 1e-4), ("ab2", sampler.ab2, 2, 3e-4)
  )
  def test_order_of_convergence_on_gaussian_data(self, step, order, largest):
    coarse, fine = worst_error(step, 40), worst_error(step, 80)
    self.assertBetween(np.log2(coarse / fine), order - 0.1, order + 0.1)
    self.assertLess(fine, largest)

  @parameterized.named_parameters(
    ("euler", sampler.euler, 0.07), ("heun", sampler.heun, 3e-4), ("ab2", sampler.ab2, 4e-3)
  )
  def test_unequal_steps_keep_the_accuracy(self, step, largest):
    self.assertLess(worst_error(step, 40, shift=3.0), largest)

  @parameterized.named_parameters(*RULES)
  def test_straight_flow_is_exact_in_one_step(self, step):
    x0, noise = jnp.full((2, 3), 5.0), jax.random.normal(jax.random.key(0), (2, 3))
    x = sampler.sample(lambda x, t: noise - x0, noise, sampler.times(1), step=step)
    np.testing.assert_allclose(x, x0, rtol=1e-6)

  def test_second_order_is_exact_where_velocity_is_linear_in_time(self):
    noise = jnp.ones((1, 4))

    def linear(x, t):
      return jnp.broadcast_to(2 * t[:, None], x.shape)

    for steps in (1, 5):
      x = sampler.sample(linear, noise, sampler.times(steps, 2.0), step=sampler.heun)
      np.testing.assert_allclose(x, noise - 1.0, atol=1e-6)
    # ab2 starts with one Euler step; afterwards it is exact as well, on unequal steps too.
    t = np.array([1.0, 0.9, 0.5, 0.3, 0.0])
    x = sampler.sample(linear, noise, t, step=sampler.ab2)
    np.testing.assert_allclose(x, noise - 1.0 - 0.1**2, atol=1e-6)

  @parameterized.named_parameters(*RULES)
  def test_evaluations_per_step(self, step):
    times_seen = []

    def velocity(x, t):
      jax.debug.callback(lambda s: times_seen.append(float(s)), t[0])
      return -x

    sampler.sample(velocity, jnp.ones((2, 1)), sampler.times(3), step=step)
    jax.effects_barrier()
    self.assertLen(times_seen, 3 * step.evaluations)

  def test_velocity_sees_a_batch_of_times_and_dtype_is_kept(self):
    def velocity(x, t):
      self.assertEqual((t.shape, t.dtype), ((2,), jnp.float32))
      return x.astype(jnp.float32) * t[:, None]

    for step in (sampler.euler, sampler.heun, sampler.ab2):
      x = sampler.sample(velocity, jnp.ones((2, 3), jnp.bfloat16), sampler.times(4), step=step)
      self.assertEqual((x.shape, x.dtype), ((2, 3), jnp.bfloat16))

  def test_times_are_data_under_jit(self):
    traces = []

    @jax.jit
    def run(noise, times):
      traces.append(1)
      return sampler.sample(gaussian_velocity, noise, times)

    noise = jnp.ones((1, 2))
    a, b = run(noise, sampler.times(8)), run(noise, sampler.times(8, 3.0))
    self.assertLen(traces, 1)
    self.assertFalse(np.allclose(a, b))

  def test_each_step_gets_its_own_key(self):
    def advance(velocity_fn, x, t, t_next, key, memory):
      return x + jax.random.normal(key, x.shape), memory

    noisy = sampler.Step(lambda x: (), advance, 0)
    noise = jnp.zeros((1, 1000))
    one = sampler.sample(lambda x, t: x, noise, sampler.times(4), step=noisy, key=jax.random.key(3))
    again = sampler.sample(lambda x, t: x, noise, sampler.times(4), step=noisy, key=jax.random.key(3))
    np.testing.assert_array_equal(one, again)
    # Four independent draws add up to variance 4; one key used four times would give 16.
    np.testing.assert_allclose(jnp.var(one), 4.0, rtol=0.2)

  @parameterized.named_parameters(*RULES)
  def test_trajectory_starts_at_the_noise_and_ends_like_sample(self, step):
    noise, times = jnp.linspace(-2.0, 2.0, 9)[:, None], sampler.times(5, 2.0)
    way, velocities = sampler.trajectory(gaussian_velocity, noise, times, step=step)
    self.assertEqual(way.shape, (6, 9, 1))
    np.testing.assert_array_equal(way[0], noise)
    np.testing.assert_allclose(way[-1], sampler.sample(gaussian_velocity, noise, times, step=step), rtol=1e-6)
    np.testing.assert_allclose(
      way[2], sampler.sample(gaussian_velocity, noise, times[:3], step=step), rtol=1e-6, atol=1e-6
    )
    for number, t in enumerate(times[:-1]):
      expected = gaussian_velocity(way[number], jnp.full(9, t))
      np.testing.assert_allclose(velocities[number], expected, rtol=1e-6, atol=1e-6)

  def test_bad_times(self):
    with self.assertRaisesRegex(ValueError, r"times: expected shape \[steps \+ 1\]"):
      sampler.sample(lambda x, t: x, jnp.ones((1, 2)), jnp.ones(1))


if __name__ == "__main__":
  absltest.main()
