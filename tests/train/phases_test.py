"""The phase table: parsing, turns, and which step belongs to whom."""

from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from elasticdit_jax import elastic
from elasticdit_jax.train import phases


def table(init=2, warmup=4, specialise=3, recover=2, coarse=0):
  routes = {
    "coarse": "max-f16",
    "init": "max-f8,max-f16",
    "warmup": "max-f8+lite-f8,max-f16+lite-f16",
    "specialise": "lite-f8,lite-f16",
    "recover": "max-f8+lite-f8",
  }
  steps = {"coarse": coarse, "init": init, "warmup": warmup, "specialise": specialise, "recover": recover}
  return phases.make_table(ConfigDict({n: {"steps": steps[n], "routes": routes[n]} for n in phases.NAMES}))


class PhasesTest(parameterized.TestCase):
  def test_phases_follow_each_other(self):
    self.assertEqual([(p.start, p.stop) for p in table()], [(0, 2), (2, 6), (6, 9), (9, 11)])
    self.assertEqual([p.label for p in table()], ["1-init", "2-warmup", "3-specialise", "4-recover"])

  def test_phase_without_steps_is_left_out_and_labels_stay(self):
    rows = table(init=0)
    self.assertEqual([p.label for p in rows], ["2-warmup", "3-specialise", "4-recover"])
    self.assertEqual(rows[0].start, 0)
    self.assertEqual([(p.label, p.start) for p in table(coarse=5)[:2]], [("0-coarse", 0), ("1-init", 5)])

  @parameterized.parameters((0, "init"), (1, "init"), (2, "warmup"), (8, "specialise"), (9, "recover"), (11, "recover"))
  def test_phase_at(self, step, name):
    self.assertEqual(phases.phase_at(table(), step).name, name)

  def test_groups_take_turns_from_the_start_of_the_phase(self):
    routes = elastic.standard_routes(6, (2,))
    warmup = table()[1]
    turns = [tuple(r.name for r in warmup.group_at(n, routes, {})) for n in range(2, 5)]
    self.assertEqual(turns, [("max-f8", "lite-f8"), ("max-f16", "lite-f16"), ("max-f8", "lite-f8")])
    self.assertEqual([r.name for r in table()[2].trained(routes, {})], ["lite-f8", "lite-f16"])

  @parameterized.parameters((8, 2, 3), (8, 1, 6), (8, 6, 1), (30, 6, 5), (24, 5, 5), (16, 3, 5))
  def test_shallow_routes_leave_out_every_inner_block_in_turn(self, depth, skip, sets):
    families = phases.shallow_routes(depth, skip)
    self.assertEqual(list(families), ["drop-f8", "drop-f16"])
    for vae, family in zip((8, 16), families.values(), strict=True):
      self.assertEqual({(len(r.active), r.vae) for r in family}, {(depth - skip, vae)})
      self.assertLen(set(family), sets)
      missing = [i for r in family for i in range(depth) if i not in r.active]
      self.assertEqual(set(missing), set(range(1, depth - 1)))
      if (depth - 2) % skip == 0:
        self.assertLen(missing, depth - 2)

  def test_members_of_a_family_take_turns_and_all_are_trained(self):
    row = phases.Phase("init", 3, 99, (("max-f8",), ("drop-f8", "max-f16")))
    routes, families = elastic.standard_routes(8), phases.shallow_routes(8, 2)
    drawn = [row.group_at(n, routes, families) for n in range(3, 11)]
    self.assertEqual(set(drawn[::2]), {(routes["max-f8"],)})
    self.assertEqual([group[0] for group in drawn[1::2]], [*families["drop-f8"], families["drop-f8"][0]])
    self.assertEqual({group[1] for group in drawn[1::2]}, {routes["max-f16"]})
    self.assertEqual(row.trained(routes, families), (routes["max-f8"], *families["drop-f8"], routes["max-f16"]))

  def test_families_end_with_the_importance_analysis(self):
    families = phases.shallow_routes(8, 2)
    phases.check_families(
      [phases.Phase("init", 0, 9, (("drop-f8",),)), phases.Phase("warmup", 9, 12, (("max-f8",),))], families
    )
    with self.assertRaisesRegex(ValueError, r"config.phases.specialise.routes: drop-f16 belongs to .*; name lite-f16"):
      phases.check_families([phases.Phase("specialise", 0, 9, (("lite-f8",), ("drop-f16",)))], families)

  @parameterized.parameters("", "max-f8,", "max-f8+", "max-f8+max-f8")
  def test_bad_groups_name_the_field(self, text):
    with self.assertRaisesRegex(ValueError, "config.phases.init.routes"):
      phases.parse_groups(text, "config.phases.init.routes")

  def test_bad_steps(self):
    with self.assertRaisesRegex(ValueError, "config.phases.warmup.steps: expected 0 or more, got -1"):
      table(warmup=-1)
    with self.assertRaisesRegex(ValueError, "no phase has steps"):
      table(0, 0, 0, 0)


if __name__ == "__main__":
  absltest.main()
