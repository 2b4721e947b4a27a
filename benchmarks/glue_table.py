"""A Markdown table of finished runs: ``python benchmarks/glue_table.py RUN ...``, a row a task, a column a method."""

import pathlib
import sys

from typing_extensions import TypedDict

from pats_jax.core import files
from pats_jax.errors import InputError
from pats_jax.run.records import Scores


class Row(TypedDict):
    """What the table says of a run, out of its results.json."""

    task_name: str
    method: str
    main_metric: str
    final: Scores
    best: Scores
    majority_class: Scores


def main(folders: list[str]) -> None:
    """Prints final scores in percent, and the best epoch's main score in brackets."""
    results = [read(pathlib.Path(folder) / "results.json") for folder in folders]
    tasks = list(dict.fromkeys(result["task_name"] for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    cells = {(result["task_name"], result["method"]): cell(result) for result in results}
    print("| task | metric | majority class | " + " | ".join(methods) + " |")
    print("| --- | --- |" + " --- |" * (len(methods) + 1))
    for task in tasks:
        first = next(result for result in results if result["task_name"] == task)
        metrics = ", ".join(first["final"]["metrics"])
        row = [cells.get((task, method), "") for method in methods]
        print(f"| {task} | {metrics} | {scores(first['majority_class'])} | " + " | ".join(row) + " |")


def read(path: pathlib.Path) -> Row:
    """The results of a run on a GLUE task, evaluated.

    Raises:
      InputError: naming the file, if it is no such run's.
    """
    row = files.read_record(path, Row)
    if row["main_metric"] not in row["best"]["metrics"]:
        raise InputError(f"{path}: best.metrics: lacks the main metric")
    return row


def cell(result: Row) -> str:
    """Final scores, and the best epoch's main score."""
    best = 100 * result["best"]["metrics"][result["main_metric"]]
    return f"**{scores(result['final'])}** ({best:.1f})"


def scores(evaluation: Scores) -> str:
    """All metrics of an evaluation in percent."""
    return " / ".join(f"{100 * score:.1f}" for score in evaluation["metrics"].values())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
