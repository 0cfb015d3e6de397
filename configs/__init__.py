"""Configs, one file per task; installed as `elasticdit_jax.configs`."""
