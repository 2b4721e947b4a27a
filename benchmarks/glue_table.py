"""A Markdown table of finished runs: ``python benchmarks/glue_table.py RUN ...``, a row a task, a column a method."""

import json
import pathlib
import sys


def main(folders: list[str]) -> None:
    """Prints final scores in percent, and the best epoch's main score in brackets."""
    results = [json.loads((pathlib.Path(folder) / "results.json").read_text(encoding="utf-8")) for folder in folders]
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


def cell(result: dict) -> str:
    """Final scores, and the best epoch's main score."""
    best = 100 * result["best"]["metrics"][result["main_metric"]]
    return f"**{scores(result['final'])}** ({best:.1f})"


def scores(evaluation: dict) -> str:
    """All metrics of an evaluation in percent."""
    return " / ".join(f"{100 * score:.1f}" for score in evaluation["metrics"].values())


if __name__ == "__main__":
    main(sys.argv[1:])
