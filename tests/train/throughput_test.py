"""FLOPs of updates beside those of the forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
from absl.testing import absltest

from elasticdit_jax import elastic
from elasticdit_jax.evals.flops import count_flops
from elasticdit_jax.train import step, throughput
from elasticdit_jax.types import Text
from tests.evals import tiny_model
from tests.train import small


class ThroughputTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.model = tiny_model.make((8,))
    self.routes = elastic.standard_routes(self.model.cfg.depth, (1,))
    self.flow = step.FlowConfig(**small.FLOW)

  def _flops(self, cfg=None, batch_size=1):
    return throughput.StepFlops(cfg or self.model.cfg, self.flow, self.model.codecs, batch_size, 64, 1.0)

  def _forward(self, route):
    cfg = self.model.cfg
    text = Text(jnp.zeros((1, cfg.text_length, cfg.text_dim)), jnp.ones((1, cfg.text_length), bool))
    x = jnp.zeros((1, 8, 8, 16))
    return count_flops(lambda x: step.velocity(cfg, self.model.params, x, jnp.zeros(1), text, route), x)

  def test_the_backward_pass_is_two_forward_passes_and_the_teacher_one(self):
    route = self.routes["lite-f8"]
    encoder = count_flops(self.model.codecs[8].encode, jnp.zeros((1, 64, 64, 3)))
    forward, flops = self._forward(route), self._flops()
    alone = flops.of((route,), distilled=False)
    # No gradient goes to the latents and the text.
    self.assertBetween((alone - encoder) / forward, 2.8, 3.0)
    self.assertEqual(flops.of((route,), distilled=True) - alone, self._forward(self.routes["max-f8"]))

  def test_what_is_computed_again_does_not_count_and_images_do(self):
    group = (self.routes["lite-f8"],)
    again = self._flops(dataclasses.replace(self.model.cfg, remat="full"), batch_size=4)
    self.assertEqual(again.of(group, distilled=False), 4 * self._flops().of(group, distilled=False))

  def test_memory_is_known_and_the_peak_of_a_cpu_is_not(self):
    self.assertBetween(throughput.memory_gb(), 0.05, 1000)
    if jax.default_backend() == "cpu":
      self.assertIsNone(throughput.peak_flops())


if __name__ == "__main__":
  absltest.main()
