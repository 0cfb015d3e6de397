"""The reference server of docs/rewards.md, run as it stands there, with stand-ins for its two networks."""

import http.server
import pathlib
import re
import threading

import numpy as np
from absl import logging
from absl.testing import absltest, parameterized

from elasticdit_jax.train import reward_http

_DOCUMENT = pathlib.Path(__file__).resolve().parent.parent / "docs" / "rewards.md"
_SERVER = next(
  code
  for code in re.findall(r"^```python\n(.*?)^```$", _DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
  if code.startswith('"""geneval_server.py')
)


class _Networks:
  """Objects are (class, colour, left, top), 10 pixels wide; the picture's first pixel says which scene it is."""

  def __init__(self, scenes):
    self.scenes, self.counting = scenes, []

  def detect(self, image, counting):
    self.counting.append(counting)
    found = {}
    for name, color, left, top in self.scenes[image[0, 0, 0]]:
      found.setdefault(name, []).append((np.array([left, top, left + 10, top + 10.0]), color))
    return found

  def colors(self, image, objects, name):
    return [color for _, color in objects]


_DOG, _CUP = ("dog", "brown", 10, 50), ("cup", "red", 60, 50)
_SIDE_BY_SIDE = {
  "tag": "position",
  "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
}
_RED_CUP = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
_TWO_DOGS = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}


class ServerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.module = {"__name__": "geneval_server"}
    exec(compile(_SERVER, str(_DOCUMENT), "exec"), self.module)

  @parameterized.parameters(
    (_SIDE_BY_SIDE, [_DOG, _CUP], 1, 1),
    # Both objects there and the relation wrong: two wishes of three, and never more than that.
    (_SIDE_BY_SIDE, [("dog", "brown", 60, 50), ("cup", "red", 10, 50)], 0, 2 / 3),
    (_SIDE_BY_SIDE, [("dog", "brown", 58, 10), _CUP], 0, 2 / 3),
    (_SIDE_BY_SIDE, [_CUP, _DOG, ("dog", "brown", 30, 50)], 0, 1 / 3),
    (_SIDE_BY_SIDE, [_DOG], 0, 1 / 3),
    (_RED_CUP, [_CUP, _DOG], 1, 1),
    (_RED_CUP, [("cup", "blue", 0, 0)], 0, 1 / 2),
    (_RED_CUP, [_CUP, ("cup", "red", 0, 0)], 0, 0),
    (_RED_CUP, [], 0, 0),
    (_TWO_DOGS, [_DOG, ("dog", "brown", 60, 60)], 1, 1),
    (_TWO_DOGS, [_DOG], 0, 1 / 2),
    (_TWO_DOGS, [_DOG] * 3, 0, 1 / 2),
    (_TWO_DOGS, [_DOG] * 9, 0, 0),
  )
  def test_terms(self, metadata, scene, strict, partial):
    networks = _Networks({0: scene})
    got = self.module["judge"](networks, np.zeros((80, 80, 3), np.uint8), metadata)
    np.testing.assert_allclose(got, (strict, partial))
    self.assertEqual(networks.counting, [metadata["tag"] == "counting"])

  @parameterized.parameters(
    ((0, 0, 10, 10), (30, 0, 40, 10), {"left of"}),
    ((30, 0, 40, 10), (0, 0, 10, 10), {"right of"}),
    ((0, 0, 10, 10), (0, 30, 10, 40), {"above"}),
    ((0, 30, 10, 40), (0, 0, 10, 10), {"below"}),
    ((0, 0, 10, 10), (30, 30, 40, 40), {"left of", "above"}),
    ((0, 0, 10, 10), (1, 0, 11, 10), set()),
    # Offset 4, margin 2: half of it is left, which is not more than half.
    ((0, 0, 10, 10), (4, 0, 14, 10), set()),
  )
  def test_relations(self, first, second, holding):
    for relation in ("left of", "right of", "above", "below"):
      self.assertEqual(self.module["stands"](first, second, relation), relation in holding, relation)

  def test_speaks_the_protocol_of_the_client(self):
    networks = _Networks({0: [_DOG, _CUP], 1: [_CUP], 2: []})
    server = http.server.HTTPServer(("127.0.0.1", 0), self.module["handler"](networks))
    server.RequestHandlerClass.log_message = lambda *args: None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    self.addCleanup(server.server_close)
    self.addCleanup(server.shutdown)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    client = reward_http.HttpReward(url, ["geneval_partial", "geneval_strict"], batch_size=2, sleep=lambda _: None)
    client.check()
    images = np.zeros((3, 8, 8, 3), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None]
    scores = client(images, ["x"] * 3, [_SIDE_BY_SIDE, _RED_CUP, _TWO_DOGS])
    np.testing.assert_array_equal(scores["geneval_strict"], [1, 1, 0])
    np.testing.assert_array_equal(scores["geneval_partial"], [1, 1, 0])
    with absltest.mock.patch("traceback.print_exc"), self.assertLogs(logging.get_absl_logger(), "WARNING"):
      with self.assertRaisesRegex(ValueError, "failed 4 times on one batch: HTTP 500 .*KeyError: 'tag'"):
        client(images[:1], ["x"], [{}])


if __name__ == "__main__":
  absltest.main()
