"""The launch scripts: lint, exit codes, and the commands they give, with stand-ins for the programs of a cloud."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

from tests.launch import cases

_SCRIPTS = sorted([*cases.LAUNCH.glob("*.sh"), *cases.LAUNCH.glob("*.sbatch")])
_TPU = {"PROJECT": "p", "ZONE": "z", "NAME": "job", "TYPE": "v5litepod-256", "BUCKET": "b", "POLL_SECONDS": "0"}


def _shellcheck():
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  return str(beside) if beside.exists() else shutil.which("shellcheck")


class _WithStandIns(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.stand_ins = cases.StandIns(self.enterContext(tempfile.TemporaryDirectory()))


class LintTest(absltest.TestCase):
  def test_scripts_are_executable_and_parse(self):
    for path in _SCRIPTS:
      self.assertTrue(os.access(path, os.X_OK), path)
      subprocess.run(["bash", "-n", str(path)], check=True)

  @absltest.skipUnless(_shellcheck(), 'needs shellcheck: pip install -e ".[test]"')
  def test_shellcheck(self):
    done = subprocess.run([_shellcheck(), *map(str, _SCRIPTS)], capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stdout)


class TrainTest(_WithStandIns):
  """launch/train.sh: exit codes, signals, environment."""

  def _train(self, body, **environment):
    self.stand_ins.add("python3", body)
    return self.stand_ins.start("train.sh", "--config=configs/uwco.py", "--workdir=/runs/a b", **environment)

  @parameterized.parameters(0, 1, 2, 134)
  def test_hands_on_arguments_and_exit_code(self, code):
    process = self._train(f"exit {code}")
    out, _ = process.communicate(timeout=30)
    self.assertEqual(process.returncode, code)
    self.assertRegex(out, rf"launch/train.sh on .*: exit code {code}\n")
    self.assertEqual(
      self.stand_ins.calls("python3"),
      [["-m", "elasticdit_jax.main", "--config=configs/uwco.py", "--workdir=/runs/a b"]],
    )

  @parameterized.parameters((0, 75), (2, 2), (1, 1))
  def test_a_stopped_run_is_not_a_finished_one(self, code, expected):
    """The signal reaches the training process, which takes its time, saves and leaves with 0."""
    process = self._train(f"trap 'sleep 0.3; echo saved; exit {code}' TERM; echo ready; while :; do sleep 0.05; done")
    self.assertEqual(process.stdout.readline(), "ready\n")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    self.assertIn("saved", out)
    self.assertEqual(process.returncode, expected)

  def test_a_run_killed_by_the_signal_is_not_a_finished_one(self):
    process = self._train("echo ready; exec sleep 30")
    self.assertEqual(process.stdout.readline(), "ready\n")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    self.assertEqual(process.returncode, 75)

  def test_the_cache_goes_where_it_is_asked_to(self):
    process = self._train("echo cache=$JAX_COMPILATION_CACHE_DIR", ELASTICDIT_CACHE="/runs/cache")
    self.assertIn("cache=/runs/cache\n", process.communicate(timeout=30)[0])


class TpuVmTest(_WithStandIns):
  """launch/tpu_vm.sh against a gcloud that remembers one queued resource."""

  def setUp(self):
    super().setUp()
    # The state of the resource is a file; what the hosts print is the variable RUN, one line per start.
    self.stand_ins.add(
      "gcloud",
      """state=$HOME/state
case $* in
  *"queued-resources create"*) echo ACTIVE >"$state" ;;
  *"queued-resources delete"*) rm -f "$state" ;;
  *describe*) cat "$state" ;;
  *"tpu-vm ssh"*launch/train.sh*)
    exec 9>"$HOME/lock"; flock 9
    line=$(head -n 1 "$HOME/runs"); sed -i 1d "$HOME/runs"
    case $line in
      preempted) echo SUSPENDED >"$state"; exit 255 ;;
      *) echo "launch/train.sh on host: exit code $line"; exit "$line" ;;
    esac ;;
