"""Sensitivity-aware fine-tuning of pretrained language models in JAX.

The stub file beside this one lists the public names. Each is imported on first use (PEP 562), so that
``import pats_jax`` costs next to nothing and never starts a JAX backend.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
