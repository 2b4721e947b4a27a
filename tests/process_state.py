"""What programs set for their whole process, and tests that call them in this one must not leave behind."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import jax

HOOKS = ((warnings, "showwarning"), (sys, "unraisablehook"), (threading, "excepthook"))
CACHE = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_enable_compilation_cache")


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Restores loggers, the hooks for warnings and failed threads, and JAX's cache settings as they were before."""
    loggers = {logger: _of_logger(logger) for logger in _loggers()}
    hooks = [(module, name, getattr(module, name)) for module, name in HOOKS]
    cache = {name: jax.config.values[name] for name in CACHE}
    try:
        yield
    finally:
        for logger in _loggers():
            level, propagate, disabled, handlers = loggers.get(logger, _NEW)
            logger.setLevel(level)
            logger.propagate, logger.disabled, logger.handlers[:] = propagate, disabled, handlers
        logging.disable(logging.NOTSET)
        for module, name, hook in hooks:
            setattr(module, name, hook)
        for name, value in cache.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)


_NEW = (logging.NOTSET, True, False, [])


def _loggers():
    ours = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.partition(".")[0] == "pats_jax"]
    return [logging.root, *ours]


def _of_logger(logger):
    return logger.level, logger.propagate, logger.disabled, [*logger.handlers]
