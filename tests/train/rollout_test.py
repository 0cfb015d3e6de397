"""Rollouts on a few thousand parameters: the rows of the update are the steps that the sampler took."""

import dataclasses
import types

import jax
import numpy as np
from absl.testing import absltest, parameterized

from elasticdit_jax.flow import path, sampler, stochastic
from elasticdit_jax.train import losses, policy, rewards, rollout, sharding
from elasticdit_jax.train.prompts import Prompt
from elasticdit_jax.train.step import FlowConfig
from tests.evals import tiny_model

PLAN = rollout.Plan(group=2, steps=5, guidance=2.0, rule="sde", level=0.7, window=2, first=0, last=3, batch=4)
TEXTS = ("two circles", "a red square", "a big circle")


def setUpModule():
  jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time here


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def _red(images, prompts, metadata):
  """How red pictures are, and which prompts arrived."""
  del metadata
  return {"red": images[..., 0].mean((1, 2)), "words": [len(prompt) for prompt in prompts]}


def make(objective, plan=PLAN):
  """(model, sampler) along routes of 64 px."""
  model = tiny_model.make((16,))
  job = types.SimpleNamespace(
    cfg=model.cfg,
    codecs=model.codecs,
    encoder=model.encoder,
    flow=FlowConfig(0.0, 1.0, 3.0, 16),
    layout=sharding.one_device(),
    config=types.SimpleNamespace(data=types.SimpleNamespace(size=tiny_model.SIZE)),
  )
  reward = rewards.Reward({("red", "words"): _red}, {"red": 1.0, "words": 0.0})
  return model, rollout.Sampler(job, plan, objective, "group", reward)


class RolloutTest(parameterized.TestCase):
  @parameterized.parameters("grpo", "grpo-guard")
  def test_rows_are_the_steps_that_were_taken(self, name):
    model, drawing = make(losses.Objective(name))
    route, first = model.routes["max-f16"], 1
    prompts = [Prompt(text, "all", {}) for text in TEXTS]
    d = drawing.rollout(model.params, prompts, route, jax.random.key(0), first)
    count = len(TEXTS) * PLAN.group
    self.assertEqual((d.x.shape, d.images.shape), ((2 * count, 4, 4, 16), (count, 64, 64, 3)))
    times = sampler.times(5, FlowConfig(0.0, 1.0, 3.0, 16).shift_at(4))
    np.testing.assert_allclose(d.row.t, np.repeat(times[1:3], count), rtol=1e-6)
    # The end of the first step is the start of the second, picture by picture.
    np.testing.assert_array_equal(d.goal[:count], d.x[count:])
    # What the sampler added to the mean, as the update sees it, is standard normal noise.
    v = policy.velocities(
      model.params, d.x, d.row.t, d.text, drawing.null, drawing.scale, np.arange(2 * count), cfg=model.cfg, route=route
    )
    np.testing.assert_allclose(d.velocity, v, rtol=1e-3, atol=1e-4)
    noise = (np.asarray(d.goal) - stochastic.mean(d.x, v, d.row)) / np.asarray(d.row.std)[:, None, None, None]
    np.testing.assert_allclose(noise.mean((1, 2, 3)), 0, atol=0.3)
    np.testing.assert_allclose(noise.std((1, 2, 3)), 1, atol=0.2)
    np.testing.assert_allclose(np.corrcoef(noise.reshape(2 * count, -1)) - np.eye(2 * count), 0, atol=0.3)
    self._check_rewards(d)

  def _check_rewards(self, d):
    self.assertEqual([row.text for row in d.prompts], [text for text in TEXTS for _ in range(2)])
    np.testing.assert_allclose(d.rewards, d.images[..., 0].mean((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(d.scores["words"], [len(row.text) for row in d.prompts])
    np.testing.assert_array_equal(d.advantage, losses.advantages(d.rewards.reshape(3, 2)).reshape(-1))
    self.assertLen({image.tobytes() for image in d.images}, len(d.images))

  def test_rows_of_the_forward_process(self):
    plan = dataclasses.replace(PLAN, rule="ode", guidance=1.0)
    model, drawing = make(losses.Objective("nft", divergence="v"), plan)
    route = model.routes["lite-f16"]
    prompts = [Prompt(text, "all", {}) for text in TEXTS]
    d = drawing.rollout(model.params, prompts, route, jax.random.key(0), 0)
    self.assertIsNone(d.velocity)
    np.testing.assert_array_equal(d.goal[:6], d.goal[6:])
    t = np.asarray(d.row.t)[:, None, None, None]
    noise = (np.asarray(d.x) - (1 - t) * np.asarray(d.goal)) / t
    np.testing.assert_allclose(noise.std((1, 2, 3)), 1, atol=0.25)
    self.assertTrue(np.all((t > 0) & (t < 1)))
    # The finished latents are those of the plain sampler.
    images, _ = drawing.pictures(model.params, d.prompts, route, jax.random.key(0))
    np.testing.assert_array_equal(images, d.images)

  @parameterized.parameters("grpo", "nft")
  def test_rows_of_the_anchor_come_last_at_times_that_training_hardly_draws(self, name):
    plan = PLAN if name == "grpo" else dataclasses.replace(PLAN, rule="ode", guidance=1.0)
    model, plain = make(losses.Objective(name, divergence="v"), plan)
    _, drawing = make(losses.Objective(name, divergence="v", anchor=1.0), plan)
    prompts = [Prompt(text, "all", {}) for text in TEXTS * 40]
    way = model.params, prompts, model.routes["lite-f16"], jax.random.key(0), 1
    d, before = drawing.rollout(*way), plain.rollout(*way)
    pictures = len(d.prompts)
    self.assertEqual((len(d.x), len(before.x)), (3 * pictures, 2 * pictures))
    for found, same in zip(
      jax.tree.leaves((d.x, d.goal, d.row)), jax.tree.leaves((before.x, before.goal, before.row)), strict=True
    ):
      np.testing.assert_array_equal(found[: 2 * pictures], same)
    # Finished latents with as much noise as their time says.
    at = np.asarray(d.row.t)[:, None, None, None]
    noise = (np.asarray(d.x) - (1 - at) * np.asarray(d.goal)) / at
    goal, t = (np.asarray(a)[2 * pictures :] for a in (d.goal, d.row.t))
    clear = t > 0.02
    np.testing.assert_allclose(noise[2 * pictures :][clear].std(), 1, atol=0.02)
    # Even from 0 to two standard deviations below the middle: where 2 % of the times of training lie.
    drawn = path.sample_t(jax.random.key(0), (10_000,), shift=1.5)
    np.testing.assert_allclose(np.mean(drawn < t.max()), 0.023, atol=0.002)
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]) / t.max(), [0.25, 0.5, 0.75], atol=0.1)
    if name == "nft":
      np.testing.assert_array_equal(goal, d.goal[:pictures])
      first, own = (noise[start : start + pictures][clear].reshape(-1) for start in (0, 2 * pictures))
      self.assertLess(abs(np.corrcoef(first, own)[0, 1]), 0.05)  # noise of its own

  def test_windows_reach_every_place_and_no_other(self):
    plan = dataclasses.replace(PLAN, window=2, first=1, last=3)
    found = {plan.window_at(0, epoch) for epoch in range(40)}
    self.assertEqual(found, {1, 2})
    self.assertEqual(plan.window_at(7, 3), plan.window_at(7, 3))
    times = sampler.times(5, 2.0)
    np.testing.assert_array_equal(plan.table(times, 2).noisy, [False, False, True, True, False])


if __name__ == "__main__":
  absltest.main()
