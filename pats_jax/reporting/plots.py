"""Plots of a run, of a comparison of runs and of priming: losses, scores, sensitivity, relative gains."""

import io
import itertools
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pats_jax.core import files
from pats_jax.core.files import JsonObject
from pats_jax.reporting.console import visible

_LONGEST_NAME = 40  # characters
_MANY = 8  # names that fit side by side, or into a panel
_BEFORE, _AFTER = "#9aa5b1", "#0b6e99"
_COLORS = (_AFTER, "#d1495b", "#66a182", "#edae49", "#7b5ea7", "#8c5e3c", "#d47fb0", "#4a4e69")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)))
# Color, line and marker, for more arms than there are colors.
_STYLES = [(color, line, marker) for line, marker in (("-", "o"), ("--", "s"), (":", "^")) for color in _COLORS]


def plot_loss(path: pathlib.Path, records: list[JsonObject]) -> None:
    """Training loss and learning rate by step, from the lines of metrics.jsonl that have a ``loss``."""
    lines = [record for record in records if "loss" in record]
    figure, axes = _figure("Training loss", "step", "mean loss since the last point")
    marker = "o" if len(lines) == 1 else None  # a line of one point is not seen
    axes.plot([r["step"] for r in lines], [r["loss"] for r in lines], color=_AFTER, marker=marker, label="loss")
    rates = axes.twinx()
    rate = [r["learning_rate"] for r in lines]
    rates.plot([r["step"] for r in lines], rate, color=_BEFORE, linestyle="--", marker=marker)
    rates.set_ylabel("learning rate (dashed)")
    _save(figure, path)


def plot_scores(
    path: pathlib.Path,
    runs: dict[str, list[JsonObject]],
    metric: str,
    majority: float | None,
    title: str = "Validation score",
) -> None:
    """The main metric by step, one line per run, with the score of the majority class.

    Args:
      path: the PNG file to write.
      runs: name of a run -> its lines of metrics.jsonl, of which those with an ``eval`` are drawn.
      metric: name of the metric.
      majority: its value when every row is given the most frequent class; None where there are no classes.
      title: of the picture.
    """
    figure, axes = _figure(title, "step", metric)
    for number, (name, records) in enumerate(runs.items()):
        lines = [record for record in records if "eval" in record]
        scores, style = [r["eval"][metric] for r in lines], _line_style(number, len(runs))
        axes.plot([r["step"] for r in lines], scores, marker="o", label=_name(name), **style)
    if majority is not None:
        axes.axhline(majority, color=_BEFORE, linestyle="--", label="majority class")
    _add_legend(figure, [axes])
    _save(figure, path)


def plot_sensitivity(path: pathlib.Path, before: np.ndarray, after: np.ndarray) -> None:
    """Distribution of sensitivity on a logarithmic axis, before and after training; zeros are counted in the legend.

    Args:
      path: the PNG file to write.
      before: (n,) sensitivities before training, sorted.
      after: (n,) sensitivities after training, sorted.
    """
    figure, axes = _figure("Distribution of sensitivity", "sensitivity |θ·g|", "share of parameters")
    zeros = [int(np.searchsorted(values, 0, "right")) for values in (before, after)]
    positive = [values[number:] for values, number in zip((before, after), zeros, strict=True)]
    total = sum(values.size for values in positive)
    if total:
        smallest = total // 10_000  # so many are below the axis
        low = np.sort(np.concatenate([values[: smallest + 1] for values in positive]))[smallest]
        high = max(values[-1] for values in positive if values.size)
        edges = np.logspace(np.log10(low), max(np.log10(high), np.log10(low) + 1e-6), 80)
        shown = ((before, zeros[0], _BEFORE, "before"), (after, zeros[1], _AFTER, "after"))
        for values, zero, color, name in shown:
            places = np.concatenate([[0], np.searchsorted(values, edges[1:-1]), [values.size]])
            label = f"{name} training" + (f" ({zero / values.size:.1%} zero)" if zero else "")
            shares = np.diff(places) / values.size
            axes.hist(edges[:-1], edges, weights=shares, color=color, alpha=0.6, label=label)
        axes.legend()
    axes.set_xscale("log")
    _save(figure, path)


