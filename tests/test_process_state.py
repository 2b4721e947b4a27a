"""A program that a test calls in its own process changes nothing for the tests that come after it."""

import logging
import sys
import threading
import warnings

import jax
import process_state
import pytest

from pats_jax.programs import cli

LEVELS: list[int] = []  # before each case of the last test


def state():
    logger = logging.getLogger("pats_jax")
    hooks = warnings.showwarning, sys.unraisablehook, threading.excepthook
    cache = jax.config.values["jax_compilation_cache_dir"], jax.config.values["jax_enable_compilation_cache"]
    return logger.level, logger.propagate, [*logger.handlers], [*logging.root.handlers], hooks, cache


def test_what_a_program_sets_is_put_back(capsys, caplog):
    before = state()
    with process_state.put_back():
        with pytest.raises(SystemExit):
            cli.main(["no_such_command"])
        logger = logging.getLogger("pats_jax")
        assert logger.level == logging.INFO and warnings.showwarning is not before[4][0]
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
        jax.config.update("jax_enable_compilation_cache", False)
        logging.disable()
        assert all(now != then for now, then in zip((state()[0], *state()[4]), (before[0], *before[4]), strict=True))
    assert state() == before
    logging.getLogger("pats_jax.training").warning("heard")
    assert "heard" in caplog.text


@pytest.mark.parametrize("order", ["spoils", "finds nothing"])
def test_every_test_is_run_so(order):
    """The second case fails if `conftest` does not put back what the first one leaves."""
    LEVELS.append(logging.getLogger("pats_jax").level)
    assert LEVELS[0] == LEVELS[-1] != logging.ERROR
    logging.getLogger("pats_jax").setLevel(logging.ERROR)
