"""When this process is one of several; alone, meetings are over at once."""

import os
import socket
from unittest import mock

from absl.testing import absltest, parameterized

from elasticdit_jax import distributed


class DistributedTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, False),
    ({"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "host"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"SLURM_STEP_NUM_TASKS": "8"}, True),
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
  )
  def test_the_environment_tells(self, environment, expected):
    self.assertEqual(distributed.expected(environment), expected)

  @parameterized.parameters(
    (["null"], [], {}, False),
    (["null", "accel0"], [], {}, True),
    (["null"], ["0", "vfio"], {}, True),
    (["null"], ["vfio"], {}, False),
    (["accel0"], [], {"TPU_SKIP_MDS_QUERY": "1"}, False),
  )
  def test_chips_are_seen_without_touching_them(self, devices, vfio, environment, expected):
    listed = {"/dev": devices, "/dev/vfio": vfio}
    with mock.patch.object(distributed, "_listed", listed.__getitem__):
      self.assertEqual(distributed.has_tpu(environment), expected)

  def test_one_host_with_chips_trains_alone(self):
    with mock.patch.object(distributed, "has_tpu", return_value=True), self.assertLogs(level="INFO") as logs:
      self.assertEqual(distributed.initialize(None, None, None, seconds=5), 1)
    self.assertIn("one host", logs.output[0])

  def test_a_host_whose_name_has_no_address_is_told(self):
    no_address = mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror("Name or service not known"))
    with no_address, mock.patch.dict(os.environ, {"JAX_PLATFORMS": "cpu"}):
      with self.assertRaisesRegex(ValueError, f"{socket.gethostname()}.*not known.*add it to /etc/hosts"):
        distributed.initialize("localhost:1", 2, 0, seconds=5)

  def test_alone_everybody_is_here(self):
    self.assertEqual(distributed.exchange("x", "mine"), ["mine"])
    distributed.check_same("config", {"a": 1, "b": float("nan")})
    self.assertEqual(distributed.from_first("value", {"a": 1}), {"a": 1})
    done = []
    distributed.on_first("work", lambda: done.append(1))
    self.assertEqual(done, [1])
    self.assertFalse(distributed.stop_requested())
    with distributed.joined(None, None, None) as count:
      self.assertEqual(count, 1)


if __name__ == "__main__":
  absltest.main()