def plot_confusion(path: pathlib.Path, counts: np.ndarray, names: Sequence[str]) -> None:
    """The confusion matrix: colours are shares of a class, numbers are rows.

    Numbers are left out for more than 12 classes, names for more than 40.

    Args:
      path: the PNG file to write.
      counts: (classes, classes), the true class first.
      names: the names of the classes.
    """
    figure, axes = _figure("Confusion matrix", "predicted class", "true class")
    size = len(names)
    figure.set_size_inches(*(max(4.0, 2.0 + 0.45 * min(size, 20)),) * 2)
    axes.grid(False)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if size <= 40:
        short = [_name(name, 20) for name in names]
        axes.set_xticks(range(size), short, rotation=90 if size > 4 else 0)
        axes.set_yticks(range(size), short)
    if size <= 12:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    _save(figure, path)


def plot_reliability(path: pathlib.Path, confidence: np.ndarray, accuracy: np.ndarray, rows: np.ndarray) -> None:
    """Accuracy by confidence, on the diagonal if probabilities are calibrated; the size of a dot shows its rows.

    Args:
      path: the PNG file to write.
      confidence: the mean of the largest probability in each bin, (bins,).
      accuracy: the share of rows in each bin that are right, (bins,).
      rows: the number of rows in each bin, (bins,).
    """
    title = "Reliability: above the line too timid, below too sure"
    figure, axes = _figure(title, "largest probability, mean of a bin", "share of its rows that are right")
    axes.plot([0, 1], [0, 1], color=_BEFORE, linestyle="--")
    axes.plot(confidence, accuracy, color=_AFTER, alpha=0.5)
    axes.scatter(confidence, accuracy, 20 + 280 * rows / rows.max(), color=_AFTER, alpha=0.7)
    axes.set(xlim=(0, 1.03), ylim=(-0.03, 1.03))
    _save(figure, path)


def plot_residuals(path: pathlib.Path, labels: np.ndarray, residuals: np.ndarray) -> None:
    """Predicted minus true score by true score, one dot per row.

    Args:
      path: the PNG file to write.
      labels: true scores, (rows,).
      residuals: predicted minus true scores, (rows,).
    """
    figure, axes = _figure("Residuals on the validation data", "true score", "predicted minus true score")
    axes.axhline(0, color=_BEFORE, linestyle="--")
    axes.plot(labels, residuals, "o", color=_AFTER, alpha=0.4, markersize=4)
    _save(figure, path)


def plot_seeds(path: pathlib.Path, scores: dict[str, list[float]], metric: str, majority: float | None) -> None:
    """The scores of several methods: a dot per seed, a bar for the mean, a line for the score of the majority class.

    Args:
      path: the PNG file to write.
      scores: name of a method -> the scores of its seeds.
      metric: name of the metric.
      majority: its value when every row is given the most frequent class; None where there are no classes.
    """
    figure, axes = _figure("Validation score by method, a dot a seed", "", metric)
    for place, (values, color) in enumerate(zip(scores.values(), itertools.cycle(_COLORS), strict=False)):
        spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
        axes.plot(place + np.asarray(spread), values, "o", color=color, alpha=0.8)
        axes.hlines(np.mean(values), place - 0.25, place + 0.25, color=color)
    if majority is not None:
        axes.axhline(majority, color=_BEFORE, linestyle="--", label="majority class")
        axes.legend()
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(scores) > _MANY else {"rotation": 20}
    axes.set_xticks(range(len(scores)), list(map(_name, scores)), **(turned if len(scores) > 4 else {}))
    axes.set_xlim(-0.5, len(scores) - 0.5)
    _save(figure, path)


def _line_style(number: int, count: int) -> dict[str, Any]:
    """Color, dashes and width of a line: later ones are narrower, so that none hides another."""
    return {
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 4.0 - 2.8 * number / max(1, count - 1) if count > 1 else 1.5,
    }


class Curve(Protocol):
    """Mean, lowest and highest value over seeds by step; lists of the same length."""

    @property
    def step(self) -> list[int]: ...
    @property
    def mean(self) -> list[float]: ...
    @property
    def low(self) -> list[float]: ...
    @property
    def high(self) -> list[float]: ...