esac""",
    )

  def _lines(self, *words):
    """The calls of gcloud that hold all these words, without the flags that all have."""
    calls = [" ".join(call) for call in self.stand_ins.calls("gcloud")]
    return [call for call in calls if all(word in call for word in words)]

  def _keep(self, *outcomes, **environment):
    home = pathlib.Path(self.stand_ins.environment()["HOME"])
    (home / "runs").write_text("".join(f"{o}\n" for o in outcomes))
    return self.stand_ins.run("tpu_vm.sh", "keep", "--config=configs/uwco.py:paper", **{**_TPU, **environment})

  def test_create_asks_for_one_slice_of_spot_capacity(self):
    self.stand_ins.run("tpu_vm.sh", "create", **_TPU)
    (call,) = self.stand_ins.calls("gcloud")
    self.assertEqual(call[:5], ["compute", "tpus", "queued-resources", "create", "job"])
    self.assertContainsSubset(
      {"--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=job", "--spot"}, call
    )

  def test_create_asks_for_several_slices_on_demand(self):
    self.stand_ins.run("tpu_vm.sh", "create", **_TPU, SLICES="2", SPOT="0")
    (call,) = self.stand_ins.calls("gcloud")
    self.assertContainsSubset({"--node-count=2", "--node-prefix=job"}, call)
    self.assertNoCommonElements({"--spot", "--node-id=job"}, call)

  def test_keep_goes_on_after_a_preemption_and_deletes_at_the_end(self):
    done = self._keep("preempted", "75", "0")
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertLen(self._lines("queued-resources create"), 2)  # a preempted slice does not come back
    self.assertLen(self._lines("tpu-vm ssh job --worker=all", "launch/train.sh --config=configs/uwco.py:paper"), 3)
    self.assertLen(self._lines("tpu-vm scp", "--worker=all"), 3)
    self.assertIn("queued-resources delete job --force", self._lines("queued-resources")[-1])

  def test_keep_stops_where_a_restart_cannot_help(self):
    done = self._keep("2", "0")
    self.assertEqual(done.returncode, 2)
    self.assertLen(self._lines("launch/train.sh --config"), 1)

  def test_all_slices_must_finish(self):
    done = self._keep("0", "75", "0", "0", SLICES="2")
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertLen(self._lines("tpu-vm ssh job-0", "launch/train.sh --config"), 2)
    self.assertLen(self._lines("tpu-vm ssh job-1", "launch/train.sh --config"), 2)

  @parameterized.parameters("PROJECT", "TYPE", "BUCKET")
  def test_names_the_variable_that_is_missing(self, name):
    done = self.stand_ins.run("tpu_vm.sh", "keep", **{k: v for k, v in _TPU.items() if k != name})
    self.assertEqual((done.returncode, self.stand_ins.calls("gcloud")), (2, []))
    self.assertIn(f"set {name}", done.stderr)

  def test_without_a_command_it_shows_all(self):
    done = self.stand_ins.run("tpu_vm.sh", **_TPU)
    self.assertEqual(done.returncode, 2)
    for name in ("create", "setup", "run", "keep", "stop", "delete"):
      self.assertIn(f"launch/tpu_vm.sh {name}", done.stderr)


class OtherLaunchersTest(_WithStandIns):
  @parameterized.parameters((0, 0, 0), (2, 2, 0), (75, 75, 1), (143, 143, 1))
  def test_slurm_queues_again_unless_finished_or_wrong(self, code, expected, requeued):
    self.stand_ins.add("srun", f"exit {code}")
    self.stand_ins.add("scontrol")
    folder = self.stand_ins.environment()["HOME"]
    done = self.stand_ins.run("slurm.sbatch", "--workdir=/shared/x", SLURM_SUBMIT_DIR=folder, SLURM_JOB_ID="7")
    self.assertEqual(done.returncode, expected)
    self.assertEqual(self.stand_ins.calls("scontrol"), [["requeue", "7"]] * requeued)
    self.assertEqual(self.stand_ins.calls("srun")[0][-3:], ["bash", "launch/train.sh", "--workdir=/shared/x"])

  def test_xpk_hands_the_command_on(self):
    self.stand_ins.add("xpk")
    cluster = {"CLUSTER": "c", "IMAGE": "i"} | {k: _TPU[k] for k in ("PROJECT", "ZONE", "NAME", "TYPE")}
    self.stand_ins.run("xpk.sh", "--workdir=/runs/a b", **cluster, SLICES="2", EXTRA="--dry-run")
    (call,) = self.stand_ins.calls("xpk")
    self.assertEqual(call[:2], ["workload", "create"])
    self.assertContainsSubset(
      {
        "--num-slices=2",
        "--tpu-type=v5litepod-256",
        "--command=/app/launch/train.sh --workdir=/runs/a\\ b",
        "--dry-run",
      },
      call,
    )

  def test_the_image_copies_files_that_exist_and_are_sent(self):
    root = cases.LAUNCH.parent
    text = (cases.LAUNCH / "Dockerfile").read_text()
    copied = {name for line in re.findall("(?m)^COPY (.*)$", text) for name in line.split()[:-1]}
    sent = set(re.findall("(?m)^!(.*)$", (root / ".dockerignore").read_text()))
    self.assertEqual({name.removeprefix("./") for name in copied}, sent)
    for name in copied:
      self.assertTrue((root / name).exists(), name)
    self.assertIn('ENTRYPOINT ["/app/launch/train.sh"]', text)


if __name__ == "__main__":
  absltest.main()
