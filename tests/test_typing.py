"""What a type checker sees of the public names: mypy passes right calls and finds the errors in wrong ones."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import pats_jax

ROOT = pathlib.Path(__file__).parent.parent
FACE = ROOT / "tests" / "typed_face.py"
IGNORED = re.compile(r"  # type: ignore\[(.*)\]$")


def test_make_lint_has_mypy_read_the_calls_and_takes_no_comment_that_silences_nothing():
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert "tests/typed_face.py" in mypy["files"]
    assert {"module": "typed_face", "warn_unused_ignores": True} in mypy["overrides"]
    assert sum(IGNORED.search(line) is not None for line in FACE.read_text().splitlines()) == 13


@pytest.mark.slow  # `make lint` does nearly the same
def test_mypy_finds_each_wrong_call_and_nothing_else(tmp_path):
    lines = FACE.read_text().splitlines()
    wrong = {number: IGNORED.search(line)[1] for number, line in enumerate(lines, 1) if IGNORED.search(line)}
    (tmp_path / "calls.py").write_text("\n".join(IGNORED.sub("", line) for line in lines) + "\n")
    command = [sys.executable, "-m", "mypy", str(tmp_path / "calls.py")]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not made.stderr, made.stderr
    found = [line for line in made.stdout.splitlines() if ": error: " in line]
    assert {int(line.split(":")[1]): line.rpartition("  [")[2].rstrip("]") for line in found} == wrong, found


@pytest.mark.parametrize("room", ["", "data", "models", "models/peft", "objectives", "priming"])
def test_every_name_of_a_stub_is_there(room):
    folder = pathlib.Path(pats_jax.__file__).parent / room
    stub = ast.parse((folder / "__init__.pyi").read_text())
    names = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    package = __import__(".".join(["pats_jax", *filter(None, room.split("/"))]), fromlist=["__all__"])
    assert None not in names and names == set(package.__all__) <= set(dir(package))
    for name in names:
        assert getattr(package, name) is not None