def plot_mean_curves(path: pathlib.Path, curves: Mapping[str, Mapping[str, Curve]], metric: str) -> None:
    """Training loss and validation score by step, the mean over seeds with a band from the lowest to the highest.

    A panel in which no curve has two points is left out. Lines differ in color, dashes and width, so
    that none hides another.

    Args:
      path: the PNG file to write.
      curves: name of a method -> ``loss`` and ``score`` -> its curve.
      metric: name of the metric.
    """
    from matplotlib.figure import Figure

    known = (("loss", "Training loss", "loss"), ("score", "Validation score", metric))
    drawn = [one for one in known if any(len(of[one[0]].step) > 1 for of in curves.values())]
    figure = Figure(figsize=(6.4, 3.6 * len(drawn)), layout="constrained")
    panels = figure.subplots(len(drawn), squeeze=False)[:, 0]
    for axes, (name, title, label) in zip(panels, drawn, strict=True):
        axes.set(title=f"{title}: mean and range of the seeds", xlabel="step", ylabel=_name(label))
        axes.grid(alpha=0.3)
        for number, (method, of_method) in enumerate(curves.items()):
            curve, style = of_method[name], _line_style(number, len(curves))
            marker = "." if name == "score" else None
            axes.plot(curve.step, curve.mean, marker=marker, label=_name(method), **style)
            axes.fill_between(curve.step, curve.low, curve.high, color=style["color"], alpha=0.15, linewidth=0)
    _add_legend(figure, panels)
    _save(figure, path)


def plot_histograms(path: pathlib.Path, edges: list[float], before: list[float], after: dict[str, list[float]]) -> None:
    """Distributions of sensitivity on a logarithmic axis: before training, and after it with several methods.

    Args:
      path: the PNG file to write.
      edges: (bins + 1,) edges of the bins, as powers of 10.
      before: (bins,) share of the parameters in every bin before training.
      after: name of a method -> the same after training.
    """
    figure, axes = _figure("Distribution of sensitivity, mean over seeds", "sensitivity |θ·g|", "share of parameters")
    powers = 10.0 ** np.asarray(edges)
    axes.stairs(before, powers, color=_BEFORE, fill=True, alpha=0.4, label="before training")
    for number, (method, shares) in enumerate(after.items()):
        axes.stairs(shares, powers, label=f"after, {_name(method)}", **_line_style(number, len(after)))
    held = np.flatnonzero(np.max([before, *after.values()], axis=0) > 1e-4)
    if held.size:
        axes.set_xlim(powers[held[0]], powers[held[-1] + 1])
    axes.set_xscale("log")
    _add_legend(figure, [axes])
    _save(figure, path)


def plot_effects(
    path: pathlib.Path, panels: Mapping[str, Mapping[str, tuple[float, Sequence[float] | None]]], label: str
) -> None:
    """Effects as dots with intervals, one per row, next to a line at 0; one panel per task or baseline.

    All panels have the same rows, in the order of the panel with the most rows, and the same scale.

    Args:
      path: the PNG file to write.
      panels: title -> name of a row -> its effect, and its interval (low, high) or None.
      label: what the scale shows.
    """
    from matplotlib.figure import Figure

    longest_first = sorted(panels.values(), key=len, reverse=True)
    names = list(dict.fromkeys(name for rows in longest_first for name in rows))
    columns = 1 if len(panels) <= 4 else 2  # narrow enough to be read on a phone
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.4 + 2.8 * columns, 0.4 + lines * (0.7 + 0.27 * len(names))), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False).flat
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for number, (axes, (title, rows)) in enumerate(zip(grid, panels.items(), strict=False)):
        axes.set_title(
            _name(title, 80), fontsize=10, loc="right" if len(title) > 30 else "center"
        )  # room is on the left
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), [""] * len(names) if number % columns else list(map(_name, names)))
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3, axis="x")
        axes.axvline(0, color=_BEFORE)
        for name, (effect, interval) in rows.items():
            place, color = names.index(name), _AFTER if effect >= 0 else _COLORS[1]
            if interval is not None:
                axes.hlines(place, *interval, color=color, linewidth=2)
            axes.plot(effect, place, "o", color=color)
    figure.supxlabel(_name(label, 80), fontsize=10)
    _save(figure, path)


