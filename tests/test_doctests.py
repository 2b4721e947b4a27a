"""The examples in the docstrings give what they say."""

import doctest
import importlib
import pathlib

import pytest

import pats_jax

ROOT = pathlib.Path(pats_jax.__file__).parent
MODULES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0 and result.failed == 0


def test_there_are_examples():
    assert len(MODULES) > 20
