"""Rows of an update: which picture meets which noise level."""

import jax
import numpy as np
from absl.testing import absltest
from scipy import special

from elasticdit_jax.flow import path
from elasticdit_jax.train import rows, sharding

MEAN, STD, SHIFT = 0.2, 1.3, 3.0


def _quantiles(seed: int, count: int = 64, times: int = 2) -> np.ndarray:
  """[times, count]: the part of the law below the time of each row."""
  ends = (jax.random.normal(jax.random.key(9), (count, 2, 2, 4)),)
  _, _, step = rows.renoised(ends, jax.random.key(seed), count, times, (MEAN, STD, SHIFT), sharding.one_device())
  plain = path.shift_t(np.asarray(step.t, np.float64), 1 / SHIFT)
  return special.ndtr((special.logit(plain) - MEAN) / STD).reshape(times, count)


class RenoisedTest(absltest.TestCase):
  def test_times_of_an_epoch_cover_the_law_and_those_of_a_picture_lie_apart(self):
    for times in (1, 2, 3):
      found = _quantiles(0, times=times)
      np.testing.assert_allclose(np.diff(np.sort(found.reshape(-1))), 1 / found.size, atol=1e-4)
      apart = np.diff(np.sort(found, axis=0), axis=0)
      np.testing.assert_allclose(apart, np.full_like(apart, 1 / times), atol=1e-4)

  def test_neighbours_of_one_prompt_and_task_do_not_get_neighbouring_times(self):
    first, second = _quantiles(0), _quantiles(1)
    for found in (first, second):
      for group in found[0].reshape(-1, 8):
        self.assertGreater(np.ptp(group), 0.25)
      self.assertLess(abs(np.corrcoef(np.arange(64), found[0])[0, 1]), 0.35)
    # Another epoch, another order.
    self.assertLess(np.mean(np.argsort(first[0]) == np.argsort(second[0])), 0.2)


if __name__ == "__main__":
  absltest.main()
