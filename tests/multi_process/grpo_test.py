"""An alignment over two processes draws, scores and learns what one process does; all decide alike."""

import base64
import http.server
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

import jax
import numpy as np
from absl.testing import absltest
from PIL import Image

from elasticdit_jax.interop import model_dir
from tests.evals import tiny_model
from tests.multi_process import grpo_worker
from tests.multi_process.train_test import free_port

# Relative; float32 sums in another order, and single steps of 1/255 in pictures.
_TOLERANCE = 2e-3


class _Brightness(http.server.BaseHTTPRequestHandler):
  """A reward server: grpo_worker.brightness, computed elsewhere."""

  def log_message(self, *args):
    pass

  def _reply(self, answer):
    text = json.dumps(answer).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(text)))
    self.end_headers()
    self.wfile.write(text)

  def do_GET(self):
    self._reply({"rewards": ["bright"]})

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in body["images"]]
    self.server.seen += len(images)
    self._reply({"scores": {"bright": [float(image.mean()) / 255 for image in images]}})


def _server(test) -> http.server.ThreadingHTTPServer:
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Brightness)
  server.seen = 0
  threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
  test.addClassCleanup(server.server_close)
  test.addClassCleanup(server.shutdown)
  return server


class GrpoTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    model = folder / "given"
    model_dir.save(model, tiny_model.make((16,)))
    cls.workdir, address = folder / "run", f"127.0.0.1:{free_port()}"
    cls.servers = [_server(cls) for _ in range(2)]  # each host asks one of its own
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "tests.multi_process.grpo_worker", cls.workdir, model, 1, address, 2]
    started = [
      subprocess.Popen(
        list(map(str, [*command, i, "mesh.fsdp=2", *cls._rewards(server)])),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | cache | {"JAX_PLATFORMS": "cpu"},
      )
      for i, server in enumerate(cls.servers)
    ]
    cls.logs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
      raise AssertionError("\n".join(cls.logs))
    cls.found = [json.loads(pathlib.Path(f"{cls.workdir}.found.{i}.json").read_text()) for i in range(2)]
    jax.config.update("jax_disable_most_optimizations", True)
    cls.addClassCleanup(jax.config.update, "jax_disable_most_optimizations", False)
    cls.want = grpo_worker.run(grpo_worker.config_of(str(model), {}), str(folder / "alone"), looks=False)

  @staticmethod
  def _rewards(server) -> list[str]:
    """Half of the reward is local, half from the server; both are the brightness."""
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return ["rewards.weights=jpeg_size=0.5,bright=0.5", f"rewards.servers=bright={url}"]

  def test_rewards_advantages_and_losses_are_those_of_one_process(self):
    first, second = (found["epochs"] for found in self.found)
    self.assertEqual(first, second)
    self.assertLen(first, 2)
    for got, want in zip(first, self.want, strict=True):
      self.assertEqual((got["own"], want["own"]), (2, 4))  # the group lies on both
      self.assertGreater(np.std(want["rewards"]), 1e-4)
      for name in ("rewards", "advantage", "loss", "grad_norm"):
        np.testing.assert_allclose(got[name], want[name], rtol=_TOLERANCE, atol=_TOLERANCE, err_msg=name)

  def test_the_first_process_writes_and_tells(self):
    self.assertIn("2 devices (cpu): data 1 x fsdp 2 x tensor 1; 2 processes", self.logs[0])
    self.assertIn("watch 2: lite-f16 reward", self.logs[0])
    self.assertNotIn("watch 2", self.logs[1])
    for name in ("watch.json", "best/dit.safetensors", "model/routes.json"):
      self.assertTrue((self.workdir / name).is_file(), name)
    _, record = json.loads((self.workdir / "watch.json").read_text())
    expected = np.mean([epoch["rewards"] for epoch in self.want])
    np.testing.assert_allclose(record["training_reward"], expected, rtol=_TOLERANCE)

  def test_every_host_asks_its_own_server_about_its_own_pictures(self):
    """One to begin with, two of each epoch, two of each look."""
    self.assertEqual([server.seen for server in self.servers], [1 + 2 * 2 + 2 * 2] * 2)

  def test_who_holds_the_same_pictures_takes_turns(self):
    self.assertEqual([found["turns"] for found in self.found], [[0, 2, 4], [1, 3]])

  def test_rewards_that_fail_on_one_host_end_all(self):
    self.assertRegex(self.found[0]["failed"], r"ValueError: process 1 \(.+:\d+\) failed: no such model")
    self.assertEqual(self.found[1]["failed"], "ValueError: no such model")

  def test_rewards_that_do_not_come_are_named_and_sigterm_to_one_host_ends_the_wait_of_all(self):
    self.assertEqual([found["stopped"] for found in self.found], ["StopError: "] * 2)
    self.assertRegex(self.logs[0], r"waiting for the rewards of process 1 \(.+:\d+\), ")


if __name__ == "__main__":
  absltest.main()
