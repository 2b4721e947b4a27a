"""The study: it goes on where it was stopped, a finished training is not repeated, and what its report computes."""

import inspect
import itertools
import json

import numpy as np
import pytest
import tiny

import pats_jax
from benchmarks.goals import ROOT
from benchmarks.report import RESULTS
from benchmarks.study import __main__ as study, data, grid, report, run
from pats_jax import methods, metrics
from pats_jax.data import batches
from pats_jax.data.tasks import get_task

TASK_METRICS = {"cola": "matthews_correlation", "sst2": "accuracy", "rte": "accuracy", "mrpc": "combined_score"}


@pytest.fixture
def flags(tmp_path):
    given = tiny.flags(
        data_dir="builtin",
        model=tiny.save_checkpoint(tmp_path / "model"),
        output_dir=tmp_path / "study",
        tasks="sst2",
        short_lengths=(16, 24),
        max_steps=3,
        seeds=2,
        rate_seeds=1,
        lanes=4,
        scales=0.1,
    )
    return ["run", *given]


@pytest.mark.slow
def test_a_finished_training_is_not_repeated(flags, tmp_path, capsys):
    path = tmp_path / "study" / "runs.jsonl"
    study.main([*flags, "--methods", "plain", "constant"])
    first = path.read_text().splitlines()
    records = [json.loads(line) for line in first]
    assert len(first) == 3 + 2 + 2  # three learning rates, then two seeds of two settings
    assert {record["learning_rate"] for record in records[3:]} <= set(grid.RATES)
    rates = {record["learning_rate"]: record["final"] for record in records[:3]}
    assert records[3]["learning_rate"] == max(sorted(rates), key=rates.get)
    for record in records:
        counts = np.array(record["evaluations"][-1]["confusion"])
        assert record["final"] == np.trace(counts) / counts.sum() and not record["diverged"]

    path.write_text("\n".join([*first[:-1], first[-1][:20]]))  # killed while it wrote the last line
    capsys.readouterr()
    study.main([*flags, "--methods", "plain", "constant", "reversed", "perturbed"])
    again = path.read_text().splitlines()
    assert again[:6] == first[:6]
    repeated = json.loads(again[6])
    assert repeated["evaluations"] == records[6]["evaluations"] and repeated["seed"] == records[6]["seed"]
    assert [json.loads(line)["method"] for line in again[7:]] == ["reversed"] * 2 + ["perturbed"] * 2
    assert "6 finished before" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        study.main([*flags, "--epochs", "2"])
    assert "runs.jsonl:1: trained by other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_no_set_begins_that_would_end_too_late(flags, tmp_path, capsys):
    study.main([*flags, "--max_seconds", "0"])
    assert "sst2: no time for plain" in capsys.readouterr().out
    assert not (tmp_path / "study" / "runs.jsonl").exists()


@pytest.mark.parametrize("task", data.TASKS)
def test_scores_of_confusion_matrices_are_those_of_the_metrics(task):
    assert data.main_metric(task) == TASK_METRICS[task]
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.9, 1.0):
        labels, predictions = rng.integers(0, 2, 50), (rng.random(50) < share).astype(int)
        expected = metrics.compute_metrics(get_task(task), predictions, labels)[TASK_METRICS[task]]
        assert data.score(task, data.confusion(predictions, labels)) == pytest.approx(expected, abs=1e-12)


def test_a_vocabulary_of_the_words_that_occur():
    tokens = batches.Tokens(np.array([7, 3, 9, 3], np.int32), np.zeros(4, np.uint8), np.array([0, 2, 4]), pad_id=5)
    group = data._group([("sst2", data.TaskData(tokens, np.zeros(2), tokens, np.zeros(2)))], (4,))
    renumbered = group.tasks["sst2"].train
    assert group.words[renumbered.input_ids].tolist() == [7, 3, 9, 3] and group.words[renumbered.pad_id] == 5


def test_all_tasks_have_their_first_set_before_one_has_its_second():
    sets = grid.in_turns([grid.in_sets(list("abcde"), 2), grid.in_sets(list("xy"), 2), []])
    assert sets == [["a", "b"], ["x", "y"], ["c", "d"], ["e"]]


# --- the report -------------------------------------------------------------------------------------------------------


def line(task, method, scale, seed, final):
    concentration = {"gini": final, "entropy": -final, "top_10_percent_share": 0.5}
    settings = {"task": task, "method": method, "noise_scale": scale, "learning_rate": 1e-4, "seed": seed}
    return {**settings, "final": final, "sensitivity": concentration, "diverged": False}


