"""Pictures of a run: the loss, the score, and the distribution of sensitivity before and after training."""

import itertools
import pathlib
from typing import Any

import numpy as np

_BEFORE, _AFTER = "#9aa5b1", "#0b6e99"
_COLORS = (_AFTER, "#d1495b", "#66a182", "#edae49")


def plot_loss(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Training loss and learning rate by step, from the lines of metrics.jsonl that have a ``loss``."""
    lines = [record for record in records if "loss" in record]
    figure, axes = _figure("Training loss", "step", "mean loss since the last point")
    axes.plot([r["step"] for r in lines], [r["loss"] for r in lines], color=_AFTER, label="loss")
    rates = axes.twinx()
    rates.plot([r["step"] for r in lines], [r["learning_rate"] for r in lines], color=_BEFORE, linestyle="--")
    rates.set_ylabel("learning rate (dashed)")
    _save(figure, path)


def plot_scores(path: pathlib.Path, runs: dict[str, list[dict[str, Any]]], metric: str, majority: float) -> None:
    """The main metric by step, one line a run, with the score of the majority class.

    Args:
      path: the PNG file to write.
      runs: name of a run -> its lines of metrics.jsonl, of which those with an ``eval`` are drawn.
      metric: name of the metric.
      majority: its value when every row is given the most frequent class.
    """
    figure, axes = _figure("Validation score", "step", metric)
    for (name, records), color in zip(runs.items(), itertools.cycle(_COLORS), strict=False):
        lines = [record for record in records if "eval" in record]
        axes.plot([r["step"] for r in lines], [r["eval"][metric] for r in lines], color=color, marker="o", label=name)
    axes.axhline(majority, color=_BEFORE, linestyle="--", label="majority class")
    axes.legend()
    _save(figure, path)


def plot_sensitivity(path: pathlib.Path, before: np.ndarray, after: np.ndarray) -> None:
    """Distribution of sensitivity on a logarithmic axis, before and after training; zeros are counted in the legend.

    Args:
      path: the PNG file to write.
      before: (n,) sensitivities before training.
      after: (n,) sensitivities after training.
    """
    figure, axes = _figure("Distribution of sensitivity", "sensitivity |θ·g|", "share of parameters")
    positive = np.concatenate([before[before > 0], after[after > 0]])
    if positive.size:
        low, high = np.log10(np.quantile(positive, 1e-4)), np.log10(positive.max())
        edges = np.logspace(low, max(high, low + 1e-6), 80)
        for values, color, name in ((before, _BEFORE, "before"), (after, _AFTER, "after")):
            zeros = np.mean(values == 0)
            weights = np.full(values.size, 1 / values.size)
            label = f"{name} training" + (f" ({zeros:.1%} zero)" if zeros else "")
            axes.hist(np.clip(values, edges[0], edges[-1]), edges, weights=weights, color=color, alpha=0.6, label=label)
        axes.legend()
    axes.set_xscale("log")
    _save(figure, path)


def _figure(title, xlabel, ylabel):
    # The object interface, without pyplot: no global state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
