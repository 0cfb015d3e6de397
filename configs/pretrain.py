"""Flow-matching training of the full backbone from nothing (phase 1 alone), or supervised fine-tuning of a given one.

    python -m elasticdit_jax.main --config=configs/pretrain.py

This command made the backbone inside the package, in 51 minutes on two CPU cores that had other work too. Strict score
to expect, seen / unseen combinations, +- 3.5: max-f8 86 / 77, max-f16 88 / 88. Every other step leaves two blocks out
(stochastic depth, docs/routes.md), so that flex-lite draws as well: lite-f8 78 / 63, lite-f16 81 / 72. Without it:
--config.phases.coarse.routes=max-f16 --config.phases.init.routes=max-f8,max-f8,max-f16. Captions are learned along f16
first, at a quarter of the tokens. For your own pictures, with fine-tuning from given weights:

    python -m elasticdit_jax.main --config=configs/pretrain.py --config.data.source=folder --config.data.path=DIR
    ... --config.init=DIR   (a model directory or the workdir of another run)

    :debug     64 pixels and a few steps, under 90 s with compilation
"""

from ml_collections import ConfigDict

from elasticdit_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, debug=False)
  config = common.tiny_elastic(batch_size=32)
  config.task = "pretrain"
  config.init = ""
  config.phases = ConfigDict(
    {
      "coarse": {"steps": 3000, "routes": "max-f16,drop-f16"},
      "init": {"steps": 6600, "routes": "max-f8,drop-f8,drop-f16,max-f8,drop-f8,max-f16"},
    }
  )
  if args.debug:
    common.shrink(config)
    # One program for each kind of step: compilation is most of the time.
    config.phases.coarse.routes, config.phases.init.routes = "max-f8", "max-f8,drop-f8"
    config.phases.init.steps = 2
  return config.lock()