def lines_of(gains, seeds=20, noise=0.01):
    """Lines of two tasks whose settings differ from plain by these gains, up to noise."""
    rng = np.random.default_rng(0)
    for task in ("mrpc", "rte"):
        plain = rng.normal(0.7, noise, seeds)
        yield from (line(task, "plain", 0.0, seed, plain[seed]) for seed in range(seeds))
        yield line(task, "plain", 0.0, 100, 0.0)  # chose the learning rate
        for (method, scale), gain in gains.items():
            scores = plain + gain + rng.normal(0, noise / 4, seeds)
            yield from (line(task, method, scale, seed, scores[seed]) for seed in range(seeds))


def test_the_report_finds_the_gain_that_was_planted(tmp_path):
    gains = {("pats", 0.01): 0.0, ("pats", 0.1): 0.02, ("constant", 0.1): 0.0, ("reversed", 0.1): -0.02}
    lines = list(lines_of(gains))
    summary = report.summarise(lines)
    assert summary["seeds"] == {"choice": list(range(10)), "report": list(range(10, 20))}
    pats = summary["methods"]["pats"]
    assert pats["noise_scale"] == 0.1 and pats["pooled"]["mean"] == pytest.approx(2, abs=0.2)
    low, high = pats["pooled"]["interval"]
    assert 1.7 < low < pats["pooled"]["mean"] < high < 2.3 and pats["p_holm"] < 0.01
    assert summary["methods"]["constant"]["p_holm"] > 0.05
    assert summary["methods"]["reversed"]["pooled"]["mean"] < -1.5
    assert summary["default"] == {"noise_scale": 0.1, "why": "it gains"}
    assert summary["against_constant"][0]["pooled"]["mean"] == pytest.approx(2, abs=0.2)
    plain = summary["concentration"]["mrpc"]["plain"]
    assert plain["gini"]["rho"] == pytest.approx(1) and plain["entropy"]["rho"] == pytest.approx(-1)
    assert plain["gini"]["n"] == 20 and "top_10_percent_share" not in plain

    path = tmp_path / "runs.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    study.main(["report", "--output_dir", str(tmp_path)])
    page = (tmp_path / "study.md").read_text()
    assert "| pats | 0.1 | +" in page and (tmp_path / "study.png").stat().st_size > 10_000


def test_without_a_gain_the_default_is_the_largest_that_does_no_harm():
    gains = {("pats", 0.01): 0.0, ("pats", 0.03): -0.001, ("pats", 0.1): -0.02}
    assert report.summarise(list(lines_of(gains, noise=0.004)))["default"]["noise_scale"] == 0.03


def test_pooled_differences_against_their_definitions():
    rng = np.random.default_rng(1)
    by_task = {"mrpc": dict(enumerate(rng.normal(0.3, 1, 6))), "rte": dict(enumerate(rng.normal(0.3, 1, 5)))}
    found = report.pooled(by_task)
    first, second = (np.array(list(one.values())) for one in by_task.values())
    assert found["mean"] == pytest.approx((first.mean() + second.mean()) / 2)
    signs = np.array(list(itertools.product((-1, 1), repeat=11)))
    flipped = ((signs[:, :6] * first).mean(1) + (signs[:, 6:] * second).mean(1)) / 2
    assert found["p_value"] == pytest.approx(np.mean(np.abs(flipped) >= found["mean"] - 1e-12), abs=0.015)
    error = np.sqrt(first.var() / 6 + second.var() / 5) / 2
    assert found["interval"] == pytest.approx([found["mean"] - 1.96 * error, found["mean"] + 1.96 * error], abs=0.1)


def test_holm_against_its_definition():
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9}
    assert report.holm(p_values) == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})
    uniform = dict(enumerate(np.random.default_rng(0).uniform(size=50)))
    rejected = {name for name, p in report.holm(uniform).items() if p < 0.05}
    assert rejected == {name for name, p in uniform.items() if p < 0.05 / 50}


def test_damaged_lines_are_named(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text('{"task": "mrpc"}\n')
    with pytest.raises(SystemExit):
        study.main(["report", "--output_dir", str(tmp_path)])
    assert "runs.jsonl:1: not a line of the study" in capsys.readouterr().err
    with pytest.raises(run.InputError, match="not found"):
        report.read_runs(tmp_path / "nowhere.jsonl")


def test_the_page_and_the_default_follow_from_the_stored_runs():
    summary = report.summarise(report.read_runs(RESULTS / "h200" / "study" / "runs.jsonl"))
    tables = [line for line in report.as_markdown(summary).splitlines() if line.startswith("|")]
    assert len(tables) > 30 and set(tables) <= set((ROOT / "docs" / "results.md").read_text().splitlines())
    default = inspect.signature(pats_jax.pats).parameters["noise_scale"].default
    assert summary["default"]["noise_scale"] == methods.get_methods("pats")[0].noise_scale == default
