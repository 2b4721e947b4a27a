"""The report of a comparison in two forms: report.md, and report.html with embedded pictures."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable

from pats_jax.comparison import seed_statistics
from pats_jax.comparison.seed_statistics import ArmNumbers, Comparison, Difference, Pooled, TaskNumbers
from pats_jax.core import files
from pats_jax.reporting import plots
from pats_jax.reporting.report_page import Page, code, plain
from pats_jax.training.settings import counted

_NONE = "–"
_SIGNIFICANT = 0.05


def write_report(root: pathlib.Path, summary: Comparison, commands: list[str], machines: list[dict[str, str]]) -> None:
    """Writes comparison.json, the plots, report.md and report.html.

    Args:
      root: the grid's folder.
      summary: the result of `seed_statistics.summarise`.
      commands: the commands that started the grid.
      machines: fact -> value, for each machine that ran a part of the grid.
    """
    everything = {"commands": commands, "machines": machines, **dataclasses.asdict(summary)}
    files.write_text(root / "comparison.json", json.dumps(everything, indent=2, allow_nan=False) + "\n")
    page = Page("Comparison of fine-tuning methods")
    page.paragraph(answer(summary))
    _write_overview(page, root, summary)
    for task, numbers in summary.tasks.items():
        _write_task(page, root, task, numbers, summary.baseline)
    _write_limits(page, summary)
    _write_origin(page, summary, commands, machines)
    files.write_text(root / "report.md", page.markdown())
    files.write_text(root / "report.html", page.html())


# the answer


def answer(summary: Comparison) -> str:
    """What the comparison shows, in one sentence: a page's text."""
    found = {name: one for name, one in summary.pooled.items() if one.mean is not None}
    if not found:
        return "Nothing is compared yet: no two methods share a finished seed."
    over = " on average over tasks" if len(summary.tasks) > 1 else f" on {plain(*summary.tasks)}"
    if len(found) == 1:
        ((name, one),) = found.items()
        return f"{_stands(name, one)}{over}{_interval_text(one)}: {_verdict(one)}."
    shown = {name: one for name, one in found.items() if _differs(one)}
    largest = max(shown or found, key=lambda name: abs(found[name].mean or 0.0))
    effect = f"{_stands(largest, found[largest])}{over}{_interval_text(found[largest])}"
    if not shown:
        others = _names(found.values())
        other = plain(*others) if len(others) == 1 else "what it is compared with"
        none = f"None of {len(found)} methods is shown to differ from {other}"
        return f"{none}. The largest difference: {effect}."
    others = [name for name in shown if name != largest]
    text = f"{effect}: {_verdict(found[largest])}."
    if others:
        text += f" Also shown to differ: {', '.join(map(plain, others))}."
    if len(shown) < len(found):
        text += f" Not shown to differ: {', '.join(plain(name) for name in found if name not in shown)}."
    return text


def _names(rows: Iterable[ArmNumbers | Pooled]) -> list[str]:
    """What these are compared with, each once."""
    return list(dict.fromkeys(row.baseline for row in rows if row.baseline is not None))


def _stands(name: str, one: Pooled) -> str:
    points, baseline = 100 * (one.mean or 0.0), str(one.baseline)
    if abs(points) < 0.005:
        return f"{plain(name)} scores the same as {plain(baseline)}"
    return f"{plain(name)} is {abs(points):.2f} points {'above' if points > 0 else 'below'} {plain(baseline)}"


def _interval_text(one: Pooled) -> str:
    return "" if one.interval is None else f" (95 % interval {_range(one.interval)})"


def _differs(one: Pooled) -> bool:
    """Whether it is shown to differ: not without an interval, for then its differences show no spread."""
    return one.interval is not None and one.holm_p_value is not None and one.holm_p_value < _SIGNIFICANT


def _verdict(one: Pooled) -> str:
    if _differs(one):
        return f"shown to differ (p = {one.holm_p_value:.2g} after Holm's correction)"
    return "not shown to differ"


def _range(interval: list[float]) -> str:
    return f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


# tables


