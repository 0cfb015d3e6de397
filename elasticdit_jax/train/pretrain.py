"""Task `pretrain`: flow matching of the full backbone, phases coarse and init alone. Supervised fine-tuning is the same
task with `init` set to a model and `data` to the curated pictures (ElasticDiT section 3.2).
"""

from typing import Any

from elasticdit_jax.train import phases, uwco


def run(config: Any, workdir: str) -> None:
  """Runs or resumes config.phases.coarse and .init; see `uwco.train`."""
  uwco.train(config, workdir, phases.make_table(config.phases, names=phases.BACKBONE))
