"""Scores, validation losses, costs and pictures of every route of a model.

    python -m elasticdit_jax.main --config=configs/evaluate.py
    ... --config.checkpoint=runs/uwco --workdir=runs/evaluate-uwco

Writes runs/evaluate/report.md, report.json and images/routes.png. A model of your own pictures has losses, costs and
pictures but no scores: --config.data.source=folder --config.data.path=DIR names the pictures it was trained on.

About two minutes on two idle CPU cores: 480 pictures for each of four routes, and the compilation of their programs.

    :debug     two routes, few prompts and steps, under 90 s with compilation
"""

from ml_collections import ConfigDict

from elasticdit_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, debug=False)
  config = ConfigDict()
  config.task = "evaluate"
  config.checkpoint = ""
  config.routes = "max-f8,lite-f16" if args.debug else "all"
  config.steps = 4 if args.debug else 20
  config.guidance = 3.0
  config.seed = 0
  config.solver = "euler"
  config.per_task = 1 if args.debug else 40
  config.pictures = 8
  config.validation = 8 if args.debug else 128
  config.repeats = 3 if args.debug else 5
  config.data = common.scenes_data(seed=0, size=0, batch_size=1)
  return config.lock()
