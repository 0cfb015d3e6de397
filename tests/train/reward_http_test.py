"""The HTTP client of rewards against a server of this file that also answers wrongly, late or not at all."""

import base64
import http.server
import io
import json
import threading
import time
import urllib.error
from unittest import mock

import numpy as np
from absl import logging
from absl.testing import absltest, parameterized
from PIL import Image

from elasticdit_jax.train import reward_http, rewards

_IMAGES = np.random.default_rng(0).integers(0, 255, (5, 8, 6, 3), np.uint8)
_PROMPTS = [f"prompt {i}" for i in range(5)]
_METADATA = [{"tag": "counting", "include": [{"class": "dog", "count": i}]} for i in range(5)]


def _scores(body):
  """What the server computes: the mean of the first channel plus the count in the metadata."""
  means = []
  for text, row in zip(body["images"], body["metadata"], strict=True):
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    assert image.format == "PNG"
    means.append(float(np.asarray(image)[..., 0].mean()) + row["include"][0]["count"])
  return {"scores": dict.fromkeys(body["rewards"], means)}


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def _reply(self, status, text, kind="application/json"):
    self.send_response(status)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(text)))
    self.end_headers()
    self.wfile.write(text.encode())

  def do_GET(self):
    self._reply(*self.server.on_get())

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.bodies.append(body)
    script = self.server.script.pop(0) if self.server.script else None
    if script == "hang up":
      return self.connection.close()
    if script == "cut short":
      self.send_response(200)
      self.send_header("Content-Length", "1000")
      self.end_headers()
      self.wfile.write(b'{"scores": {"far": [')
      return self.connection.close()
    if script == "late":
      time.sleep(0.4)
    self._reply(*(script if isinstance(script, tuple) else (200, json.dumps(_scores(body)))))
    return None


class _Server(http.server.ThreadingHTTPServer):
  def __init__(self, script=(), port=0):
    super().__init__(("127.0.0.1", port), _Handler)
    self.script, self.bodies = list(script), []
    self.on_get = lambda: (200, json.dumps({"rewards": ["far", "wide"]}))
    threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

  def handle_error(self, request, client_address):
    pass

  def stop(self):
    self.shutdown()
    self.server_close()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}/score"


class HttpRewardTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(self.assertLogs(logging.get_absl_logger(), "DEBUG"))
    logging.debug("a test need not log")

  def _server(self, *script):
    server = _Server(script)
    self.addCleanup(server.stop)
    return server

  def _client(self, server, names=("far",), **settings):
    self.slept = []
    settings = {"sleep": self.slept.append, "timeout": 10.0} | settings
    return reward_http.HttpReward(server.url, names, **settings)

  def _check(self, scores):
    expected = _IMAGES[..., 0].mean((1, 2)) + np.arange(5)
    np.testing.assert_allclose(scores["far"], expected, rtol=1e-6)
    self.assertEqual(scores["far"].dtype, np.float32)

  def test_batches_keep_their_order(self):
    server = self._server()
    client = self._client(server, ("far", "wide"), batch_size=2)
    client.check()
    scores = client(_IMAGES, _PROMPTS, _METADATA)
    self._check(scores)
    np.testing.assert_array_equal(scores["far"], scores["wide"])
    self.assertEqual([len(body["images"]) for body in server.bodies], [2, 2, 1])
    self.assertEqual([prompt for body in server.bodies for prompt in body["prompts"]], _PROMPTS)
    self.assertEmpty(self.slept)

  def test_failures_are_retried_with_growing_pauses(self):
    client = self._client(self._server((500, "Traceback"), (500, "Traceback")), retries=2)
    self._check(client(_IMAGES, _PROMPTS, _METADATA))
    self.assertEqual(self.slept, [1.0, 2.0])

  def test_retries_are_bounded(self):
    server = self._server(*[(500, "Traceback: CUDA out of memory", "text/plain")] * 9)
    with self.assertRaisesRegex(ValueError, "failed 3 times on one batch: HTTP 500 .*CUDA out of memory"):
      self._client(server, retries=2)(_IMAGES, _PROMPTS, _METADATA)
    self.assertLen(server.bodies, 3)

  @parameterized.parameters("hang up", "cut short", ("late", 0.1), ((503, "loading"),), ((429, "busy"),))
  def test_a_server_that_is_away_is_waited_for(self, script, timeout=10.0):
    client = self._client(self._server(script), timeout=timeout, retries=0)
    with self.assertLogs(logging.get_absl_logger(), "INFO") as logs:
      self._check(client(_IMAGES, _PROMPTS, _METADATA))
    self.assertRegex(logs.output[0], "is away .* the run waits for it and then goes on by itself")
    self.assertIn("is back", logs.output[-1])

  def test_a_connection_that_breaks_inside_an_error_message(self):
    class Broken(io.BytesIO):
      def read(self, *args):
        raise ConnectionResetError

    client = reward_http.HttpReward("http://127.0.0.1:1", ("far", "wide"), retries=0)
    client._opener = mock.Mock()
    client._opener.open.side_effect = urllib.error.HTTPError(client.url, 500, "no memory", {}, Broken())
    with self.assertRaisesRegex(ValueError, "HTTP 500 no memory: ConnectionResetError in the middle of its message"):
      client(_IMAGES, _PROMPTS, _METADATA)

  def test_a_dead_server_pauses_until_another_takes_its_place(self):
    server = _Server()
    client, port = self._client(server), server.server_address[1]
    server.stop()

    def start_again(seconds):
      self.slept.append(seconds)
      if len(self.slept) == 7:
        self.addCleanup(_Server(port=port).stop)

    client._sleep = start_again
    with self.assertLogs(logging.get_absl_logger(), "INFO") as logs:
      self._check(client(_IMAGES, _PROMPTS, _METADATA))
    self.assertEqual(self.slept, [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0])
    self.assertLen(logs.output, 2)

  def test_patience_ends(self):
    server = _Server()
    server.stop()
    with self.assertRaisesRegex(ConnectionError, "away for .* refused.*; start it and give the same command again"):
      self._client(server, patience=0)(_IMAGES, _PROMPTS, _METADATA)

  @parameterized.parameters(
    ((200, "<html><body>Log in</body></html>", "text/html"), "expected JSON, got HTML: '<html><body>Log in"),
    ((200, "<!DOCTYPE html>", "text/plain"), "expected JSON, got HTML"),
    ((200, "oops", "text/plain"), "expected JSON, got text/plain that is no JSON: 'oops'"),
    ((200, "[1, 2]"), r"expected a JSON object, got \[1, 2\]"),
    ((200, "{}"), 'got no "scores"'),
    ((200, '{"scores": {"near": [1]}}'), "no scores of 'far', got near"),
    ((200, '{"scores": {"far": [1, 2, 3, 4]}}'), "expected 5 scores of 'far', one per picture, got 4"),
    ((200, '{"scores": {"far": 0.5}}'), "expected 5 scores of 'far', one per picture, got 0.5"),
    ((200, '{"scores": {"far": [1, 2, "x", 4, 5]}}'), "expected numbers as scores of 'far', got 'x'"),
    ((404, "no such path"), "refused the request with HTTP 404 Not Found: no such path"),
  )
  def test_wrong_answers(self, answer, message):
    with self.assertRaisesRegex(ValueError, f"reward server http://.*: .*{message}"):
      self._client(self._server(answer))(_IMAGES, _PROMPTS, _METADATA)
    self.assertEmpty(self.slept)

  def test_metadata_must_fit_into_json(self):
    with self.assertRaisesRegex(ValueError, "metadata: expected what JSON can hold"):
      self._client(self._server())(_IMAGES, _PROMPTS, [{"a": object()}] * 5)

  @parameterized.parameters(
    (("ftp://x/y", ["a"]), {}, "expected a URL like http://127.0.0.1:18085, got 'ftp://x/y'"),
    (("http://", ["a"]), {}, "expected a URL"),
    (("http://h", ["a"]), {"batch_size": 0}, "rewards.batch_size: expected at least 1, got 0"),
    (("http://h", ["a"]), {"retries": -1}, "rewards.retries: expected at least 0"),
    (("http://h", ["a"]), {"timeout": 0.0}, "rewards.timeout: expected a positive number"),
  )
  def test_refuses_settings(self, arguments, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      reward_http.HttpReward(*arguments, **settings)


class ConfigTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.server = _Server()
    self.addCleanup(self.server.stop)

  def test_servers_beside_local_rewards(self):
    servers = f"far={self.server.url},wide={self.server.url}"
    reward = rewards.from_config({"weights": "far=1,jpeg_size=2,wide=0", "servers": servers})
    scores = reward(_IMAGES, _PROMPTS, _METADATA)
    self.assertEqual(tuple(scores), ("far", "jpeg_size", "wide"))
    self.assertEqual(self.server.bodies[0]["rewards"], ["far", "wide"])
    self.assertLen(self.server.bodies, 1)

  def test_not_a_number_is_named(self):
    self.server.script = [(200, '{"scores": {"far": [1, 2, NaN, 4, 5]}}')]
    reward = rewards.from_config({"weights": "far=1", "servers": f"far={self.server.url}"})
    with self.assertRaisesRegex(ValueError, "reward 'far': 1 of 5 values are not finite, .* for picture 2"):
      reward(_IMAGES, _PROMPTS, _METADATA)

  def test_mistakes_show_before_the_first_picture(self):
    for servers, weights, message in (
      (f"near={self.server.url}", "near=1", "has no reward 'near'; it has far, wide"),
      (f"jpeg_size={self.server.url}", "far=1", "'jpeg_size' is a reward of this library"),
      (self.server.url, "far=1", "expected name=value like geneval_strict=http"),
      ("far=localhost:80", "far=1", "expected a URL like"),
      (f"far={self.server.url}", "fra=1", "unknown reward 'fra'; there are .*far"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        rewards.from_config({"weights": weights, "servers": servers})
    self.server.on_get = lambda: (200, "<html>", "text/html")
    with self.assertRaisesRegex(ValueError, "expected JSON, got HTML"):
      rewards.from_config({"weights": "far=1", "servers": f"far={self.server.url}"})

  def test_a_server_may_start_later(self):
    self.server.on_get = lambda: (503, "loading")
    with self.assertLogs(logging.get_absl_logger(), "WARNING") as logs:
      rewards.from_config({"weights": "far=1", "servers": f"far={self.server.url}"})
    self.assertIn("does not answer yet (HTTP 503", logs.output[0])


if __name__ == "__main__":
  absltest.main()