def score_table(numbers: TaskNumbers, baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a task's table, one row per arm: differences and scores in points (hundredths).

    Args:
      numbers: of the task.
      baseline: what the table names as the baseline if no arm has another.
    """
    others, rows = _names(numbers.methods.values()) or [baseline], []
    for method, row in numbers.methods.items():
        scores = [_points(score) for score in (row.mean, row.sd, row.min, row.max)]
        seconds = _NONE if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}"
        rows.append([method, *_difference_cells(row, row.difference, others), str(row.n), *scores, seconds])
    return [*_difference_header(others), "n", "mean", "sd", "min", "max", "s/step"], rows


def pooled_table(summary: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the differences over all tasks, one row per arm."""
    pooled = summary.pooled
    others = _names(pooled.values()) or [summary.baseline]
    rows = [[name, *_difference_cells(one, one, others), str(sum(one.counts.values()))] for name, one in pooled.items()]
    return [*_difference_header(others), "pairs"], rows


def _difference_header(others: list[str]) -> list[str]:
    if len(others) == 1:
        return ["method", f"difference from {others[0]}", "95 % interval", "p", "p (Holm)"]
    return ["method", "difference", "95 % interval", "p", "p (Holm)", "compared with"]


def _difference_cells(row: ArmNumbers | Pooled, difference: Difference | Pooled | None, others: list[str]) -> list[str]:
    baseline = [] if len(others) == 1 else [row.baseline or _NONE]
    if difference is None or difference.mean is None:
        return [*[_NONE] * 4, *baseline]
    p_values = [_NONE if p is None else f"{p:.3g}" for p in (difference.p_value, difference.holm_p_value)]
    interval = _NONE if difference.interval is None else _range(difference.interval)
    return [f"{100 * difference.mean:+.2f}", interval, *p_values, *baseline]


def _points(score: float | None) -> str:
    return _NONE if score is None else f"{100 * score:.2f}"


# sections


def _write_overview(page: Page, root: pathlib.Path, summary: Comparison) -> None:
    others = _names(summary.pooled.values())
    panels = {task: _effects(numbers) for task, numbers in summary.tasks.items()}
    panels = {task: effects for task, effects in panels.items() if effects}
    if panels:
        path = root / "plots" / "differences.png"
        other = summary.baseline if len(others) < 2 else "what each is compared with"
        plots.plot_effects(path, panels, f"points above {other}, with 95 % interval")
        page.image(path, root, f"Differences from {other}. {_without_code(answer(summary))}")
    tasks = ", ".join(map(plain, summary.tasks))
    listed = ", ".join(map(code, summary.listed))
    share = f"All runs share their settings, except {listed}" if listed else "All runs share their settings"
    with_whom = f"with {code(summary.baseline)}" if len(others) < 2 else "with the arm that its row names,"
    head = "the new head, " if summary.program == "glue" else ""
    page.paragraph(
        f"{code(summary.settings['model_name_or_path'])} fine-tuned on {tasks}. {share}; runs "
        f"with the same seed also share {head}the order of examples and the dropout keys. Each method is "
        f"compared {with_whom} seed by seed. A point is a hundredth of the score."
    )
    if len(summary.tasks) > 1 and summary.pooled:
        page.heading("All tasks")
        header, rows = pooled_table(summary)
        caption = "The mean over tasks of the mean difference, in points"
        page.table(list(map(plain, header)), [list(map(plain, row)) for row in rows], caption)
    if summary.missing:
        names = ", ".join(map(code, summary.missing))
        page.paragraph(f"{len(summary.missing)} unfinished runs are left out of all numbers: {names}.")


def _effects(numbers: TaskNumbers) -> dict[str, tuple[float, list[float] | None]]:
    """Method -> its difference in points, and the interval."""
    found = {}
    for method, row in numbers.methods.items():
        difference = row.difference
        if difference is not None and difference.mean is not None:
            interval = None if difference.interval is None else [100 * end for end in difference.interval]
            found[method] = (100 * difference.mean, interval)
    return found


def _without_code(text: str) -> str:
    return text.replace("`", "")


def _write_task(page: Page, root: pathlib.Path, task: str, numbers: TaskNumbers, baseline: str) -> None:
    methods = numbers.methods
    page.heading(plain(task))
    times = "" if numbers.metric in seed_statistics.LARGEST else ", times 100"
    majority = numbers.majority_class
    majority_text = "" if majority is None else f"; the majority class scores {_points(majority)}"
    page.paragraph(
        f"Data: {plain(numbers.data)}; {numbers.train_examples} training rows, {numbers.eval_examples} "
        f"validation rows. Scores are {code(numbers.metric)} of the model that each run kept{times}{majority_text}."
    )
    header, rows = score_table(numbers, baseline)
    caption = f"{plain(task)}: differences and scores, in points"
    page.table(list(map(plain, header)), [list(map(plain, row)) for row in rows], caption)
    notes = [
        f"{plain(method)}: {plain(note)}"
        for method, row in methods.items()
        for note in (row.difference.notes if row.difference else ())
    ]
    if notes:
        page.bullets(notes)
    folder = root / "plots"
    path = folder / f"{task}-scores.png"
    scores = {method: list(row.scores.values()) for method, row in methods.items()}
    plots.plot_seeds(path, scores, numbers.metric, numbers.majority_class)
    best = max(methods, key=lambda method: methods[method].mean)
    page.image(
        path,
        root,
        f"{task}: scores by method, a dot a seed; {best} has the highest mean, {_points(methods[best].mean)}",
    )
    curves = {method: row.curves for method, row in methods.items()}
    if any(len(curve.step) > 1 for of_method in curves.values() for curve in of_method.values()):
        path = folder / f"{task}-curves.png"
        plots.plot_mean_curves(path, curves, numbers.metric)
        page.image(path, root, f"{task}: training loss and validation score by step, means and ranges of the seeds")
    _write_concentration(page, root, task, methods)


def _write_concentration(page: Page, root: pathlib.Path, task: str, methods: dict[str, ArmNumbers]) -> None:
    measured = {method: row.concentration for method, row in methods.items() if row.concentration}
    if not measured:
        return
    page.heading(f"{plain(task)}: sensitivity", 3)
    page.paragraph(
        "How evenly sensitivity, the mean of |θ·g| over some training batches, is spread over the matrices of the "
        "layers, before and after training (means over seeds). A Gini coefficient of 0 and an entropy of 1 mean evenly "
        "spread."
    )
    header = ["method", "Gini before", "after", "entropy before", "after", "top 10 % hold before", "after"]
    rows = [
        [
            plain(method),
            *(f"{when[name].mean:.4f}" for name in seed_statistics.FIGURES for when in (one.before, one.after)),
        ]
        for method, one in measured.items()
    ]
    page.table(header, rows, f"{plain(task)}: concentration of sensitivity")
    histograms = {method: one.histogram for method, one in measured.items() if one.histogram}
    if histograms:
        first = next(iter(histograms.values()))
        path = root / "plots" / f"{task}-sensitivity.png"
        after = {method: one["after"] for method, one in histograms.items()}
        plots.plot_histograms(path, first["edges"], first["before"], after)
        page.image(path, root, f"{task}: distribution of sensitivity before training, and after it with each method")


def _write_limits(page: Page, summary: Comparison) -> None:
    differences = [
        row.difference
        for numbers in summary.tasks.values()
        for row in numbers.methods.values()
        if row.difference and row.difference.seeds
    ]
    page.heading("How to read these numbers")
    settings = summary.settings
    texts = []
    for count in sorted({len(one.seeds) for one in differences}):
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
            f"p (Holm) is corrected for the {counted(len(differences), 'comparison')} by task on this page. A method "
            "is shown to differ if its p over all tasks, corrected for the methods, is below 0.05, and there is an "
            "interval: equal differences, or a single one, show no spread, so they have none.",
        ]
    else:
        texts.append("Nothing is compared: no two methods share a finished seed.")
    head = "the head, " if summary.program == "glue" else ""
    texts.append(f"Seeds vary {head}the order and the noise on one split of the data; other data may differ.")
    if settings["load_best_model_at_end"]:
        texts.append(
            "The scores are those of each run's best evaluation (`--load_best_model_at_end`), selected on the same "
            "rows that they are measured on, so they are too high for all methods."
        )
    else:
        texts.append("The scores are those of the last step, not of the best evaluation.")
    if summary.listed:
        texts.append(
            "The best of several settings of a method was found on the rows that score it, so its score is too high; "
            "compare methods under the same settings, or score the best one on other rows."
        )
    else:
        texts.append(
            "All methods ran with the same hyperparameters; a method that needs others is not shown at its best."
        )
    texts += [
        "Seconds per step are medians of the logged lines, without the first line of each run, which includes "
        "compilation. Other work on the machine, including other runs of this grid, slows them.",
    ]
    if settings.get("data_dir") == "builtin":
        texts.append("The data is generated, not GLUE; do not compare its scores with any others.")
    if any(len(found) > 1 for found in summary.versions.values()):
        texts.append("Not all runs used the same versions; see below.")
    page.bullets(texts)


def _write_origin(page: Page, summary: Comparison, commands: list[str], machines: list[dict[str, str]]) -> None:
    page.heading("How this report was made")
    page.code("\n".join(commands))
    versions = ", ".join(plain(f"{name} {' and '.join(found)}") for name, found in summary.versions.items())
    places = [plain("; ".join(f"{name}: {value}" for name, value in machine.items())) for machine in machines]
    page.bullets([f"Versions: {versions}", *(f"Machine: {place}" for place in places)])
    given = {name: value for name, value in summary.settings.items() if value is not None}
    with page.folded("Settings of all runs"):
        page.table(["setting", "value"], [[plain(name), code(value)] for name, value in given.items()])
