"""The JobSets of launch/gke: fields that Kubernetes knows, hosts that fit the topology, what restarts.

The schemas below name the fields that JobSet v1alpha2 and the pods of a Job have, as far as they are used; one that is
unknown or misspelt is an error here, as it would be at the cluster.
"""

import math
import shutil
import subprocess

import yaml
from absl.testing import absltest, parameterized

from tests.launch import cases

_GKE = cases.LAUNCH / "gke"
_SLICES = sorted(p.parent.name for p in _GKE.glob("*/kustomization.yaml") if p.parent.name not in ("base", "spot"))
# Chips of a slice by its name, as its users count them: v5p counts cores, two a chip.
_CHIPS = {"v5e-256": 256, "v6e-256": 256, "v5p-512": 256, "v5e-256-x2": 256}
_CHIPS_A_HOST = 4

_ENV = [{"name": str, "value": str}]
_CONTAINER = {
  "name": str,
  "image": str,
  "args": [str],
  "env": _ENV,
  "ports": [{"containerPort": int}],
  "resources": {"limits": {"google.com/tpu": int}},
  "volumeMounts": [{"name": str, "mountPath": str}],
}
_POD = {
  "restartPolicy": {"Never"},  # as podFailurePolicy needs
  "terminationGracePeriodSeconds": int,
  "serviceAccountName": str,
  "nodeSelector": dict,
  "tolerations": [{"key": str, "operator": {"Equal", "Exists"}, "value": str, "effect": {"NoSchedule"}}],
  "containers": [_CONTAINER],
  "volumes": [{"name": str, "csi": {"driver": str, "volumeAttributes": dict}, "emptyDir": {"medium": {"Memory"}}}],
}
_EXIT_CODES = {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]}
_JOB = {
  "parallelism": int,
  "completions": int,
  "backoffLimit": int,
  "podFailurePolicy": {"rules": [{"action": {"FailJob", "Ignore", "Count"}, "onExitCodes": _EXIT_CODES}]},
  "template": {"metadata": {"annotations": dict}, "spec": _POD},
}
_FAILURE_RULE = {
  "name": str,
  "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
  "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"}],
}
_JOBSET = {
  "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
  "kind": {"JobSet"},
  "metadata": {"name": str, "annotations": dict},
  "spec": {
    "failurePolicy": {"maxRestarts": int, "rules": [_FAILURE_RULE]},
    "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": _JOB}}],
  },
}
_KUSTOMIZATION = {
  "apiVersion": {"kustomize.config.k8s.io/v1beta1", "kustomize.config.k8s.io/v1alpha1"},
  "kind": {"Kustomization", "Component"},
  "resources": [str],
  "components": [str],
  "images": [{"name": str, "newName": str, "newTag": str}],
  "patches": [{"target": {"kind": {"JobSet"}}, "patch": str}],
}


def _problems(value, schema, where=""):
  """What in a YAML value the schema does not allow."""
  if isinstance(schema, set):
    return [] if value in schema else [f"{where}: {value!r} is none of {sorted(schema)}"]
  if isinstance(schema, list):
    if not isinstance(value, list):
      return [f"{where}: expected a list, got {value!r}"]
    return [p for i, item in enumerate(value) for p in _problems(item, schema[0], f"{where}[{i}]")]
  if isinstance(schema, dict):
    if not isinstance(value, dict):
      return [f"{where}: expected a mapping, got {value!r}"]
    unknown = [f"{where}.{key}: unknown" for key in value if key not in schema]
    return unknown + [p for k, v in value.items() if k in schema for p in _problems(v, schema[k], f"{where}.{k}")]
  return [] if type(value) is schema else [f"{where}: expected {schema.__name__}, got {value!r}"]


def _load(path):
  return yaml.safe_load(path.read_text())


def _apply(document, patch):
  """JSON patch, add and replace."""
  for operation in patch:
    *parents, last = [key.replace("~1", "/") for key in operation["path"].strip("/").split("/")]
    node = document
    for key in parents:
      node = node[int(key) if isinstance(node, list) else key]
    if operation["op"] == "replace" and last not in node:
      raise KeyError(f"{operation['path']}: nothing to replace")
    node[last] = operation["value"]


