"""The report on priming: relative gains over direct tuning, by algorithm, trained part, PEFT method and task.

docs/priming.md explains the numbers.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Literal

from pats_jax.core import files
from pats_jax.priming.relative_gain import ArmNumbers, Gain, GymSummary, TaskFacts, TaskScores, stage_place
from pats_jax.reporting import plots
from pats_jax.reporting.report_page import Page, aligned, code, plain

Table = tuple[list[str], list[list[str]]]

Baseline = Literal["against_direct", "against_full"]

_NONE = "–"
_BASELINES: dict[Baseline, str] = {  # key of an arm's numbers -> what it is compared with
    "against_direct": "direct tuning with the same PEFT method",
    "against_full": "direct tuning of the whole model",
}


def write_report(folder: pathlib.Path, summary: GymSummary, *, title: str, about: Sequence[str]) -> None:
    """Writes report.json, report.md, report.html (one page with embedded pictures) and the pictures in ``plots/``.

    Args:
      folder: where to write; created if missing.
      summary: the result of `relative_gain.summarise`.
      title: heading of the page.
      about: lines that describe the tunings (commands, machine, settings), shown verbatim.
    """
    files.make_folder(folder)
    page = Page(plain(title))
    _write_gains(page, folder, summary)
    _write_arms(page, summary)
    _write_steps(page, folder, summary)
    _write_tasks(page, folder, summary)
    _write_time(page, summary)
    _write_limits(page, summary)
    with page.folded("How this report was made: commands, machine, settings"):
        page.code("\n".join(about))
    everything = (
        json.dumps({"title": title, "about": list(about), **dataclasses.asdict(summary)}, indent=2, allow_nan=False)
        + "\n"
    )
    for name, text in (("report.json", everything), ("report.md", page.markdown()), ("report.html", page.html())):
        files.write_text(folder / name, text)


def table_lines(summary: GymSummary) -> list[str]:
    """The tables of gains as lines for a console; gains over direct tuning come first.

    Args:
      summary: the result of `relative_gain.summarise`.
    """
    lines = []
    for key, baseline in _BASELINES.items():
        if _compared(summary, key):
            header, rows = gain_table(summary, key)
            lines += [f"ARG in percent against {baseline} [95 % interval over tasks]"]
            lines += [f"  {line}" for line in aligned([header, *rows])]
    return lines or ["nothing to compare: no arm shares a task and sample with direct tuning"]


def gain_table(summary: GymSummary, key: Baseline) -> Table:
    """Header and rows of the main table: upstream stage by PEFT method, cells "ARG [low, high]" in percent.

    Args:
      summary: the result of `relative_gain.summarise`.
      key: ``against_direct`` or ``against_full``.
    """
    compared = _compared(summary, key).values()
    kinds = list(dict.fromkeys(arm.peft for arm, _ in compared))
    cells = {(_stage(arm), arm.peft): _gain_cell(gain) for arm, gain in compared}
    stages = sorted({(arm.algorithm, arm.trained) for arm, _ in compared}, key=lambda stage: stage_place(*stage))
    rows = [
        [_stage_name(*stage), *(cells.get((_stage_name(*stage), kind), _NONE) for kind in kinds)] for stage in stages
    ]
    return ["upstream", *kinds], rows


def arm_table(summary: GymSummary) -> Table:
    """Header and rows of the details of the gains, one row per arm and baseline."""
    header = ["arm", "ARG", "against", "sd of seeds", "seeds", "tasks", "left out", "tunings", "wins, ties, losses"]
    rows = []
    for key in _BASELINES:
        for name, (arm, gain) in _compared(summary, key).items():
            baseline = "direct/full" if key == "against_full" else f"direct/{arm.peft}"
            counts = [len(gain.seeds), gain.tasks, len(gain.left_out), gain.shared]
            spread = _NONE if gain.sd_seeds is None else f"{gain.sd_seeds:.1f}"
            balance = f"{gain.wins}/{gain.ties}/{gain.losses}"
            rows.append([name, _gain_cell(gain), baseline, spread, *map(str, counts), balance])
    return header, rows


def step_table(summary: GymSummary) -> Table:
    """Header and rows of the steps to direct tuning's best dev score, one row per arm with an upstream stage."""
    header = ["arm", "tunings", "reached it", "their median step", "median step of direct tuning"]
    rows = []
    for name, arm in summary.arms.items():
        steps = arm.steps
        if steps is not None and arm.algorithm != "direct":
            median = _NONE if steps.median is None else f"{steps.median:g}"
            share = f"{100 * steps.reached:.0f} %"
            rows.append([name, str(len(steps.first)), share, median, f"{steps.median_direct:g}"])
    return header, rows


