"""Data: the GLUE task table, readers and batches.

The stub file beside this one lists the names. Each is imported on first use (PEP 562), so that asking for a task's name
imports neither NumPy nor ``datasets``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
