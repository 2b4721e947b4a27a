"""Optax-side methods that people compare PATS with, one file each; the names are in `pats_jax` itself."""
