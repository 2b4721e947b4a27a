"""The report of a comparison in two forms: report.md, and report.html with embedded pictures."""

import json
import pathlib
from typing import Any

from pats_jax.comparison import seed_statistics
from pats_jax.core import files
from pats_jax.reporting import plots
from pats_jax.reporting.report_page import Page, code, plain


def write_report(
    root: pathlib.Path, summary: dict[str, Any], commands: list[str], machines: list[dict[str, str]]
) -> None:
    """Writes comparison.json, the plots, report.md and report.html.

    Args:
      root: the grid's folder.
      summary: the result of `seed_statistics.summarise`.
      commands: the commands that started the grid.
      machines: fact -> value, for each machine that ran a part of the grid.
    """
    everything = {"commands": commands, "machines": machines, **summary}
    files.write_text(root / "comparison.json", json.dumps(everything, indent=2, allow_nan=False) + "\n")
    page = Page("Comparison of fine-tuning methods")
    _write_overview(page, summary)
    for task, numbers in summary["tasks"].items():
        _write_task(page, root, task, numbers, summary["baseline"])
    _write_limits(page, summary)
    _write_origin(page, summary, commands, machines)
    files.write_text(root / "report.md", page.markdown())
    files.write_text(root / "report.html", page.html())


def score_table(numbers: dict[str, Any], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a task's table, one row per method: scores and differences in points (hundredths)."""
    header = ["method", "n", "mean", "sd", "min", "max", f"difference from {baseline}", "95 % interval", "p", "s/step"]
    rows = []
    for method, row in numbers["methods"].items():
        scores = [_points(row[name]) for name in ("mean", "sd", "min", "max")]
        seconds = "–" if row["seconds_per_step"] is None else f"{row['seconds_per_step']:.3g}"
        rows.append([method, str(row["n"]), *scores, *_difference_cells(row["difference"]), seconds])
    return header, rows


def _write_overview(page, summary):
    tasks = ", ".join(map(plain, summary["tasks"]))
    model = code(summary["settings"]["model_name_or_path"])
    page.paragraph(
        f"{model} fine-tuned on {tasks}. All runs share their settings; runs with the same seed also share the new "
        f"head, the order of examples and the dropout keys. Each method is compared with {code(summary['baseline'])} "
        "seed by seed."
    )
    if summary["missing"]:
        names = ", ".join(map(code, summary["missing"]))
        page.paragraph(f"{len(summary['missing'])} unfinished runs are left out of all numbers: {names}.")


def _write_task(page, root, task, numbers, baseline):
    methods = numbers["methods"]
    page.heading(plain(task))
    page.paragraph(
        f"Data: {plain(numbers['data'])}; {numbers['train_examples']} training rows, {numbers['eval_examples']} "
        f"validation rows. Scores are {code(numbers['metric'])} of the model that each run kept, times 100; the "
        f"majority class scores {_points(numbers['majority_class'])}."
    )
    header, rows = score_table(numbers, baseline)
    page.table(list(map(plain, header)), [list(map(plain, row)) for row in rows])
    notes = [
        f"{plain(method)}: {plain(note)}"
        for method, row in methods.items()
        for note in (row["difference"] or {}).get("notes", [])
    ]
    if notes:
        page.bullets(notes)
    folder = root / "plots"
    path = folder / f"{task}-scores.png"
    scores = {method: list(row["scores"].values()) for method, row in methods.items()}
    plots.plot_seeds(path, scores, numbers["metric"], numbers["majority_class"])
    page.image(path, root, f"{task}: scores by method")
    path = folder / f"{task}-curves.png"
    plots.plot_mean_curves(path, {method: row["curves"] for method, row in methods.items()}, numbers["metric"])
    page.image(path, root, f"{task}: loss and score by step")
    _write_concentration(page, root, task, methods)


def _write_concentration(page, root, task, methods):
    measured = {method: row["concentration"] for method, row in methods.items() if row["concentration"]}
    if not measured:
        return
    page.heading(f"{plain(task)}: sensitivity", 3)
    page.paragraph(
        "How evenly sensitivity, the mean of |θ·g| over some training batches, is spread over the encoder's matrices, "
        "before and after training (means over seeds). A Gini coefficient of 0 and an entropy of 1 mean evenly spread."
    )
    header = ["method", "Gini before", "after", "entropy before", "after", "top 10 % hold before", "after"]
    rows = [
        [
            plain(method),
            *(f"{one[when][name]['mean']:.4f}" for name in seed_statistics.FIGURES for when in ("before", "after")),
        ]
        for method, one in measured.items()
    ]
    page.table(header, rows)
    histograms = {method: one["histogram"] for method, one in measured.items() if one["histogram"]}
    if histograms:
        first = next(iter(histograms.values()))
        path = root / "plots" / f"{task}-sensitivity.png"
        after = {method: one["after"] for method, one in histograms.items()}
        plots.plot_histograms(path, first["edges"], first["before"], after)
        page.image(path, root, f"{task}: distribution of sensitivity")


def _write_limits(page, summary):
    differences = [
        row["difference"]
        for numbers in summary["tasks"].values()
        for row in numbers["methods"].values()
        if row["difference"] and row["difference"]["seeds"]
    ]
    page.heading("How to read these numbers")
    settings = summary["settings"]
    texts = []
    for count in sorted({len(one["seeds"]) for one in differences}):
        smallest = seed_statistics.smallest_p_value(count)
        below = "so none can be below 0.05" if smallest >= 0.05 else "if all differences have the same sign"
        texts.append(
            f"With {count} paired seed{'s' * (count > 1)} the smallest two-sided p of Wilcoxon's signed-rank test is "
            f"2/2^{count} = {smallest:.4g}, {below}."
        )
    if differences:
        texts += [
            "p is from that test, on the differences seed by seed. The interval is a BCa bootstrap of their mean; it "
            "is too narrow for few seeds, so treat it as a hint with fewer than about ten.",
            f"Comparisons on this page: {len(differences)}. The p-values are not corrected for multiple comparisons.",
        ]
    else:
        texts.append("Nothing is compared: no two methods share a finished seed.")
    texts.append("Seeds vary the head, the order and the noise on one split of the data; other data may differ.")
    if settings["load_best_model_at_end"]:
        texts.append(
            "The scores are those of each run's best evaluation (`--load_best_model_at_end`), selected on the same "
            "rows that they are measured on, so they are too high for all methods."
        )
    else:
        texts.append("The scores are those of the last step, not of the best evaluation.")
    texts += [
        "All methods ran with the same hyperparameters; a method that needs different ones is not shown at its best.",
        "Seconds per step are medians of the logged lines, without the first line of each run, which includes "
        "compilation. Other work on the machine, including other runs of this grid, slows them.",
    ]
    if settings["data_dir"] == "builtin":
        texts.append("The data is generated, not GLUE; do not compare its scores with any others.")
    if any(len(found) > 1 for found in summary["versions"].values()):
        texts.append("Not all runs used the same versions; see below.")
    page.bullets(texts)


def _write_origin(page, summary, commands, machines):
    page.heading("How this report was made")
    page.code("\n".join(commands))
    versions = ", ".join(plain(f"{name} {' and '.join(found)}") for name, found in summary["versions"].items())
    places = [plain("; ".join(f"{name}: {value}" for name, value in machine.items())) for machine in machines]
    page.bullets([f"Versions: {versions}", *(f"Machine: {place}" for place in places)])
    page.heading("Settings of all runs", 3)
    given = {name: value for name, value in summary["settings"].items() if value is not None}
    page.table(["setting", "value"], [[plain(name), code(value)] for name, value in given.items()])


def _difference_cells(difference):
    if difference is None or difference["mean"] is None:
        return ["–"] * 3
    interval, p_value = difference["interval"], difference["p_value"]
    return [
        f"{100 * difference['mean']:+.2f}",
        "–" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}",
        "–" if p_value is None else f"{p_value:.3g}",
    ]


def _points(score):
    return "–" if score is None else f"{100 * score:.2f}"
