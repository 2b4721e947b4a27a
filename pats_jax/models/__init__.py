"""Encoders and encoder-decoders in Flax Linen, and conversion of Hugging Face checkpoints to and from their parameters.

The stub file beside this one lists the names. Each is imported on first use (PEP 562), so that importing this package
costs next to nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
