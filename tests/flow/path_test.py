"""The path's closed forms: end points, inverses, the law of the training times."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.flow import path


class PathTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.x0 = rng.normal(size=(3, 4, 4, 2)).astype(np.float32)
    self.eps = rng.normal(size=self.x0.shape).astype(np.float32)

  def test_ends_of_the_path(self):
    np.testing.assert_array_equal(path.interpolate(self.x0, self.eps, jnp.zeros(3)), self.x0)
    np.testing.assert_array_equal(path.interpolate(self.x0, self.eps, jnp.ones(3)), self.eps)

  def test_every_row_has_its_own_time(self):
    t = jnp.array([0.0, 0.25, 1.0])
    x_t = path.interpolate(self.x0, self.eps, t)
    np.testing.assert_allclose(x_t[1], 0.75 * self.x0[1] + 0.25 * self.eps[1], rtol=1e-6)
    np.testing.assert_array_equal(x_t[2], self.eps[2])

  def test_target_is_the_derivative_of_the_path(self):
    t, dt = jnp.full(3, 0.5), jnp.full(3, 0.25)
    difference = path.interpolate(self.x0, self.eps, t + dt) - path.interpolate(self.x0, self.eps, t)
    np.testing.assert_allclose(difference / 0.25, path.target(self.x0, self.eps), rtol=1e-4, atol=1e-5)

  @parameterized.parameters(0.0, 0.3, 1.0)
  def test_predict_x0_inverts(self, t):
    x_t = path.interpolate(self.x0, self.eps, t)
    np.testing.assert_allclose(path.predict_x0(x_t, path.target(self.x0, self.eps), t), self.x0, atol=1e-6)

  def test_shift_keeps_the_ends_and_composes(self):
    t = jnp.linspace(0.0, 1.0, 11)
    shifted = path.shift_t(t, 3.0)
    np.testing.assert_allclose(shifted[jnp.array([0, 5, 10])], [0.0, 0.75, 1.0], atol=1e-7)
    self.assertTrue(bool(jnp.all(jnp.diff(shifted) > 0)))
    np.testing.assert_allclose(path.shift_t(shifted, 1 / 3.0), t, atol=1e-6)
    np.testing.assert_allclose(path.shift_t(path.shift_t(t, 2.0), 1.5), shifted, atol=1e-6)

  def test_shift_for_is_the_square_root_of_the_token_ratio(self):
    self.assertEqual(path.shift_for(4096, 1024), 2.0)
    self.assertEqual(path.shift_for(256, 1024, base_shift=3.0), 1.5)
    self.assertEqual(path.shift_for(1024, 1024, base_shift=3.0), 3.0)
    # Equation 23 in terms of signal-to-noise: the ratio (1 - t) / t falls by exactly the shift.
    t, s = 0.3, path.shift_for(4096, 1024)
    shifted = path.shift_t(t, s)
    self.assertAlmostEqual((1 - t) / t / s, (1 - shifted) / shifted, places=9)
    with self.assertRaisesRegex(ValueError, "base_shift > 0, got 0"):
      path.shift_for(16, 16, 0)
    with self.assertRaisesRegex(ValueError, "tokens and base_tokens >= 1, got 0 and 16"):
      path.shift_for(0, 16)

  @parameterized.parameters((0.0, 1.0, 1.0), (-0.5, 0.7, 1.0), (0.0, 1.0, 3.0))
  def test_logit_normal_times(self, mean, std, shift):
    t = path.sample_t(jax.random.key(1), (200_000,), mean=mean, std=std, shift=shift)
    self.assertEqual(t.dtype, jnp.float32)
    self.assertTrue(bool(jnp.all((t > 0) & (t < 1))))
    # The shift adds log(s) to the logit, so the law stays logit-normal.
    logit = jnp.log(t) - jnp.log1p(-t)
    np.testing.assert_allclose(jnp.mean(logit), mean + np.log(shift), atol=0.01)
    np.testing.assert_allclose(jnp.std(logit), std, rtol=0.01)

  def test_times_of_a_batch_are_stratified_and_each_has_the_full_law(self):
    keys = jax.random.split(jax.random.key(2), 4000)
    t = jax.vmap(lambda key: path.sample_t(key, (8,), shift=3.0))(keys)
    # One time in each eighth of the law, whatever the offset.
    edges = path.shift_t(jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.arange(1, 8) / 8)), 3.0)
    np.testing.assert_array_equal(jnp.sort(jnp.searchsorted(edges, t), axis=1), np.tile(np.arange(8), (4000, 1)))
    for row in range(8):
      logit = jnp.log(t[:, row]) - jnp.log1p(-t[:, row])
      np.testing.assert_allclose(jnp.mean(logit), np.log(3.0), atol=0.06)
      np.testing.assert_allclose(jnp.std(logit), 1.0, atol=0.05)

  def test_bins(self):
    np.testing.assert_allclose(path.bin_centers(4), [0.125, 0.375, 0.625, 0.875])
    t = jnp.array([0.0, 0.1, 0.5, 1.0])
    mean, count = path.mean_by_bin(jnp.array([1.0, 3.0, 5.0, 7.0]), t, 4)
    np.testing.assert_array_equal(count, [2, 0, 1, 1])
    np.testing.assert_array_equal(mean, [2.0, np.nan, 5.0, 7.0])
    _, ones = path.mean_by_bin(jnp.zeros(7), path.bin_centers(7), 7)
    np.testing.assert_array_equal(ones, np.ones(7))
    with self.assertRaisesRegex(ValueError, "num_bins"):
      path.bin_centers(0)


if __name__ == "__main__":
  absltest.main()
