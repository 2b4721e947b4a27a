"""The report on priming: relative gains over direct tuning, by algorithm, what was trained, PE kind and task.

What its numbers mean is said in docs/priming.md.
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from pats_jax import files
from pats_jax.priming.relative_gain import stage_place
from pats_jax.reporting import plots
from pats_jax.reporting.report_page import Page, aligned, code, plain

Summary = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

_NONE = "–"
_BASELINES = {  # key of an arm's numbers -> what it is compared with
    "against_direct": "direct tuning of the same PE kind",
    "against_full": "direct tuning of the whole model",
}


def write_report(folder: pathlib.Path, summary: Summary, *, title: str, about: Sequence[str]) -> None:
    """Writes report.json, report.md, report.html (one page with its pictures inside) and the pictures in ``plots/``.

    Args:
      folder: where to; made if need be.
      summary: what `relative_gain.summarise` gives.
      title: heading of the page.
      about: what the tunings were made with, a line each: commands, machine, settings. Shown as they are.
    """
    files.make_folder(folder)
    page = Page(plain(title))
    _write_gains(page, folder, summary)
    _write_arms(page, summary)
    _write_steps(page, folder, summary)
    _write_tasks(page, folder, summary)
    _write_time(page, summary)
    _write_limits(page, summary)
    page.heading("How it was made")
    page.code("\n".join(about))
    everything = json.dumps({"title": title, "about": list(about), **summary}, indent=2, allow_nan=False) + "\n"
    for name, text in (("report.json", everything), ("report.md", page.markdown()), ("report.html", page.html())):
        files.write_text(folder / name, text)


def table_lines(summary: Summary) -> list[str]:
    """The tables of gains as lines for a console, those against direct tuning first.

    Args:
      summary: what `relative_gain.summarise` gives.
    """
    lines = []
    for key, baseline in _BASELINES.items():
        if _compared(summary, key):
            header, rows = gain_table(summary, key)
            lines += [f"ARG in percent against {baseline} [95 % interval over tasks]"]
            lines += [f"  {line}" for line in aligned([header, *rows])]
    return lines or ["nothing to compare: no arm shares a task and sample with direct tuning"]


def gain_table(summary: Summary, key: str) -> Table:
    """Header and rows of the main table: upstream stage by PE kind, cells "ARG [low, high]" in percent.

    Args:
      summary: what `relative_gain.summarise` gives.
      key: ``against_direct`` or ``against_full``.
    """
    arms = _compared(summary, key).values()
    kinds = list(dict.fromkeys(arm["peft"] for arm in arms))
    cells = {(_stage(arm), arm["peft"]): _gain_cell(arm[key]) for arm in arms}
    stages = sorted({(arm["algorithm"], arm["trained"]) for arm in arms}, key=lambda stage: stage_place(*stage))
    rows = [
        [_stage_name(*stage), *(cells.get((_stage_name(*stage), kind), _NONE) for kind in kinds)] for stage in stages
    ]
    return ["upstream", *kinds], rows


def arm_table(summary: Summary) -> Table:
    """Header and rows of the details of the gains, a row for each arm and baseline."""
    header = ["arm", "against", "ARG", "sd of seeds", "seeds", "tasks", "left out", "tunings", "wins/ties/losses"]
    rows = []
    for key in _BASELINES:
        for name, arm in _compared(summary, key).items():
            found, baseline = arm[key], "direct/full" if key == "against_full" else f"direct/{arm['peft']}"
            counts = [len(found["seeds"]), found["tasks"], len(found["left_out"]), found["shared"]]
            balance = f"{found['wins']}/{found['ties']}/{found['losses']}"
            spread = _NONE if found["sd_seeds"] is None else f"{found['sd_seeds']:.1f}"
            rows.append([name, baseline, _gain_cell(found), spread, *map(str, counts), balance])
    return header, rows


def step_table(summary: Summary) -> Table:
    """Header and rows of the steps to the best dev score of direct tuning, a row an arm with an upstream stage."""
    header = ["arm", "tunings", "reached it", "median step of these", "median step of direct tuning"]
    rows = []
    for name, arm in summary["arms"].items():
        steps = arm["steps"]
        if steps is not None and arm["algorithm"] != "direct":
            median = _NONE if steps["median"] is None else f"{steps['median']:g}"
            share = f"{100 * steps['reached']:.0f} %"
            rows.append([name, str(len(steps["first"])), share, median, f"{steps['median_direct']:g}"])
    return header, rows


def task_table(summary: Summary, kind: str) -> Table:
    """Header and rows of the scores of a PE kind: a row a task, a column an arm, mean ± sd over samples, times 100.

    Args:
      summary: what `relative_gain.summarise` gives.
      kind: of PE modules; direct tuning of the whole model stands beside it.
    """
    arms = {name: arm for name, arm in summary["arms"].items() if arm["peft"] in (kind, "full")}
    columns = [name if arm["peft"] == "full" else _stage(arm) for name, arm in arms.items()]
    tasks = [task for task in summary["tasks"] if any(task in arm["tasks"] for arm in arms.values())]
    facts = {task: summary["tasks"][task] for task in tasks}
    rows = [
        [task, facts[task]["metric"], _points(facts[task]["chance"])]
        + [_score_cell(arm["tasks"].get(task)) for arm in arms.values()]
        for task in tasks
    ]
    means = [_points(arm["mean_test"]) for arm in arms.values()]
    return ["task", "metric", "chance", *columns], [*rows, ["mean of the column", "", _mean_chance(facts), *means]]


def time_table(summary: Summary) -> Table:
    """Header and rows of the time that tunings took, a row an arm."""
    rows = [
        [name, str(spent["tunings"]), f"{spent['median']:.3g}", f"{spent['total']:.0f}"]
        for name, arm in summary["arms"].items()
        if (spent := arm["seconds"]) is not None
    ]
    return ["arm", "tunings", "median seconds", "seconds of all"], rows


def _write_gains(page, folder, summary):
    page.paragraph(
        f"{summary['tunings']} few-shot tunings on {len(summary['tasks'])} tasks. ARG is the average relative gain: "
        "the mean over tasks of (P - P0)/P0 in percent, where P is a task's mean test score over its samples and P0 "
        "that of the baseline. In brackets, its 95 % bootstrap interval over tasks. Only tasks and samples that both "
        "have are in it."
    )
    for key, baseline in _BASELINES.items():
        page.heading(f"ARG against {baseline}")
        if _compared(summary, key):
            _table(page, *gain_table(summary, key))
        else:
            page.paragraph("Nothing to compare: no arm shares a task and sample with it.")
    panels = {
        f"against {baseline}": {
            name: (arm[key]["arg"], arm[key]["interval"])
            for name, arm in _compared(summary, key).items()
            if arm[key]["arg"] is not None
        }
        for key, baseline in _BASELINES.items()
    }
    if any(panels.values()):
        path = folder / "plots" / "average-gains.png"
        plots.plot_average_gains(path, panels)
        page.image(path, folder, "average relative gain by arm")


def _write_arms(page, summary):
    header, rows = arm_table(summary)
    if not rows:
        return
    page.heading("What the gains are made of")
    page.paragraph(
        "ARG is computed for every upstream seed and then averaged. `tunings` are those that have a partner of the "
        "same task and sample in the baseline. Wins, ties and losses count tasks, those left out of the ARG included."
    )
    _table(page, header, rows)
    left_out = [
        f"{code(name)} against {baseline}: " + ", ".join(code(task) for task in arm[key]["left_out"])
        for key, baseline in _BASELINES.items()
        for name, arm in _compared(summary, key).items()
        if arm[key]["left_out"]
    ]
    if left_out:
        page.paragraph("Tasks without a relative gain, as the baseline's score is 0 or below:")
        page.bullets(left_out)


def _write_steps(page, folder, summary):
    header, rows = step_table(summary)
    if not rows:
        return
    page.heading("Steps to the best dev score of direct tuning")
    page.paragraph(
        "For every task and sample, the first evaluated step at which the dev score is at least the best one of direct "
        "tuning of the same PE kind. Tunings that never reach it are in no median."
    )
    _table(page, header, rows)
    for kind in _kinds(summary):
        arms = [arm for arm in summary["arms"].values() if arm["peft"] == kind and arm["steps"] is not None]
        if any(arm["algorithm"] != "direct" for arm in arms):
            path = folder / "plots" / f"steps-{_file_name(kind)}.png"
            first = {_stage(arm): arm["steps"]["first"] for arm in arms}
            last = max(arm["steps"]["last"] for arm in arms)
            plots.plot_steps_to_score(path, first, last, f"{kind}: direct tuning's best dev score")
            page.image(path, folder, f"{kind}: share of tunings that reached direct tuning's best dev score, by step")


def _write_tasks(page, folder, summary):
    page.heading("Scores by task")
    page.paragraph(
        "Mean test score ± standard deviation over samples (n - 1, within an upstream seed), times 100, of all tunings "
        "that there are, those without a partner in the baseline included."
    )
    for kind in _kinds(summary) or ["full"]:
        page.heading(plain(kind), 3)
        _table(page, *task_table(summary, kind))
        gains = {
            _stage(arm): arm["against_direct"]["gains"]
            for arm in _compared(summary, "against_direct").values()
            if arm["peft"] == kind and arm["against_direct"]["gains"]
        }
        if gains:
            path = folder / "plots" / f"gains-{_file_name(kind)}.png"
            plots.plot_task_gains(path, gains, f"{kind}: gain over direct tuning")
            page.image(path, folder, f"{kind}: relative gain over direct tuning by task")


def _write_time(page, summary):
    header, rows = time_table(summary)
    if rows:
        page.heading("Time")
        page.paragraph("Of the tunings, as each recorded it; the upstream stage is not in it.")
        _table(page, header, rows)


def _write_limits(page, summary):
    page.heading("What this shows, and what it does not")
    seeds = {len(arm["seeds"]) for arm in summary["arms"].values() if arm["algorithm"] != "direct"}
    texts = [
        "The interval resamples tasks: it says what other tasks like these might give, nothing of other upstream "
        "seeds.",
        "A task with a low baseline weighs much in an ARG: from 5 to 10 points counts as 100 %. Look at the gains by "
        "task.",
        "The mean of a column mixes metrics, and is over the tasks that the arm has.",
        "No number is corrected for the number of arms on this page.",
    ]
    if 1 in seeds:
        texts.append("At least one arm has one upstream seed; how much another would change is not known.")
    short = [name for name, arm in summary["arms"].items() if _lacks_something(arm, summary["tasks"])]
    if short:
        names = ", ".join(map(code, short))
        texts.append(f"Not all tunings are there: these arms lack tasks or samples that others have: {names}.")
    page.bullets(texts)


def _table(page, header, rows):
    """Arms and tasks are named by whoever wrote the records."""
    page.table(list(map(plain, header)), [list(map(plain, row)) for row in rows])


def _lacks_something(arm, tasks):
    return any(task not in arm["tasks"] or arm["tasks"][task]["samples"] != tasks[task]["samples"] for task in tasks)


def _compared(summary, key):
    """Name -> arm, of those that are compared with the baseline of the key, without that baseline itself."""
    return {
        name: arm
        for name, arm in summary["arms"].items()
        if arm[key] is not None and arm["peft"] != "full" and (key, arm["algorithm"]) != ("against_direct", "direct")
    }


def _kinds(summary):
    return list(dict.fromkeys(arm["peft"] for arm in summary["arms"].values() if arm["peft"] != "full"))


def _stage(arm):
    return _stage_name(arm["algorithm"], arm["trained"])


def _stage_name(algorithm, trained):
    return algorithm if trained is None else f"{algorithm}, {trained}"


def _file_name(kind):
    return re.sub(r"[^A-Za-z0-9_-]", "_", kind)


def _gain_cell(found):
    if found["arg"] is None:
        return _NONE
    if found["interval"] is None:
        return f"{found['arg']:+.1f}"
    low, high = found["interval"]
    return f"{found['arg']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _score_cell(scores):
    if scores is None:
        return _NONE
    spread = "" if scores["sd_samples"] is None else f" ± {100 * scores['sd_samples']:.1f}"
    return _points(scores["mean"]) + spread


def _mean_chance(facts):
    return _points(sum(one["chance"] for one in facts.values()) / len(facts))


def _points(score):
    return f"{100 * score:.1f}"
