"""Every checked field exists in a config, the configs pass, and a value outside its range is named."""

from absl.testing import absltest, parameterized

from configs import pretrain, uwco, vae
from elasticdit_jax.train import ranges

_CONFIGS = (
  uwco.get_config(),
  uwco.get_config("paper"),
  pretrain.get_config(),
  vae.get_config("factor=8"),
  vae.get_config("stages=two"),
)


def _changed(config, field, value):
  section, _, name = field.rpartition(".")
  changed = config.copy_and_resolve_references().unlock()
  _section(changed, section)[name] = value
  return changed


def _section(config, name):
  return config.get(name, {}) if name else config


class RangesTest(parameterized.TestCase):
  def test_the_configs_pass(self):
    for config in _CONFIGS:
      ranges.check_ranges(config)

  def test_every_field_is_one_of_a_config(self):
    known = {
      f"{section}.{name}" for c in _CONFIGS for section in c if hasattr(c[section], "keys") for name in c[section]
    }
    self.assertEmpty(set(ranges._RANGES) - known - {"seed"})

  @parameterized.parameters(sorted(ranges._RANGES))
  def test_a_value_outside_is_named(self, field):
    section, _, name = field.rpartition(".")
    config = next(c for c in _CONFIGS if name in _section(c, section))
    value = float("nan") if isinstance(_section(config, section)[name], float) else -1
    with self.assertRaisesRegex(ValueError, rf"^config\.{field}: expected .*, got {value!r}$"):
      ranges.check_ranges(_changed(config, field, value))

  @parameterized.parameters(
    ("seed", 2**32),
    ("data.size", 16385),
    ("data.caption_dropout", 1.5),
    ("report.guidance", -0.5),
    ("flow.std", 0.0),
    ("flow.shift", 0.0),
    ("report.pictures", 0),
    ("report.steps", 0),
    ("train.ema_decay", 1.0),
    ("train.keep", 0),
    ("train.log_every", 0),
    ("train.validation_batches", 0),
  )
  def test_the_first_value_outside(self, field, value):
    with self.assertRaisesRegex(ValueError, field):
      ranges.check_ranges(_changed(_CONFIGS[0], field, value))

  @parameterized.parameters(("report.per_task", 0), ("data.caption_dropout", 1.0), ("train.distill", 0.0))
  def test_the_last_value_inside(self, field, value):
    ranges.check_ranges(_changed(_CONFIGS[0], field, value))


if __name__ == "__main__":
  absltest.main()