def task_table(summary: GymSummary, kind: str) -> Table:
    """Header and rows of the scores with a PEFT method: a row per task, a column per arm, mean ± sd over samples x 100.

    Args:
      summary: the result of `relative_gain.summarise`.
      kind: the PEFT method; direct tuning of the whole model is shown next to it.
    """
    arms = {name: arm for name, arm in summary.arms.items() if arm.peft in (kind, "full")}
    columns = [name if arm.peft == "full" else _stage(arm) for name, arm in arms.items()]
    tasks = [task for task in summary.tasks if any(task in arm.tasks for arm in arms.values())]
    facts = {task: summary.tasks[task] for task in tasks}
    rows = [
        [task, facts[task].metric, _points(facts[task].chance)]
        + [_score_cell(arm.tasks.get(task)) for arm in arms.values()]
        for task in tasks
    ]
    means = [_points(arm.mean_test) for arm in arms.values()]
    return ["task", "metric", "chance", *columns], [*rows, ["column mean", "", _mean_chance(facts), *means]]


def time_table(summary: GymSummary) -> Table:
    """Header and rows of the time that tunings took, one row per arm."""
    rows = [
        [name, str(spent.tunings), f"{spent.median:.3g}", f"{spent.total:.0f}"]
        for name, arm in summary.arms.items()
        if (spent := arm.seconds) is not None
    ]
    return ["arm", "tunings", "median seconds", "total seconds"], rows


def answer(summary: GymSummary) -> str:
    """What priming gains, in one sentence: a page's text. The arm with the highest ARG stands for all."""
    compared = {
        (name, key): gain
        for key in _BASELINES
        for name, (_, gain) in _compared(summary, key).items()
        if gain.arg is not None
    }
    direct = {names: gain for names, gain in compared.items() if names[1] == "against_direct"}
    if not compared and any(_compared(summary, key) for key in _BASELINES):
        return "There is no relative gain: the baseline scores at most 0 on every task. The scores are below."
    if not compared:
        return "Nothing is compared yet: no arm shares a task and sample with direct tuning."
    (name, key), best = max((direct or compared).items(), key=lambda one: one[1].arg or 0.0)
    interval = "" if best.interval is None else f" (95 % interval {best.interval[0]:+.1f} to {best.interval[1]:+.1f})"
    shown = best.interval is not None and (best.interval[0] > 0 or best.interval[1] < 0)
    which = f"The best of {len(direct or compared)} arms, {code(name)}," if len(direct or compared) > 1 else code(name)
    return (
        f"{which} scores {abs(best.arg or 0.0):.1f} % {'above' if (best.arg or 0.0) >= 0 else 'below'} "
        f"{_BASELINES[key]} on average over tasks{interval}: {'shown to differ' if shown else 'not shown to differ'}."
    )


def _write_gains(page: Page, folder: pathlib.Path, summary: GymSummary) -> None:
    page.paragraph(answer(summary))
    panels = {
        f"against {baseline}": {
            name: (gain.arg, gain.interval)
            for name, (_, gain) in _compared(summary, key).items()
            if gain.arg is not None
        }
        for key, baseline in _BASELINES.items()
    }
    panels = {title: arms for title, arms in panels.items() if arms}
    if panels:
        path = folder / "plots" / "average-gains.png"
        plots.plot_effects(path, panels, "average relative gain in percent, with 95 % interval over tasks")
        page.image(path, folder, f"Average relative gain by arm. {answer(summary).replace('`', '')}")
    page.paragraph(
        f"{summary.tunings} few-shot tunings on {len(summary.tasks)} tasks. ARG is the average relative gain: "
        "the mean over tasks of (P - P0)/P0 in percent, where P is a task's mean test score over its samples and P0 "
        "that of the baseline. Brackets show its 95 % bootstrap interval over tasks. It includes only tasks and "
        "samples that both have."
    )
    for key, baseline in _BASELINES.items():
        page.heading(f"ARG against {baseline}")
        if _compared(summary, key):
            _table(page, *gain_table(summary, key), "Average relative gain in percent [95 % interval]")
        else:
            page.paragraph("Nothing to compare: no arm shares a task and sample with it.")


