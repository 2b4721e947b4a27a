"""Patterns from outside match as Python's own engine does, in bounded time."""

import re
import time

import pytest

from pats_jax.errors import InputError
from pats_jax.models.patterns import compile_pattern

NAMES = [
    f"bert.encoder.layer.{layer}.{rest}"
    for layer in (0, 1, 11)
    for rest in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
]


@pytest.mark.parametrize(
    "pattern",
    (
        r"\.(query|value)$",
        r"\.\d+\.output\.dense$",
        ".*attention.*",
        "",
        "^$",
        r"layer\.1\.",
        r"(?i)QUERY",
        "[a-z.]+0.*",
    ),
)
@pytest.mark.parametrize("whole", (False, True))
def test_it_matches_as_pythons_own_engine(pattern, whole):
    expected = re.compile(pattern).fullmatch if whole else re.compile(pattern).search
    matches = compile_pattern(pattern, "--layers", whole=whole)
    assert [matches(name) for name in NAMES] == [expected(name) is not None for name in NAMES]


@pytest.mark.parametrize("pattern", ("(", "*", "(" * 20_000, "a{" + "9" * 5000 + "}", "a" * 200_000, None, 3, ["a"]))
def test_what_is_no_pattern_is_refused_in_one_line(pattern):
    with pytest.raises(InputError, match="^--layers .*: not a regular expression: ") as raised:
        compile_pattern(pattern, "--layers")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("pattern", (r"^(([a-z])+.)+[A-Z]([a-z])+$", "(?:a|aa)+$", "(?R)"))
def test_a_pattern_that_never_ends_is_refused_by_name(pattern):
    start = time.perf_counter()
    matches = compile_pattern(pattern, "--layers")
    with pytest.raises(InputError, match=r"^--layers .*: takes too long to match 'aaa"):
        matches("a" * 5000 + "!")
    assert time.perf_counter() - start < 10


def test_many_names_share_the_time():
    """A pattern that is slow, but for no single name too slow, has no second for each."""
    matches = compile_pattern("(?:a|aa)+$", "--layers")
    start = time.perf_counter()
    with pytest.raises(InputError, match="takes too long"):
        for _ in range(10_000):
            matches("a" * 20 + "!")
    assert time.perf_counter() - start < 10
