"""What the study found: paired differences to plain fine-tuning, corrected tests, a figure, a table in Markdown.

The noise scale of a method with several is chosen on the first half of the seeds, by its mean difference to plain over
all tasks, and reported on the other half. Differences are in points: hundredths of the task's main metric.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.study import data, grid, run
from pats_jax.comparison.seed_statistics import holm, paired_difference, pooled_difference
from pats_jax.core.files import write_json, write_text
from pats_jax.errors import InputError

Scores = dict[tuple[str, float], dict[str, dict[int, float]]]  # (method, scale) -> task -> seed -> score

HARMLESS = -0.5  # points: a setting whose interval lies above it does no harm
FIGURES = ("gini", "entropy", "top_10_percent_share")


def read_runs(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of runs.jsonl."""
    if not path.is_file():
        raise InputError(f"{path}: not found; run the study first")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [run.read_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def table_of(records: Iterable[dict[str, Any]]) -> Scores:
    """Final scores in points, without the seeds that chose the learning rate."""
    table: Scores = {}
    for record in records:
        if record["seed"] < grid.RATE_SEEDS[0]:
            by_task = table.setdefault((record["method"], record["noise_scale"]), {})
            by_task.setdefault(record["task"], {})[record["seed"]] = 100 * record["final"]
    return table


def differences(table: Scores, setting: tuple[str, float], base: tuple[str, float], seeds: Iterable[int]) -> dict:
    """Task -> seed -> score of a setting less that of another, over the seeds that both have."""
    wanted, found = set(seeds), {}
    for task, scores in table.get(setting, {}).items():
        other = table.get(base, {}).get(task, {})
        common = sorted(wanted & scores.keys() & other.keys())
        if common:
            found[task] = {seed: scores[seed] - other[seed] for seed in common}
    return found


def pooled(by_task: dict[str, dict[int, float]]) -> dict[str, Any]:
    """`pooled_difference` as a dict: ``mean``, ``interval``, ``p_value`` and ``counts``."""
    found = dataclasses.asdict(pooled_difference(by_task))
    return {name: found[name] for name in ("mean", "interval", "p_value", "counts")}


def of_part(table: Scores, name: str) -> Scores:
    """Plain fine-tuning and the arms of a part of the study, on its tasks."""
    part = grid.PARTS[name]
    chosen = {
        setting: {task: by_task[task] for task in part.tasks if task in by_task}
        for setting, by_task in table.items()
        if setting[0] == grid.PLAIN or setting[0] in part.arms
    }
    return {setting: by_task for setting, by_task in chosen.items() if by_task}


def halves(table: Scores) -> tuple[list[int], list[int]]:
    """The seeds that settings are chosen on, and those that they are reported on."""
    seeds = sorted({seed for by_task in table.values() for scores in by_task.values() for seed in scores})
    return seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All numbers of the report.

    Returns:
      ``tasks``; ``seeds`` for the choice and the report; ``rates``: task -> learning rate; ``plain``: task -> mean and
      sd; ``settings``: every setting over all seeds; ``methods``: method -> its chosen setting on the seeds of the
      report, with ``p_holm``; ``against_controls``: PATS less each control at each scale; ``default``: see
      `default_scale`; ``concentration``: see `correlations`; ``diverged``: how many trainings did. These are of the
      first part; ``parts``, if there are trainings of others, has name -> ``tasks``, ``plain``, ``settings`` and
      ``methods`` of each. Holm's correction is over the methods of all parts.
    """
    table = table_of(records)
    choice, rest = halves(table)
    first, *others = grid.PARTS
    parts = {name: _of_part(of_part(table, name), name, choice, rest) for name in grid.PARTS}
    own = parts[first]
    if not own["tasks"]:
        tasks = ", ".join(grid.PARTS[first].tasks)
        raise InputError(f"no training of plain fine-tuning on {tasks} is finished; there is nothing to compare with")
    _add_holm([one for part in parts.values() for one in part["methods"].values()])
    found = {
        "tasks": own["tasks"],
        "seeds": {"choice": choice, "report": rest},
        "rates": {record["task"]: record["learning_rate"] for record in records if record["seed"] in choice},
        **{name: own[name] for name in ("plain", "settings", "methods")},
        "against_controls": list(_against_controls(of_part(table, first), [*choice, *rest])),
        "default": default_scale(own["settings"], own["methods"].get("pats")),
        "concentration": correlations(records),
        "diverged": sum(record["diverged"] for record in records),
    }
    begun = {name: parts[name] for name in others if parts[name]["settings"]}
    return found | ({"parts": begun} if begun else {})


def _of_part(table, name, choice, rest):
    """The numbers of a part; ``p_holm`` is still to be added."""
    plain = (grid.PLAIN, 0.0)
    found = table.get(plain, {})
    tasks = [task for task in grid.PARTS[name].tasks if task in found]
    return {
        "tasks": tasks,
        "plain": {task: _spread(found[task].values()) for task in tasks},
        "settings": [
            {"method": method, "noise_scale": scale, **_compared(table, (method, scale), plain, [*choice, *rest])}
            for method, scale in sorted(table)
            if method != grid.PLAIN
        ],
        "methods": _chosen(table, grid.PARTS[name].arms, choice, rest),
    }


def _against_controls(table, seeds):
    """PATS against each other arm of the first part, at each scale that both were trained at."""
    for control in (name for name in grid.PARTS["a"].arms if name != "pats"):
        for scale in sorted(scale for method, scale in table if method == control and ("pats", scale) in table):
            compared = _compared(table, ("pats", scale), (control, scale), seeds)
            yield {"method": control, "noise_scale": scale, **compared}


def _add_holm(methods):
    """Adds ``p_holm`` to the numbers of methods."""
    adjusted = holm({number: one["pooled"]["p_value"] for number, one in enumerate(methods)})
    for number, one in enumerate(methods):
        one["p_holm"] = adjusted[number]


def _spread(scores):
    values = np.array(list(scores))
    return {"n": len(values), "mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0}


def _compared(table, setting, base, seeds):
    """A setting against another: pooled, and by task."""
    found = differences(table, setting, base, seeds)
    by_task = {
        task: paired_difference({seed: table[setting][task][seed] for seed in values}, table[base][task])
        for task, values in found.items()
    }
    kept = ("mean", "interval", "p_value")
    return {
        "pooled": pooled(found),
        "tasks": {task: {k: getattr(one, k) for k in kept} for task, one in by_task.items()},
    }


def _chosen(table, names, choice, rest):
    """Method -> the scale with the best mean on the seeds of the choice, and its differences on the others.

    A method with one setting has nothing to choose: its differences are over all seeds.
    """
    methods, plain = {}, (grid.PLAIN, 0.0)
    for method in names:
        scales = [scale for name, scale in table if name == method]
        means = {scale: pooled(differences(table, (method, scale), plain, choice)) for scale in scales}
        means = {scale: one["mean"] for scale, one in means.items() if one["mean"] is not None}
        if means:
            best = max(means, key=lambda scale: means[scale])
            methods[method] = {"noise_scale": best, "on_choice": means[best]}
            seeds = rest if len(means) > 1 else [*choice, *rest]
            methods[method] |= _compared(table, (method, best), plain, seeds)
    return {name: one for name, one in methods.items() if one["pooled"]["mean"] is not None}


def default_scale(settings: Sequence[dict[str, Any]], chosen: dict[str, Any] | None) -> dict[str, Any]:
    """The noise scale that follows: PATS's chosen one if it gains, else the largest that does no harm.

    It gains if its mean on the seeds of the report is above 0, with an interval and Holm's p below 0.05; a scale does
    no harm if the interval of its pooled difference, over all seeds, lies above -0.5 points.
    """
    if chosen and chosen["pooled"]["mean"] > 0 and chosen["pooled"]["interval"] and chosen["p_holm"] < 0.05:
        return {"noise_scale": chosen["noise_scale"], "why": "it gains"}
    harmless = [
        one["noise_scale"]
        for one in settings
        if one["method"] == "pats" and one["pooled"]["interval"] and one["pooled"]["interval"][0] > HARMLESS
    ]
    return {"noise_scale": max(harmless, default=None), "why": "no setting gains; the largest that does no harm"}


def correlations(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's correlation over runs of the concentration of sensitivity with the score, within each task.

    Over all trainings of PATS and its controls with the chosen learning rate, and over those of plain fine-tuning
    alone.
    """
    found: dict[str, Any] = {}
    names = {grid.PLAIN, *grid.PARTS["a"].arms}
    for task in grid.TASKS:
        runs = [one for one in records if one["task"] == task and one["seed"] < grid.RATE_SEEDS[0]]
        runs = [one for one in runs if one["method"] in names]
        groups = {"all": runs, "plain": [one for one in runs if one["method"] == "plain"]}
        for name, group in groups.items():
            scores = [one["final"] for one in group]
            for figure in FIGURES:
                values = [one["sensitivity"][figure] for one in group]
                if len(set(values)) > 2 and len(set(scores)) > 2:
                    result = scipy.stats.spearmanr(values, scores)
                    row = {"rho": float(result.statistic), "p_value": float(result.pvalue), "n": len(group)}
                    found.setdefault(task, {}).setdefault(name, {})[figure] = row
    return found


_PLAIN_HEAD = ("task", "learning rate", "seeds", "plain, mean", "sd")


def as_markdown(summary: dict[str, Any]) -> str:
    """The report as a page of tables."""
    tasks = summary["tasks"]
    choice, rest = (len(summary["seeds"][part]) for part in ("choice", "report"))
    lines = [
        f"Differences to plain fine-tuning in points, with 95 % intervals. The noise scale of a method with several is "
        f"chosen on {choice} seeds and reported on {rest} others.",
        "",
        *_rows(_PLAIN_HEAD, _plain_rows(summary, summary)),
        "",
        *_method_lines(summary),
        "",
        "PATS less each control, over all seeds:",
        "",
        *_setting_lines("control", tasks, summary["against_controls"]),
        "",
        "Concentration of sensitivity at the end and score, Spearman's correlation over runs (p):",
        "",
        *_rows(("task", "runs", "n", *FIGURES), _correlation_rows(summary["concentration"])),
        "",
        f"Default noise scale: {summary['default']['noise_scale']} ({summary['default']['why']}).",
        f"Trainings that diverged: {summary['diverged']}.",
    ]
    for name, part in summary.get("parts", {}).items():
        lines += ["", *_lines_of_part(grid.PARTS[name].title, part, summary)]
    return "\n".join(lines) + "\n"


def _lines_of_part(title, part, summary):
    """The tables of a further part, whose plain trainings may be those of the first."""
    tasks = part["tasks"]
    if tasks != summary["tasks"]:
        yield from (f"{title}: plain fine-tuning.", "", *_rows(_PLAIN_HEAD, _plain_rows(summary, part)), "")
    if not any(one["noise_scale"] for one in part["settings"]):
        yield f"{title}, over all seeds, as no setting is chosen. Holm's correction is over the methods of all tables."
        rows = ((method, *cells) for method, _, *cells in _method_rows(part))
        yield from ("", *_rows(("method", *_columns(tasks), "p", "p, Holm"), rows))
        return
    yield f"{title}, chosen and reported as above. Holm's correction is over the methods of all tables."
    yield from ("", *_method_lines(part))


def _method_lines(part):
    """The table of methods and, if a noise scale was chosen, that of every setting."""
    tasks = part["tasks"]
    yield from _rows(("method", "noise scale", *_columns(tasks), "p", "p, Holm"), _method_rows(part))
    if len(part["settings"]) > len(part["methods"]):
        yield from ("", "Every setting, over all seeds:", "", *_setting_lines("method", tasks, part["settings"]))


def _setting_lines(name, tasks, settings):
    return _rows((name, "noise scale", *_columns(tasks), "p"), (_setting_row(one, tasks) for one in settings))


def _columns(tasks):
    return [*tasks, "all tasks"] if len(tasks) > 1 else tasks


def _rows(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _plain_rows(summary, part):
    for task, spread in part["plain"].items():
        yield task, f"{summary['rates'].get(task, 0):g}", spread["n"], f"{spread['mean']:.2f}", f"{spread['sd']:.2f}"


def _method_rows(part):
    for method, one in part["methods"].items():
        pair = _p_value(one["pooled"]["p_value"], 4), _p_value(one["p_holm"], 4)
        yield method, f"{one['noise_scale']:g}", *_cells(one, part["tasks"]), *pair


def _setting_row(one, tasks):
    p_value = one["pooled"]["p_value"]
    setting = one["method"], f"{one['noise_scale']:g}"
    return *setting, *_cells(one, tasks), "" if p_value is None else _p_value(p_value, 4)


def _p_value(value, digits):
    """With so many digits after the point, or as smaller than the smallest such number."""
    return f"{value:.{digits}f}" if value >= 0.5 * 10**-digits else f"< {10**-digits:.{digits}f}"


def _cells(one, tasks):
    by_column = {**one["tasks"], "all tasks": one["pooled"]}
    return [_difference(by_column.get(column)) for column in _columns(tasks)]


def _difference(found):
    if not found or found["mean"] is None:
        return ""
    interval = found["interval"]
    return f"{found['mean']:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def _correlation_rows(found):
    for task, groups in found.items():
        for name, figures in groups.items():
            cells = [f"{one['rho']:+.2f} ({_p_value(one['p_value'], 3)})" for one in figures.values()]
            yield task, name, next(iter(figures.values()))["n"], *cells


def draw(path: pathlib.Path, summary: dict[str, Any], table: Scores) -> None:
    """Score of the first part against noise scale, a panel for each task, and the pooled difference to plain."""
    from matplotlib.figure import Figure

    tasks = summary["tasks"]
    figure = Figure(figsize=(3.4 * (len(tasks) + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, len(tasks) + 1, squeeze=False)[0]
    methods = [name for name in grid.PARTS["a"].arms if any(method == name for method, _ in table)]
    for panel, task in zip(axes, tasks, strict=False):
        spread = summary["plain"][task]
        error = scipy.stats.t.ppf(0.975, max(spread["n"] - 1, 1)) * spread["sd"] / spread["n"] ** 0.5
        panel.axhspan(spread["mean"] - error, spread["mean"] + error, color="0.88")
        panel.axhline(spread["mean"], color="0.4", label="plain")
        panel.set(title=f"{task}: {data.main_metric(task)}", ylabel="points")
        for method in methods:
            points = {scale: table[name, scale].get(task) for name, scale in sorted(table) if name == method}
            rows = [(scale, _spread(scores.values())) for scale, scores in points.items() if scores]
            heights = [1.96 * one["sd"] / one["n"] ** 0.5 for _, one in rows]
            panel.errorbar([x for x, _ in rows], [one["mean"] for _, one in rows], heights, marker="o", label=method)
    for method in methods:
        rows = [one for one in summary["settings"] if one["method"] == method and one["pooled"]["interval"]]
        means = np.array([one["pooled"]["mean"] for one in rows])
        bounds = np.abs(np.array([one["pooled"]["interval"] for one in rows]).T - means)
        axes[-1].errorbar([one["noise_scale"] for one in rows], means, bounds, marker="o", label=method)
    axes[-1].axhline(0, color="0.4", label="plain")
    axes[-1].set(title="all tasks: difference to plain", ylabel="points")
    for panel in axes:
        panel.set(xscale="log", xlabel="noise_scale")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def report(flags: argparse.Namespace) -> None:
    """The command."""
    records = read_runs(data.records_file(flags.output_dir))
    summary, folder = summarise(records), pathlib.Path(flags.output_dir)
    page = as_markdown(summary)
    write_json(folder / "study.json", summary)
    write_text(folder / "study.md", page)
    draw(folder / "study.png", summary, of_part(table_of(records), "a"))
    print(page)
