"""Reading, checking, taking out and putting in the checkpoints of a run."""

import contextlib
import glob
import io
import json
import os
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from elasticdit_jax import elastic
from elasticdit_jax.train import checkpoint, checkpoints

_ROUTES = elastic.standard_routes(3, (1,))
_CONFIG = {"task": "uwco", "seed": 3}


def _state(seed):
  key = jax.random.key(seed)
  params = {"block_00": {"kernel": jax.random.normal(key, (16, 64)), "bias": jnp.zeros(64)}, "half": jnp.ones(5)}
  ema = jax.tree.map(lambda x: x * 0.5, params)
  return {"step": jnp.int32(seed), "params": params, "opt_state": (jnp.full(7, 0.25),), "ema": ema, "key": key}


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(flagsaver.flagsaver())
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.run_dir, self.out = f"{self.folder}/run", f"{self.folder}/out"

  def _save(self, *steps, routes=_ROUTES):
    os.makedirs(self.run_dir)
    with open(f"{self.run_dir}/config.json", "w") as f:
      json.dump(_CONFIG, f)
    with checkpoint.Checkpointer(self.run_dir) as saver:
      for step in steps:
        meta = {"data_step": step, "phase": "warmup", "routes": elastic.routes_to_json(routes)}
        saver.save(step, _state(step), meta)

  def _command(self, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
      checkpoints._main(["checkpoints", *arguments])
    return out.getvalue()

  def _flip_a_bit(self, step):
    """In the largest file of a step: the data of its arrays."""
    files = [f for f in glob.glob(f"{self.run_dir}/checkpoints/{step}/state/**/*", recursive=True) if os.path.isfile(f)]
    with open(max(files, key=os.path.getsize), "r+b") as f:
      f.seek(os.path.getsize(f.name) // 2)
      byte = f.read(1)
      f.seek(-1, os.SEEK_CUR)
      f.write(bytes([byte[0] ^ 4]))

  def test_lists_steps_and_routes_of_a_run_in_training(self):
    self._save(4, 8)
    with checkpoint.Checkpointer(self.run_dir):  # holds the lock of a run
      os.makedirs(f"{self.run_dir}/checkpoints/12.orbax-checkpoint-tmp")
      lines = self._command("list", self.run_dir).splitlines()
    self.assertLen(lines, 3 + len(_ROUTES))
    self.assertRegex(lines[1], r"^ +4 \d{4}-\d\d-\d\d \d\d:\d\d:\d\d warmup +\d+\.\d +\d+ +1,093$")
    self.assertRegex(lines[2], "^ +8 ")
    self.assertIn("route lite-f16: f16, skips [1], drops no key blocks", lines)
    self.assertBetween(checkpoints.describe(self.run_dir).size, 4 * 2 * 1093, 10**6)

  def test_verify_finds_a_flipped_bit(self):
    self._save(4, 8)
    self.assertEqual(self._command("verify", self.run_dir).count("good, 9 arrays"), 2)
    self._flip_a_bit(4)
    with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaisesRegex(SystemExit, "1"):
      checkpoints._main(["checkpoints", "verify", self.run_dir])
    first, second = out.getvalue().splitlines()
    self.assertRegex(first, "4 DAMAGED: .*(params|ema|opt_state)")
    self.assertIn("good", second)

  def test_verify_finds_a_step_that_lost_its_description(self):
    self._save(4)
    os.remove(f"{self.run_dir}/checkpoints/4/_CHECKPOINT_METADATA")
    with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit):
      checkpoints._main(["checkpoints", "verify", self.run_dir])
    self.assertIn("step 4", out.getvalue())

  def test_export_is_plain_safetensors_of_the_average(self):
    self._save(4, 8)
    checkpoints.export_weights(self.run_dir, self.out, 4)
    got = safetensors.numpy.load_file(f"{self.out}/dit.safetensors")
    ema = _state(4)["ema"]
    self.assertCountEqual(got, ["block_00/kernel", "block_00/bias", "half"])
    np.testing.assert_array_equal(got["block_00/kernel"], ema["block_00"]["kernel"])
    self.assertEqual(elastic.load_routes(f"{self.out}/routes.json"), _ROUTES)

  def test_import_changes_weights_and_routes_and_nothing_else(self):
    self._save(8)
    self._command("export", self.run_dir, self.out)
    shutil.copytree(self.out, f"{self.folder}/edited")
    edited = {k: v + 1 for k, v in safetensors.numpy.load_file(f"{self.out}/dit.safetensors").items()}
    safetensors.numpy.save_file(edited, f"{self.folder}/edited/dit.safetensors")
    elastic.save_routes(f"{self.folder}/edited/routes.json", elastic.standard_routes(3))
    new = f"{self.folder}/new"
    self._command("import", f"{self.folder}/edited", self.run_dir, new)
    with checkpoint.Checkpointer(new) as saver:
      state, meta = saver.restore_latest(_state(0))
    want = _state(8)
    for part in ("params", "ema"):
      got = jax.tree.map(lambda got, ema: np.array_equal(got, ema + 1), state[part], want["ema"])
      self.assertTrue(all(jax.tree.leaves(got)), got)
    self.assertEqual(int(state["step"]), 8)
    np.testing.assert_array_equal(state["opt_state"][0], want["opt_state"][0])
    np.testing.assert_array_equal(jax.random.key_data(state["key"]), jax.random.key_data(want["key"]))
    self.assertEqual(meta["data_step"], 8)
    self.assertEqual(elastic.routes_from_json(meta["routes"]), elastic.standard_routes(3))
    with open(f"{new}/config.json") as f:
      self.assertEqual(json.load(f), _CONFIG)

  def test_damaged_steps_are_not_exported(self):
    self._save(4)
    self._flip_a_bit(4)
    with self.assertRaisesRegex(ValueError, "step 4"):
      # The bit may have hit another part of the state than the average.
      checkpoints.import_weights(self._exported_elsewhere(), self.run_dir, self.out)
    self.assertFalse(os.path.exists(self.out))

  def _exported_elsewhere(self):
    source = f"{self.folder}/source"
    os.makedirs(source)
    checkpoints.weights.save_tree(f"{source}/dit.safetensors", _state(1)["ema"])
    elastic.save_routes(f"{source}/routes.json", _ROUTES)
    return source

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, "no step in .*run/checkpoints; expected the workdir"):
      checkpoints.steps_of(self.run_dir)
    self._save(4)
    with self.assertRaisesRegex(ValueError, "step: expected one of 4 in .*, got 5"):
      checkpoints.describe(self.run_dir, 5)
    with self.assertRaisesRegex(ValueError, "exists and is not empty"):
      checkpoints.export_weights(self.run_dir, self.run_dir)
    source = self._exported_elsewhere()
    elastic.save_routes(f"{source}/routes.json", elastic.standard_routes(5))
    with self.assertRaisesRegex(ValueError, "is for 5 blocks, the run has 3"):
      checkpoints.import_weights(source, self.run_dir, self.out)
    checkpoints.weights.save_tree(f"{source}/dit.safetensors", {"half": np.ones(6, np.float32)})
    with self.assertRaisesRegex(ValueError, "3 of 3 tensors do not fit"):
      checkpoints.import_weights(source, self.run_dir, self.out)
    self.assertFalse(os.path.exists(self.out))

  def test_an_alignment_names_its_model_instead(self):
    os.makedirs(self.run_dir)
    with checkpoint.Checkpointer(self.run_dir) as saver:
      saver.save(4, _state(4), {"phase": "nft", "routes": elastic.routes_to_json(_ROUTES), "rewards": []})
    with self.assertRaisesRegex(ValueError, "run aligns a model; .*: give .*/run/best, .* to --config.init"):
      checkpoints.export_weights(self.run_dir, self.out)
    with self.assertRaisesRegex(ValueError, "run aligns a model"):
      checkpoints.import_weights(self._exported_elsewhere(), self.run_dir, self.out)
    self.assertFalse(os.path.exists(self.out))

  @parameterized.parameters((), ("list",), ("lsit", "x"), ("export", "x"))
  def test_wrong_usage_says_what_there_is(self, *arguments):
    with self.assertRaisesRegex(checkpoints.app.UsageError, "list RUN, verify RUN, export RUN DIR, import DIR RUN NEW"):
      self._command(*arguments)

  def test_errors_are_one_line(self):
    with self.assertRaisesRegex(SystemExit, "^error: [^\n]*$"):
      self._command("list", self.folder)


if __name__ == "__main__":
  absltest.main()