def _write_arms(page: Page, summary: GymSummary) -> None:
    header, rows = arm_table(summary)
    if not rows:
        return
    page.heading("Details of the gains")
    page.paragraph(
        "ARG is computed for every upstream seed and then averaged. `tunings` counts those with a counterpart for the "
        "same task and sample in the baseline. Wins, ties and losses count tasks, including those left out of the ARG."
    )
    _table(page, header, rows, "Gains by arm, in percent")
    left_out = [
        f"{code(name)} against {baseline}: " + ", ".join(_left_out(summary, key, arm, task) for task in gain.left_out)
        for key, baseline in _BASELINES.items()
        for name, (arm, gain) in _compared(summary, key).items()
        if gain.left_out
    ]
    if left_out:
        page.paragraph(
            "Tasks without a relative gain, because the baseline's score is at most 0; in brackets the scores times "
            "100 of the baseline and of the arm:"
        )
        page.bullets(left_out)


def _left_out(summary: GymSummary, key: Baseline, arm: ArmNumbers, task: str) -> str:
    """A task without relative gain, with both scores."""
    baseline = summary.arms[f"direct/{'full' if key == 'against_full' else arm.peft}"]
    return f"{code(task)} ({_points(baseline.tasks[task].mean)}, {_points(arm.tasks[task].mean)})"


def _write_steps(page: Page, folder: pathlib.Path, summary: GymSummary) -> None:
    header, rows = step_table(summary)
    if not rows:
        return
    page.heading("Steps to the best dev score of direct tuning")
    page.paragraph(
        "For every task and sample, the first evaluated step at which the dev score reaches the best dev score of "
        "direct tuning with the same PEFT method. The medians leave out tunings that never reach it."
    )
    _table(page, header, rows, "Steps until direct tuning's best dev score")
    for kind in _kinds(summary):
        stages = {_stage(arm): arm.steps for arm in summary.arms.values() if arm.peft == kind and arm.steps is not None}
        if stages.keys() - {"direct"}:
            path = folder / "plots" / f"steps-{_file_name(kind)}.png"
            last = max(steps.last for steps in stages.values())
            first = {stage: steps.first for stage, steps in stages.items()}
            plots.plot_steps_to_score(path, first, last, f"{kind}: direct tuning's best dev score")
            shares = ", ".join(f"{stage} {steps.reached:.0%}" for stage, steps in stages.items())
            page.image(path, folder, f"{kind}: share of tunings that reached direct tuning's best dev score: {shares}")


def _write_tasks(page: Page, folder: pathlib.Path, summary: GymSummary) -> None:
    page.heading("Scores by task")
    page.paragraph(
        "Mean test score ± standard deviation over samples (n - 1, within an upstream seed), times 100, of all "
        "tunings, including those without a counterpart in the baseline."
    )
    for kind in _kinds(summary) or ["full"]:
        page.heading(plain(kind), 3)
        _table(page, *task_table(summary, kind), f"{kind}: test scores times 100, mean ± sd over samples")
        gains = {
            _stage(arm): gain.gains
            for arm, gain in _compared(summary, "against_direct").values()
            if arm.peft == kind and gain.gains
        }
        if gains:
            path = folder / "plots" / f"gains-{_file_name(kind)}.png"
            plots.plot_task_gains(path, gains, f"{kind}: gain over direct tuning")
            above = ", ".join(
                f"{stage} on {sum(gain > 0 for gain in of.values())} of {len(of)} tasks" for stage, of in gains.items()
            )
            page.image(path, folder, f"{kind}: relative gain over direct tuning by task; above 0: {above}")


