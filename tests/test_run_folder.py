"""The run folder: what may be overwritten, what stands in its files; the plots."""

import json
import os
import pathlib

import matplotlib.image
import numpy as np
import pytest

from pats_jax.errors import InputError
from pats_jax.reporting import plots
from pats_jax.run import run_folder
from pats_jax.run.settings import Settings


def refuses(folder, overwrite=False):
    with pytest.raises(InputError) as caught:
        run_folder.check_free(folder, overwrite)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--output_dir {folder}: ")
    return str(caught.value)


# what may be overwritten


def test_a_new_or_empty_folder_is_free(tmp_path):
    run_folder.check_free(tmp_path, False)
    run_folder.check_free(tmp_path / "a" / "b", False)
    run_folder.check_free(pathlib.Path("relative/to/here"), False)
    assert not list(tmp_path.iterdir())


def test_a_run_is_replaced_only_when_asked(tmp_path):
    """What is a run, and how it is replaced: test_replacing.py."""
    settings = Settings(task_name="sst2").to_dict()
    run_folder.start(tmp_path, settings)
    run_folder.write_metrics(tmp_path, [{"step": 1}])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "not empty" in refuses(tmp_path) and "--overwrite" in refuses(tmp_path)
    run_folder.check_free(tmp_path, True)
    assert (tmp_path / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "config.json").read_text()) == settings


def test_what_a_start_that_came_to_nothing_leaves_is_no_content(tmp_path):
    for name in (".lock", "config.json.new"):
        (tmp_path / name).touch()
    run_folder.check_free(tmp_path, False)


def test_a_file_in_the_way(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "run", file / "a" / "b"):
        assert f"{file} is a file" in refuses(folder, overwrite=True)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != tmp_path)  # root may write anywhere
    for folder in (tmp_path, tmp_path / "new" / "run"):
        assert f"no permission to write to {tmp_path}" in refuses(folder)


def test_a_disk_that_refuses(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"^--output_dir .*run: cannot be written \(Permission denied\)$"):
        run_folder.start(tmp_path / "run", {})


# its files


def test_metrics_come_back_line_by_line(tmp_path):
    records = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "eval": {"accuracy": 1.0}}]
    run_folder.write_metrics(tmp_path, records)
    assert run_folder.read_metrics(tmp_path) == records
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_versions_name_what_results_depend_on():
    import jax

    versions = run_folder.versions()
    assert versions["jax"] == jax.__version__ and {"python", "flax", "optax", "transformers"} <= versions.keys()


# plots


def colours(path):
    """How many pixels of a plot have a colour rather than a grey."""
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 500
    return int((np.ptp(image[..., :3], axis=-1) > 0.2).sum())


def records(steps):
    losses = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, steps + 1)]
    return [*losses, {"step": steps, "eval": {"accuracy": 0.8}}]


def test_plots_show_the_values(tmp_path):
    plots.plot_loss(tmp_path / "loss.png", records(9))
    plots.plot_scores(tmp_path / "deep" / "score.png", {"one": records(9), "two": records(5)}, "accuracy", 0.5)
    values = np.sort(np.random.default_rng(0).exponential(size=1000))
    plots.plot_sensitivity(tmp_path / "sensitivity.png", values, np.insert(values / 10, 0, [0.0, 0.0]))
    for name in ("loss.png", "deep/score.png", "sensitivity.png"):
        assert colours(tmp_path / name) > 200, name


def test_bars_of_sensitivity_are_shares_of_all_parameters(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    rng = np.random.default_rng(0)
    both = [np.sort(np.append(np.zeros(zeros), rng.lognormal(size=30_000))) for zeros in (0, 2_000)]
    plots.plot_sensitivity(tmp_path / "x.png", *both)
    (axes,) = figures[0].axes
    low = np.quantile(np.concatenate([values[values > 0] for values in both]), 1e-4, method="higher")
    edges = np.logspace(np.log10(low), np.log10(max(values[-1] for values in both)), 80)
    for values, bars in zip(both, axes.containers, strict=True):
        expected, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        np.testing.assert_allclose([bar.get_height() for bar in bars], expected / values.size, atol=1e-9)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "before training",
        "after training (6.2% zero)",
    ]


@pytest.mark.parametrize(
    "before, after", [(np.zeros(4), np.zeros(4)), (np.ones(4), np.ones(4)), (np.zeros(1), np.ones(1))]
)
def test_sensitivities_that_have_no_spread(before, after, tmp_path):
    plots.plot_sensitivity(tmp_path / "sensitivity.png", before, after)
    assert (colours(tmp_path / "sensitivity.png") > 100) == bool(after.any())
