"""Rules on shapes, sizes of axes, who reads what; with devices that exist on paper only."""

import dataclasses
import math
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from elasticdit_jax.models import dit
from elasticdit_jax.train import optim, sharding, state
from tests.train import small


@dataclasses.dataclass(frozen=True)
class _Device:
  id: int
  process_index: int = 0
  slice_index: int = 0
  platform: str = "gpu"
  device_kind: str = "paper"


def _devices(count, processes=1, slices=1):
  return [_Device(i, i * processes // count, i * slices // count) for i in range(count)]


def _layout(count=8, processes=1, **axes):
  return sharding.make(_devices(count, processes), **axes)


class ShardingTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, (8, 1, 1)),
    ({"fsdp": 4}, (2, 4, 1)),
    ({"fsdp": -1, "tensor": 2}, (1, 4, 2)),
    ({"fsdp": 2, "tensor": -1}, (1, 2, 4)),
  )
  def test_data_takes_what_the_other_axes_leave(self, axes, sizes):
    self.assertEqual(_layout(**axes).mesh.devices.shape, sizes)

  @parameterized.parameters(
    ({"fsdp": 3}, "config.mesh: fsdp=3, tensor=1 do not divide the 8 devices"),
    ({"fsdp": 0}, "config.mesh.fsdp: expected a number of devices, or -1 .* got 0"),
    ({"fsdp": -1, "tensor": -1}, "config.mesh.fsdp: expected a number"),
    ({"fsdp": -1, "tensor": 3}, "config.mesh.fsdp: expected a number"),
    ({"slices": 3}, "slices: expected a divisor of the 8 devices"),
  )
  def test_sizes_that_do_not_fit_are_named(self, axes, message):
    with self.assertRaisesRegex(ValueError, message):
      _layout(**axes)

  def test_only_data_crosses_slices(self):
    layout = sharding.make(_devices(8, slices=2)[::-1], fsdp=2, tensor=2)
    self.assertEqual(layout.mesh.devices.shape, (2, 2, 2))
    self.assertEqual(layout.slices, 2)
    for part in layout.mesh.devices:
      self.assertLen({d.slice_index for d in part.flat}, 1)
    with self.assertRaisesRegex(ValueError, "do not divide the 4 devices of a slice"):
      sharding.make(_devices(8, slices=2), fsdp=8)

  def test_the_whole_state_of_size_b_is_split_by_the_rules(self):
    layout = _layout(fsdp=4, tensor=2)
    config = small.optimizer(learning_rate=1.0, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0)
    config.name = "muon"
    shapes = dit.init_shapes(dit.SIZES["B"])
    tx = optim.make(config, shapes, 1.0)
    whole = jax.eval_shape(lambda p: state.create(p, tx, 0, teacher=True), shapes)
    places = layout.of(whole)
    for tree in (places.params, places.ema, places.teacher, places.opt_state[1].inner_states["matrix"].inner_state.mu):
      block = tree["block_07"]
      self.assertEqual(block["attention"]["text"]["qkv"]["kernel"].spec, P("fsdp", "tensor"))
      self.assertEqual(block["image_mlp"]["up"]["kernel"].spec, P("fsdp", "tensor"))
      self.assertEqual(block["image_mlp"]["down"]["kernel"].spec, P("tensor", "fsdp"))
      self.assertEqual(block["text_out"]["kernel"].spec, P("tensor", "fsdp"))
    self.assertEqual(places.params["block_07"]["image_mlp"]["up"]["bias"].spec, P("tensor"))
    self.assertEqual(places.params["conditioning"]["time_in"]["kernel"].spec, P("fsdp"))
    self.assertEqual(places.params["refine"]["kernel"].spec, P())
    self.assertEqual(places.step.spec, P())
    leaves = list(zip(jax.tree.leaves(whole.params), jax.tree.leaves(places.params), strict=True))
    on_one = sum(math.prod(place.shard_shape(x.shape)) for x, place in leaves)
    self.assertLess(on_one, 1.05 * sum(x.size for x, _ in leaves) / 8)

  def test_what_does_not_divide_stays_whole_and_is_told(self):
    layout = _layout(8, fsdp=8)
    shapes = {"block_00": {"up": {"kernel": jax.ShapeDtypeStruct((12, 16), jnp.float32)}}}
    with self.assertLogs(level="INFO") as logs:
      places = layout.of(shapes)
    self.assertEqual(places["block_00"]["up"]["kernel"].spec, P(None, "tensor"))
    self.assertIn(r"1 arrays are not divided as their rule says, such as block_00/up/kernel (12, 16)", logs.output[0])

  def test_the_backbone_learns_the_names_of_its_axes(self):
    cfg = dit.SIZES["B"]
    bound = _layout(fsdp=2, tensor=2).bind(cfg)
    self.assertEqual((bound.batch_axes, bound.head_axes), (("data", "fsdp"), ("tensor",)))
    self.assertIsNone(_layout(tensor=8).bind(cfg).head_axes)  # 12 heads
    self.assertEqual(_layout(1).bind(cfg), cfg)

  def test_a_batch_must_cut_into_equal_parts(self):
    layout = _layout(fsdp=2, tensor=2)
    layout.check_batch(16, 4)
    with self.assertRaisesRegex(ValueError, r"config.data.batch_size: expected a multiple of 8 .*accumulate=2 x 4"):
      layout.check_batch(12, 2)

  @parameterized.parameters(
    ({"fsdp": 2}, [(0, 2), (1, 2)]),
    ({"tensor": 8}, [(0, 1), (0, 1)]),
    ({"tensor": 4}, [(0, 2), (1, 2)]),
    ({"slices": 2, "tensor": 2}, [(0, 2), (1, 2)]),
  )
  def test_processes_that_hold_the_same_rows_read_the_same(self, axes, expected):
    layout = _layout(8, processes=2, **axes)
    for index, want in enumerate(expected):
      with mock.patch.object(jax, "process_index", return_value=index):
        self.assertEqual(layout.share(), want)

  def test_processes_whose_rows_overlap_read_everything(self):
    layout = sharding.make([_Device(i, process_index=i // 3) for i in range(6)], tensor=2)
    self.assertEqual(layout.share(), (0, 1))

  def test_one_device_changes_nothing(self):
    layout = sharding.one_device()
    tree = {"x": jnp.ones(3)}
    self.assertTrue(layout.single)
    for same in (layout.replicate, layout.spread, layout.put_batch, layout.local):
      self.assertIs(same(tree), tree)
    self.assertIsNone(layout.results(tree))


if __name__ == "__main__":
  absltest.main()