def plot_task_gains(path: pathlib.Path, gains: dict[str, dict[str, float]], title: str) -> None:
    """Relative gain by task, one dot per arm; tasks are ordered by their mean gain over the arms that have them.

    Args:
      path: the PNG file to write.
      gains: name of an arm -> task -> relative gain in percent.
      title: of the picture.
    """
    from matplotlib.figure import Figure

    by_task: dict[str, list[float]] = {}
    for arm in gains.values():
        for task, gain in arm.items():
            by_task.setdefault(task, []).append(gain)
    tasks = sorted(by_task, key=lambda task: float(np.mean(by_task[task])))
    figure = Figure(figsize=(8.0, 1.8 + 0.2 * len(tasks)), layout="constrained")
    axes = figure.add_subplot(title=_name(title, 80), xlabel="relative gain in percent")
    axes.axvline(0, color=_BEFORE)
    axes.grid(alpha=0.3)
    for (name, arm), (color, _, marker) in zip(gains.items(), itertools.cycle(_STYLES), strict=False):
        places = [tasks.index(task) for task in arm]
        axes.plot(list(arm.values()), places, linestyle="", marker=marker, color=color, alpha=0.8, label=_name(name))
    axes.set_yticks(range(len(tasks)), list(map(_name, tasks)))
    axes.set_ylim(-0.5, len(tasks) - 0.5)
    _legend_beside(figure, axes)
    _save(figure, path)


def plot_steps_to_score(path: pathlib.Path, first: dict[str, list[int | None]], last: int, title: str) -> None:
    """The share of tunings that have reached a dev score, by step: the empirical distribution of the steps needed.

    Args:
      path: the PNG file to write.
      first: name of an arm -> the step at which each of its tunings reached the score, None for never.
      last: the last step of any tuning, where the lines end.
      title: of the picture.
    """
    figure, axes = _figure(title, "step", "share of tunings that have reached it")
    figure.set_size_inches(8.0, 4.5)
    for (name, steps), (color, line, _) in zip(first.items(), itertools.cycle(_STYLES), strict=False):
        reached = sorted(step for step in steps if step is not None)
        shares = [count / len(steps) for count in range(len(reached) + 1)]
        axes.step(
            [0, *reached, last], [*shares, shares[-1]], where="post", color=color, linestyle=line, label=_name(name)
        )
    axes.set_ylim(-0.02, 1.02)
    _legend_beside(figure, axes)
    _save(figure, path)


def _legend_beside(figure, axes):
    """Places the legend next to the axes, where it hides nothing, in drawing order."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper")


def _figure(title, xlabel, ylabel):
    # The object interface, without pyplot: no global state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot(title=_name(title, 80), xlabel=xlabel, ylabel=_name(ylabel))
    axes.grid(alpha=0.3)
    return figure, axes


def _add_legend(figure, panels):
    """A legend in each panel; where it has many names, one below all of them, for which the picture grows."""
    handles, names = panels[0].get_legend_handles_labels() if len(panels) else ([], [])
    if len(names) <= _MANY:
        for axes in panels:
            axes.legend()
        return
    columns = max(1, min(4, 100 // (6 + max(map(len, names)))))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.25 * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def _name(text, longest=_LONGEST_NAME):
    """An outside text for a picture: shown as it is, not as a formula, and shortened in the middle if long."""
    text = visible(text)
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}…{text[-half:]}"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")  # Matplotlib's legends leave _names out


def _save(figure, path):
    """Writes the picture, by `files.write_bytes`."""
    files.make_folder(path.parent)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # its box says as much
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)  # names all over it
        figure.set_dpi(120)
        figure.get_layout_engine().execute(figure)  # now: `savefig` would draw everything twice
        figure.set_layout_engine(None)
        figure.savefig(picture, format="png", dpi=120)
    files.write_bytes(path, picture.getvalue())
