"""Priming for few-shot tasks: meta-losses, the upstream stage, few-shot tuning, relative gains and their page.

The stub file beside this one lists the losses. Each is imported on first use (PEP 562).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
