"""The greedy search: which blocks it takes, in which order, and what it reports on the way."""

import dataclasses
import math

from absl.testing import absltest, parameterized

from elasticdit_jax.elastic import standard_routes
from elasticdit_jax.models import dit
from elasticdit_jax.train import importance

_ROUTES = tuple(route for name, route in standard_routes(6).items() if name.startswith("max"))
_COST = {8: (9.0, 4.0, 0.5, 3.5, 1.0, 9.0), 16: (9.0, 2.0, 0.7, 3.5, 1.5, 9.0)}


@dataclasses.dataclass
class _Losses:
  """A validation whose loss is 1 plus the costs of what is skipped; 2 and 4 together cost 10 more."""

  cfg: dit.DiTConfig = dataclasses.field(default_factory=lambda: dit.DiTConfig(32, 6, 16))

  def loss(self, params, route, bypass=()):
    assert params == "weights"
    return 1.0 + sum(_COST[route.vae][i] for i in bypass) + 10.0 * ({2, 4} <= set(bypass))


class ImportanceTest(parameterized.TestCase):
  def test_takes_the_cheapest_block_given_those_already_taken(self):
    found = importance.analyse(_Losses(), "weights", _ROUTES, 3)
    # Alone, block 4 is the second cheapest; beside block 2 it is not.
    self.assertEqual(found.order, (2, 1, 3))
    self.assertEqual(found.skipped, (1, 2, 3))
    for got, expected in zip(found.curve, (1.6, 4.6, 8.1), strict=True):
      self.assertAlmostEqual(got, expected)
    self.assertEqual(found.base, 1.0)

  def test_single_losses_are_means_over_the_routes_and_protected_blocks_have_none(self):
    alone = importance.analyse(_Losses(), "weights", _ROUTES, 1).alone
    self.assertEqual([math.isnan(a) for a in alone], [True, False, False, False, False, True])
    for got, expected in zip(alone[1:5], (3.0, 0.6, 3.5, 1.25), strict=True):
      self.assertAlmostEqual(got, expected)
    self.assertAlmostEqual(importance.analyse(_Losses(), "weights", _ROUTES[:1], 1).alone[1], 4.0)

  @parameterized.parameters(0, 5, -1)
  def test_a_count_that_leaves_nothing_or_too_little_is_refused(self, count):
    with self.assertRaisesRegex(
      ValueError, rf"config.lite.skip: expected 1..4 blocks for a backbone of 6, got {count}"
    ):
      importance.analyse(_Losses(), "weights", _ROUTES, count)


if __name__ == "__main__":
  absltest.main()
