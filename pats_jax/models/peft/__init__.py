"""Parameter-efficient fine-tuning: adds a small tree of parameters to a model and trains only that and the head.

The stub file beside this one lists the names. Each is imported on first use (PEP 562), so that importing this package
costs next to nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
