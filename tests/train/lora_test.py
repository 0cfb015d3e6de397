"""Adapters: silent at first, exactly W + scale a b, on the matrices they are meant for."""

import jax
import numpy as np
from absl.testing import absltest

from elasticdit_jax.models import dit
from elasticdit_jax.train import lora
from tests.evals import tiny_model
from tests.train import small


def _paths(tree):
  return {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


class LoraTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.params = tiny_model.make(()).params
    cls.adapters = lora.init(cls.params, 4, jax.random.key(0))

  def test_new_adapters_change_nothing(self):
    small.same(self, lora.merge(self.params, self.adapters, 2.0), self.params)

  def test_merged_weights(self):
    adapters = jax.tree.map(lambda x: x + 0.5, self.adapters)
    merged = lora.merge(self.params, adapters, 0.25)
    self.assertEqual(_paths(merged), _paths(self.params))
    pair = adapters["block_01"]["image_mlp"]["up"]["kernel"]
    expected = self.params["block_01"]["image_mlp"]["up"]["kernel"] + 0.25 * np.asarray(pair["a"]) @ pair["b"]
    np.testing.assert_allclose(merged["block_01"]["image_mlp"]["up"]["kernel"], expected, rtol=1e-4, atol=1e-6)
    small.same(self, merged["modulation"], self.params["modulation"])

  def test_attention_and_mlp_of_both_streams_have_one(self):
    paths = _paths(self.adapters)
    every = {p.rsplit("/", 1)[0] for p in paths}
    per_block = ("attention/{}/qkv", "{}_out", "{}_mlp/up", "{}_mlp/down")
    wanted = {
      f"block_{i:02d}/{name.format(stream)}/kernel" for i in range(3) for name in per_block for stream in dit.STREAMS
    }
    # The text stream of the last block writes nothing that is read.
    self.assertContainsSubset(every, wanted)
    self.assertContainsSubset({p for p in wanted if "image" in p}, every)
    self.assertNotIn("modulation/kernel", every)

  def test_gradient_reaches_a_and_b(self):
    adapters = jax.tree.map(lambda x: x + 0.1, self.adapters)
    grads = jax.grad(lambda a: sum((x**2).sum() for x in jax.tree.leaves(lora.merge(self.params, a, 1.0))))(adapters)
    self.assertTrue(all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads)))

  def test_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, "lora: expected a rank of at least 1, got 0"):
      lora.init(self.params, 0, jax.random.key(0))
    with self.assertRaisesRegex(ValueError, "lora: no matrix of the backbone matches 'nothing'"):
      lora.init(self.params, 4, jax.random.key(0), "nothing")


if __name__ == "__main__":
  absltest.main()