def _build(name):
  """What `kubectl kustomize launch/gke/NAME` prints, apart from the image."""
  kustomization = _load(_GKE / name / "kustomization.yaml")
  document = _load(_GKE / "base" / "jobset.yaml")
  for component in kustomization.get("components", []):
    for patch in _load(_GKE / name / component / "kustomization.yaml")["patches"]:
      _apply(document, yaml.safe_load(patch["patch"]))
  for patch in kustomization["patches"]:
    _apply(document, yaml.safe_load(patch["patch"]))
  return document


def _parts(document):
  """(replicated job, its job spec, its pod spec) of a JobSet."""
  (replicated,) = document["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  return replicated, job, job["template"]["spec"]


class GkeTest(parameterized.TestCase):
  def test_every_slice_is_known_here(self):
    self.assertCountEqual(_SLICES, _CHIPS)

  @parameterized.parameters("base", "spot", *_CHIPS)
  def test_kustomizations_hold_known_fields_and_name_what_exists(self, name):
    kustomization = _load(_GKE / name / "kustomization.yaml")
    self.assertEmpty(_problems(kustomization, _KUSTOMIZATION))
    for path in kustomization.get("resources", []) + kustomization.get("components", []):
      self.assertTrue((_GKE / name / path).exists(), path)

  @parameterized.parameters(*_CHIPS)
  def test_jobsets_hold_known_fields(self, name):
    self.assertEmpty(_problems(_build(name), _JOBSET))

  @parameterized.parameters(
    ({"maxRestart": 3}, "unknown"), ({"maxRestarts": "3"}, "expected int"), ({"rules": {}}, "expected a list")
  )
  def test_the_schema_finds_mistakes(self, policy, message):
    document = _build("v5e-256")
    document["spec"]["failurePolicy"] = policy
    self.assertRegex("".join(_problems(document, _JOBSET)), message)

  @parameterized.parameters(*_CHIPS)
  def test_hosts_fit_the_topology(self, name):
    replicated, job, pod = _parts(_build(name))
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    self.assertEqual(math.prod(map(int, topology.split("x"))), _CHIPS[name])
    self.assertEqual(pod["containers"][0]["resources"]["limits"]["google.com/tpu"], _CHIPS_A_HOST)
    self.assertEqual((job["parallelism"], job["completions"]), (_CHIPS[name] // _CHIPS_A_HOST,) * 2)
    self.assertEqual(replicated["replicas"], 2 if name.endswith("x2") else 1)

  @parameterized.parameters(*_CHIPS)
  def test_preemption_restarts_and_a_wrong_command_does_not(self, name):
    document = _build(name)
    _, job, pod = _parts(document)
    self.assertGreater(document["spec"]["failurePolicy"]["maxRestarts"], 100)
    self.assertEqual(document["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"], ["PodFailurePolicy"])
    (rule,) = job["podFailurePolicy"]["rules"]
    self.assertEqual((rule["action"], rule["onExitCodes"]["values"]), ("FailJob", [2]))
    self.assertEqual(rule["onExitCodes"]["containerName"], pod["containers"][0]["name"])
    self.assertEqual(job["backoffLimit"], 0)
    self.assertGreaterEqual(pod["terminationGracePeriodSeconds"], 60)
    self.assertEqual(pod["nodeSelector"]["cloud.google.com/gke-spot"], "true")

  def test_volumes_are_mounted_and_image_is_set(self):
    _, _, pod = _parts(_build("v5e-256"))
    (container,) = pod["containers"]
    self.assertEqual({v["name"] for v in pod["volumes"]}, {m["name"] for m in container["volumeMounts"]})
    (image,) = _load(_GKE / "base" / "kustomization.yaml")["images"]
    self.assertEqual(image["name"], container["image"])

  @absltest.skipUnless(shutil.which("kubectl"), "needs kubectl")
  @parameterized.parameters(*_CHIPS)
  def test_kustomize_builds_the_same(self, name):
    command = ["kubectl", "kustomize", str(_GKE / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr)
    built = yaml.safe_load(done.stdout)
    (image,) = _load(_GKE / "base" / "kustomization.yaml")["images"]
    container = _parts(built)[2]["containers"][0]
    self.assertEqual(container["image"], f"{image['newName']}:{image['newTag']}")
    container["image"] = image["name"]
    self.assertEqual(built, _build(name))


if __name__ == "__main__":
  absltest.main()
