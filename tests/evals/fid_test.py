"""FID: the distance in closed form, the network against its definition where torch has it, weight files, messages."""

import os
import pathlib
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy
from scipy import linalg

from elasticdit_jax.evals import fid
from elasticdit_jax.interop import inception_weights
from elasticdit_jax.models import inception


def _normal(seed, size=6, rank=6):
  rng = np.random.default_rng(seed)
  factor = rng.normal(size=(size, rank))
  return rng.normal(size=size), factor @ factor.T


def _file_tensors():
  """A weight file of the right names and shapes; values by name, variances positive."""
  rng = np.random.default_rng(0)
  tensors = {}
  for name, leaf in inception_weights._wanted(inception.init_shapes()).items():
    if name.endswith(("running_var", "bn.weight")):
      tensors[name] = rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    else:
      scale = np.sqrt(2 / np.prod(leaf.shape[1:])) if len(leaf.shape) == 4 else 0.1
      tensors[name] = (scale * rng.standard_normal(leaf.shape, np.float32)).astype(np.float32)
  tensors["fc.bias"] = np.zeros(1008, np.float32)
  return tensors


class DistanceTest(parameterized.TestCase):
  def test_one_dimension_and_diagonals(self):
    # (m - n)^2 + (s - t)^2 for normals of standard deviations s and t.
    got = fid.frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]]))
    self.assertAlmostEqual(got, 4 + 1)

  @parameterized.parameters(6, 3)
  def test_against_the_matrix_root(self, rank):
    (m, a), (n, b) = _normal(0, rank=rank), _normal(1)
    root = linalg.sqrtm(a @ b + 1e-14 * np.eye(6))
    expected = ((m - n) ** 2).sum() + np.trace(a + b - 2 * root.real)
    np.testing.assert_allclose(fid.frechet_distance(m, a, n, b), expected, rtol=1e-4)
    np.testing.assert_allclose(fid.frechet_distance(n, b, m, a), expected, rtol=1e-4)
    self.assertAlmostEqual(fid.frechet_distance(m, a, m, a), 0.0, places=5)

  @parameterized.parameters(
    (np.zeros((1, 4, 4, 3), np.uint8), "at least 2 pictures on each side, got 1"),
    (np.zeros((1, 4, 4, 3), np.float32), "expected uint8 pictures"),
    (np.zeros((4, 4, 3), np.uint8), "expected uint8 pictures"),
  )
  def test_messages(self, batch, message):
    self.enter_context(mock.patch.object(fid, "features", lambda params, x: np.zeros((len(x), 2048))))
    with self.assertRaisesRegex(ValueError, message):
      fid.statistics({}, [batch])


class WeightsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())

  def test_size_of_the_published_network(self):
    self.assertEqual(sum(leaf.size for leaf in jax.tree.leaves(inception.init_shapes())), 21785568 - 17216)

  def test_missing_pickled_and_foreign_files(self):
    for name, message in (("a.safetensors", "no file .* convert it once"), ("a.pth", "is a pickle.*safetensors")):
      with self.assertRaisesRegex(ValueError, message):
        inception_weights.load(os.path.join(self.folder, name))
    file = os.path.join(self.folder, "other.safetensors")
    safetensors_numpy.save_file({"fc.weight": np.ones(2, np.float32), "x": np.ones(2, np.float32)}, file)
    with self.assertRaisesRegex(ValueError, "tensors do not fit the model: .* is missing"):
      inception_weights.load(file)

  def test_folding(self):
    rng = np.random.default_rng(0)
    norm = {part: rng.uniform(0.5, 1.5, 4).astype(np.float32) for part in inception_weights._NORM}
    tensors = {"a.b.conv.weight": rng.normal(size=(4, 3, 1, 1)).astype(np.float32)}
    tensors |= {f"a.b.bn.{part}": value for part, value in norm.items()}
    folded = inception_weights._fold(tensors)
    x = rng.normal(size=(5, 3))
    y = x @ tensors["a.b.conv.weight"][:, :, 0, 0].T
    y = (y - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"] + norm["bias"]
    np.testing.assert_allclose(x @ folded["a/b/kernel"][0, 0] + folded["a/b/bias"], y, atol=1e-5)

  def test_features_are_those_of_pytorch_fid(self):
    try:
      import torch
      from pytorch_fid import inception as theirs
    except (ImportError, RuntimeError):  # the latter where torch and torchvision do not belong together
      self.skipTest("pytorch-fid is not installed")
    tensors = _file_tensors()
    file = pathlib.Path(self.folder, "inception.safetensors")
    safetensors_numpy.save_file(tensors, file)
    image = np.random.default_rng(1).integers(0, 255, (1, 320, 280, 3), np.uint8)
    got = np.asarray(fid.features(inception_weights.load(file), image))

    tensors |= {"fc.weight": np.zeros((1008, 2048), np.float32)}
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    with mock.patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: state):
      model = theirs.InceptionV3([3]).eval()
    with torch.no_grad():
      expected = model(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()).float() / 255)[0][:, :, 0, 0].numpy()
    self.assertGreater(expected.std(), 0.01)
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


if __name__ == "__main__":
  absltest.main()