def _write_time(page: Page, summary: GymSummary) -> None:
    header, rows = time_table(summary)
    if rows:
        page.heading("Time")
        page.paragraph("Time of the tunings, as each recorded it, without the upstream stage.")
        _table(page, header, rows, "Seconds of the tunings by arm")


def _write_limits(page: Page, summary: GymSummary) -> None:
    page.heading("How to read these numbers")
    seeds = {len(arm.seeds) for arm in summary.arms.values() if arm.algorithm != "direct"}
    texts = [
        "The interval resamples tasks: it covers what other tasks like these might give, but not other upstream seeds. "
        "With fewer than three tasks, or equal gains on all of them, there is none.",
        "A task with a low baseline has a large weight in an ARG: a gain from 5 to 10 points counts as 100 %. Check "
        "the gains by task.",
        "A column mean mixes metrics, and covers only the tasks that the arm has.",
        "No number is corrected for the number of arms on this page.",
    ]
    if 1 in seeds:
        texts.append("At least one arm has only one upstream seed; its variation over seeds is unknown.")
    others = [name for name, facts in summary.tasks.items() if facts.crossfits_sampling is False]
    if others:
        texts.append(
            f"The samples of {len(others)} of {len(summary.tasks)} tasks are not drawn as CrossFit draws them (16 rows "
            "per class, or 32), so an ARG on them is not CrossFit's."
        )
    texts += [
        f"{facts.unparsable} answers to {code(name)} were no numbers; each counts as the mean of the right answers."
        for name, facts in summary.tasks.items()
        if facts.unparsable
    ]
    short = [name for name, arm in summary.arms.items() if _lacks_something(arm, summary.tasks)]
    if short:
        names = ", ".join(map(code, short))
        texts.append(f"Some tunings are missing. These arms lack tasks or samples that others have: {names}.")
    page.bullets(texts)


def _table(page: Page, header: list[str], rows: list[list[str]], caption: str) -> None:
    """Adds a table of plain text: the names of arms and tasks come from records."""
    page.table(list(map(plain, header)), [list(map(plain, row)) for row in rows], plain(caption))


def _lacks_something(arm: ArmNumbers, tasks: dict[str, TaskFacts]) -> bool:
    return any(task not in arm.tasks or arm.tasks[task].samples != tasks[task].samples for task in tasks)


def _compared(summary: GymSummary, key: Baseline) -> dict[str, tuple[ArmNumbers, Gain]]:
    """Name -> arm and gain, of the arms that are compared with the key's baseline, without the baseline itself."""
    found = {}
    for name, arm in summary.arms.items():
        gain = arm.against_full if key == "against_full" else arm.against_direct
        if gain is not None and arm.peft != "full" and (key, arm.algorithm) != ("against_direct", "direct"):
            found[name] = (arm, gain)
    return found


def _kinds(summary: GymSummary) -> list[str]:
    return list(dict.fromkeys(arm.peft for arm in summary.arms.values() if arm.peft != "full"))


def _stage(arm: ArmNumbers) -> str:
    return _stage_name(arm.algorithm, arm.trained)


def _stage_name(algorithm: str, trained: str | None) -> str:
    return algorithm if trained is None else f"{algorithm}, {trained}"


def _file_name(kind: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", kind)


def _gain_cell(found: Gain) -> str:
    if found.arg is None:
        return _NONE
    if found.interval is None:
        return f"{found.arg:+.1f}"
    low, high = found.interval
    return f"{found.arg:+.1f} [{low:+.1f}, {high:+.1f}]"


def _score_cell(scores: TaskScores | None) -> str:
    if scores is None:
        return _NONE
    spread = "" if scores.sd_samples is None else f" ± {100 * scores.sd_samples:.1f}"
    return _points(scores.mean) + spread


def _mean_chance(facts: dict[str, TaskFacts]) -> str:
    return _points(sum(one.chance for one in facts.values()) / len(facts))


def _points(score: float) -> str:
    return f"{100 * score:.1f}"
