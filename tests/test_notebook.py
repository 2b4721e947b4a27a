"""The notebook in examples/, cell by cell, as Jupyter runs it: lines that begin with ! are commands."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "own_data.ipynb"


def cells():
    """The sources of the cells with code."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(source, names):
    """Runs a cell; gives what it prints."""
    printed = io.StringIO()
    python: list[str] = []

    def flush():
        with contextlib.redirect_stdout(printed):
            exec(compile("\n".join(python), NOTEBOOK, "exec"), names)
        python.clear()

    for line in source.splitlines():
        if line.startswith("!"):
            flush()
            command = line[1:].replace("pats-jax", f"{sys.executable} -m pats_jax", 1)
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            printed.write(done.stdout)
        else:
            python.append(line)
    flush()
    return printed.getvalue()


def test_it_has_cells_and_no_stale_output():
    assert len(cells()) >= 5
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_notebook_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    shown = [run(source, names) for source in cells()]
    assert names["found"]["score"] > 0.9 > 0.5 > names["found"]["majority_class"]["share"]
    assert {int(row["index"]) for row in names["costliest"][:2]} == set(names["WRONG"])
    answers = [line.split("\t")[1] for line in shown[-1].splitlines()[1:]]
    assert answers[0] == "billing" and len(answers) == 3, shown[-1]
