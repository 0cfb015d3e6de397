"""Prompts to pictures.

    python -m elasticdit_jax.main --config=configs/sample.py --config.prompt="two red circles" --config.route=lite-f16

Writes runs/sample/images/<number>-<route>-<prompt>.png; each file carries prompt, route and seed as PNG text. Several
prompts are separated by ";", several routes by ","; route=all takes every route, and grid.png shows them side by side.
The weights are those inside the package; --config.checkpoint=DIR takes a model directory or the workdir of a run.

Takes 5 s on two idle CPU cores, 3 s once the compilation cache holds the program.

    :debug     two steps of the sampler
"""

from ml_collections import ConfigDict

from elasticdit_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, debug=False)
  config = ConfigDict()
  config.task = "sample"
  config.checkpoint = ""
  config.prompt = "two red circles"
  config.route = "lite-f16"
  config.steps = 2 if args.debug else 20
  config.guidance = 3.0
  config.seed = 0
  config.count = 1
  config.size = 0
  config.solver = "euler"
  return config.lock()
