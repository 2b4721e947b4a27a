"""Pictures show the names that they are given, whatever those hold."""

import inspect
import warnings

import matplotlib.text
import numpy as np
import pytest

from pats_jax.comparison.seed_statistics import SeedCurve
from pats_jax.reporting import plots
from pats_jax.reporting.console import visible

NAMES = ["$x_{$", "a $b$ c", r"\frac{$", "_hidden", "100 % ^ {", "中文", "x" * 500, "a\nb\x1b", "lone \udcff", r"a\$b"]
CURVE = SeedCurve(step=[1, 2], mean=[1.0, 0.5], low=[0.5, 0.5], high=[1.5, 0.5])
RECORDS = [{"step": 1, "eval": {NAMES[0]: 0.5}}]
DRAWN = {
    plots.plot_scores: (dict.fromkeys(NAMES, RECORDS), NAMES[0], 0.5),
    plots.plot_confusion: (np.eye(len(NAMES), dtype=int), NAMES),
    plots.plot_seeds: (dict.fromkeys(NAMES, [0.5, 0.6]), NAMES[0], 0.5),
    plots.plot_mean_curves: (dict.fromkeys(NAMES, {"loss": CURVE, "score": CURVE}), NAMES[0]),
    plots.plot_histograms: ([-3.0, -2.0, -1.0], [0.5, 0.5], dict.fromkeys(NAMES, [0.4, 0.6])),
    plots.plot_effects: ({NAMES[0]: dict.fromkeys(NAMES, (1.0, [0.5, 2.0]))}, NAMES[0]),
    plots.plot_task_gains: (dict.fromkeys(NAMES, dict.fromkeys(NAMES, 1.0)), NAMES[0]),
    plots.plot_steps_to_score: (dict.fromkeys(NAMES, [1, None]), 5, NAMES[0]),
}


def test_every_plot_that_takes_names_is_here():
    public = {one for name, one in inspect.getmembers(plots, inspect.isfunction) if name.startswith("plot_")}
    assert public - DRAWN.keys() == {
        plots.plot_loss,
        plots.plot_sensitivity,
        plots.plot_reliability,
        plots.plot_residuals,
    }


@pytest.mark.parametrize("plot", DRAWN, ids=lambda plot: plot.__name__)
def test_names_are_drawn_as_they_are(plot, tmp_path, monkeypatch):
    said = []
    real = matplotlib.text.Text.draw
    monkeypatch.setattr(matplotlib.text.Text, "draw", lambda self, *args: (said.append(self), real(self, *args))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(tmp_path / "plots" / "x.png", *DRAWN[plot])
    assert (tmp_path / "plots" / "x.png").read_bytes().startswith(b"\x89PNG")
    texts = [text for text, kind in (one._preprocess_math(one.get_text()) for one in said) if kind is False]
    for name in map(visible, NAMES):
        assert any((name if len(name) <= 40 else "x…x") in text for text in texts), (name, texts)
    assert all(len(text) < 100 for text in texts)
