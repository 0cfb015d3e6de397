"""elasticdit_jax: one weight set of an elastic text-to-image diffusion transformer, many routes through it."""

__version__ = "0.1.0"
