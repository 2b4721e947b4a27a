"""Optax-side methods to compare PATS with, one file each; their public names are in `pats_jax`.

Each docstring marks the source of its rule: *code* is the authors' code, *paper* the paper's text, *secondary* later
work, and *ours* a choice that we made because no source settles it. In formulas, g is the gradient of the mean loss.
"""
