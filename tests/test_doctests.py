"""The examples in the public docstrings give what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "anchors",
        "concentration",
        "data.few_shot",
        "data.labels",
        "data.low_resource",
        "data.partitions",
        "evaluation",
        "glue",
        "models.labels",
        "models.peft.model",
        "objectives",
        "option_scoring",
        "priming",
        "random",
        "relative_gain",
        "subnetworks",
        "transforms",
    ],
)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"pats_jax.{module}"))
    assert result.attempted > 0 and result.failed == 0
