"""METHODS: what each method adds to plain fine-tuning, one file each, and the optimizer that combines them.

A new method is a new file with a `Method` and its place in `table.BUILTIN`. The stub file beside this one lists the
names; each is imported on first use, so flags and ``--help`` work without importing JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
