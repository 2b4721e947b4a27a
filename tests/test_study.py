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
from pats_jax import methods
from pats_jax.data import batches
from pats_jax.methods import METHODS
from pats_jax.training import metrics

TASK_METRICS = {
    "cola": "matthews_correlation",
    "sst2": "accuracy",
    "rte": "accuracy",
    "mrpc": "combined_score",
    "trec": "accuracy",
    "subj": "accuracy",
}


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


@pytest.mark.slow
def test_scores_and_several_classes_are_trained_too(flags, tmp_path, capsys):
    write_texts(tmp_path / "texts")
    lengths = ["--similarity_lengths", "16", "--questions_lengths", "16"]
    asked = ["--parts", "b", "--tasks", "stsb", "trec", "--methods", "plain", "pats", "--rates", "1e-4"]
    study.main([*flags, *lengths, *asked, "--texts_dir", str(tmp_path / "texts")])
    lines = (tmp_path / "study" / "runs.jsonl").read_text().splitlines()
    found = {(one["task"], one["method"], one["seed"]): one for one in map(json.loads, lines)}
    assert len(found) == len(lines) == 2 * (1 + 2 + 2)
    for (task, _, _), record in found.items():
        last = record["evaluations"][-1]
        assert record["final"] == last["score"] and record["steps"] == 3 and not record["diverged"]
        assert record["protocol"]["lengths"] == {"similarity": [16], "questions": [16], "subjectivity": [32, 64]}
        if task == "stsb":
            assert last["score"] == (last["pearson"] + last["spearmanr"]) / 2 and -1 < last["score"] < 1
            assert record["loss"][0] < 20  # squares of differences of scores in [0, 5]
        else:
            counts = np.array(last["confusion"])
            assert counts.sum(axis=1).tolist() == [10] * 6 and last["score"] == np.trace(counts) / 60
    assert found["stsb", "pats", 0]["loss"] != found["stsb", "plain", 0]["loss"]
    study.main([*flags, *lengths, *asked, "--texts_dir", str(tmp_path / "texts")])
    assert len((tmp_path / "study" / "runs.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.slow
def test_other_methods_have_programs_of_their_own(flags, tmp_path, capsys):
    flags = [*flags, "--short_lengths", "24", "--max_steps", "20", "--rates", "1e-4", "--scales", "1"]
    methods = ["all-leaves", "noisytune", "dps-dense", "child-d"]
    study.main([*flags, "--parts", "c", "d", "--methods", *methods])
    records = [json.loads(line) for line in (tmp_path / "study" / "runs.jsonl").read_text().splitlines()]
    assert [one["method"] for one in records] == ["plain"] + [
        name for name in ("all-leaves", "dps-dense", "noisytune") for _ in range(2)
    ]
    losses = {one["method"]: one["loss"] for one in records if one["seed"] == 0}
    assert len({loss[0] for loss in losses.values()}) == 3
    assert [one["sensitivity"] is None for one in records] == [False] * 3 + [True] * 4
    assert "child-d: left out, since it is not available in lanes" in capsys.readouterr().out


def test_what_cannot_be_trained_is_left_out_by_name(flags, capsys):
    for asked, reason in (
        (["--parts", "d", "--methods", "child-d"], "child-d: left out, since it is not available in lanes"),
        (["--parts", "b", "--tasks", "trec", "subj"], "subj: left out, since --texts_dir is not set"),
        (["--parts", "b", "--tasks", "stsb", "--data_dir", "no"], "stsb: left out, since no/STS-B does not exist"),
    ):
        with pytest.raises(SystemExit):
            study.main([*flags, *asked])
        told = capsys.readouterr()
        assert reason in told.out and told.err == (
            "error: nothing to train: no part has one of these tasks with one of these methods\n"
        )


@pytest.mark.parametrize("task", TASK_METRICS)
def test_scores_of_confusion_matrices_are_those_of_the_metrics(task):
    assert data.main_metric(task) == TASK_METRICS[task]
    rng, classes = np.random.default_rng(0), data.task_of(task).num_labels
    for share in (0.0, 0.3, 0.9, 1.0):
        labels = rng.integers(0, classes, 50)
        predictions = (rng.random(50) < share) * rng.integers(1, classes, 50)
        found = data.evaluated(task, np.eye(classes)[predictions], labels)
        expected = metrics.compute_metrics(data.task_of(task), predictions, labels)[TASK_METRICS[task]]
        assert found["score"] == pytest.approx(expected, abs=1e-12)
        rows = [[np.sum((labels == a) & (predictions == b)) for b in range(classes)] for a in range(classes)]
        assert found["confusion"] == rows


def test_fewer_rows_have_the_proportions_of_all(tmp_path):
    model = str(tiny.save_checkpoint(tmp_path / "model"))
    every, fewer = (data.load_groups("builtin", model, ["sst2"], train_rows=rows) for rows in (None, 100))
    (every, fewer) = (found["short"].tasks["sst2"] for found in (every, fewer))
    assert len(fewer.train) == len(fewer.train_labels) == 100 < len(every.train)
    assert np.mean(fewer.train_labels) == pytest.approx(np.mean(every.train_labels), abs=0.01)
    assert len(fewer.dev) == len(every.dev)


def test_scores_of_regression_are_correlations():
    rng = np.random.default_rng(0)
    labels, logits = rng.random(30).astype(np.float32), rng.normal(size=(30, 1)).astype(np.float32)
    found = data.evaluated("stsb", logits, labels)
    linear, ranks = np.corrcoef(logits[:, 0], labels)[0, 1], (np.argsort(np.argsort(x)) for x in (logits[:, 0], labels))
    assert found["pearson"] == pytest.approx(linear, abs=1e-6)
    assert found["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)
    assert found["score"] == (found["pearson"] + found["spearmanr"]) / 2
    logits[3] = np.nan  # of a lane that diverged
    assert data.evaluated("stsb", logits, labels) == {"score": 0.0, "pearson": 0.0, "spearmanr": 0.0}


def write_texts(folder):
    """TREC and SUBJ with a few rows."""
    texts, praises = tiny.sentences(60, 0)
    for name in ("TREC.train", "TREC.test"):
        rows = (f"{label}:detail {text}\n" for label, text in zip(itertools.cycle(data.TREC_CLASSES), texts))
        (folder / "TREC").mkdir(parents=True, exist_ok=True)
        (folder / "TREC" / name).write_text("".join(rows))
    (folder / "SUBJ").mkdir()
    (folder / "SUBJ" / "subj.all").write_text("".join(f"{a} {text}\n" for a, text in zip(praises, texts, strict=True)))
    return texts, praises


def test_rows_of_trec_and_subj(tmp_path):
    texts, praises = write_texts(tmp_path)
    train, test = data.read_trec(tmp_path)
    assert train.sentence1 == texts and test.labels.tolist() == [0, 1, 2, 3, 4, 5] * 10
    train, scored = data.read_subj(tmp_path)
    assert scored.sentence1 == texts[4::5] and scored.labels.tolist() == praises[4::5].tolist()
    assert sorted([*train.sentence1, *scored.sentence1]) == sorted(texts) and len(train) == 48

    with (tmp_path / "SUBJ" / "subj.all").open("a") as file:
        file.write("2 neither\n")
    with pytest.raises(run.InputError, match=r"subj.all:61: must be a label \(0, 1\), a space and a text"):
        data.read_subj(tmp_path)


def test_a_vocabulary_of_the_words_that_occur():
    tokens = batches.Tokens(np.array([7, 3, 9, 3], np.int32), np.zeros(4, np.uint8), np.array([0, 2, 4]), pad_id=5)
    group = data._group({"sst2": data.TaskData(tokens, np.zeros(2), tokens, np.zeros(2))}, (4,))
    renumbered = group.tasks["sst2"].train
    assert group.words[renumbered.input_ids].tolist() == [7, 3, 9, 3] and group.words[renumbered.pad_id] == 5
    whole = group.with_all_words(12)
    assert whole.tasks["sst2"].train.input_ids.tolist() == [7, 3, 9, 3] and whole.tasks["sst2"].dev.pad_id == 5
    assert whole.words.tolist() == list(range(12))


def test_all_tasks_have_their_first_set_before_one_has_its_second():
    sets = grid.in_turns([grid.in_sets(list("abcde"), 2), grid.in_sets(list("xy"), 2), []])
    assert sets == [["a", "b"], ["x", "y"], ["c", "d"], ["e"]]


def test_what_is_trained_and_in_which_order():
    stages = list(grid.stages("dcba", grid.TASKS, grid.ARMS))
    assert [stage.arms for stage in stages[:5]] == [
        ("plain", "pats", "constant"),
        ("reversed",),
        ("perturbed",),
        ("plain", "pats", "constant"),
        ("not-annealed", "all-leaves", "exponential"),
    ]
    assert [stage.arms for stage in stages[5:]] == [
        (name,) for name in "dps-dense dps-mix noisytune sage child-f child-d mixout r3f r-drop lnsr".split()
    ]
    assert [stage.tasks for stage in stages[2:5]] == [
        ("mrpc", "rte", "sst2", "cola"),
        ("stsb", "trec", "subj"),
        ("mrpc", "rte", "sst2", "cola"),
    ]
    assert list(grid.stages("ab", ["trec", "cola"], ["pats", "lnsr"])) == [
        grid.Stage(("cola",), ("pats",)),
        grid.Stage(("trec",), ("pats",)),
    ]
    settings = [
        (one.method, one.noise_scale) for one in grid.main_trainings("rte", 1e-4, [0], (0.1, 0.2), stages[4].arms)
    ]
    assert settings == [(name, scale) for scale in (0.1, 0.2) for name in stages[4].arms]
    assert grid.main_trainings("rte", 1e-4, range(2), (0.1, 0.2), ("lnsr",)) == [
        grid.Training("rte", "lnsr", 0.0, 1e-4, seed) for seed in range(2)
    ]


def test_arms_are_settings_of_the_glue_program():
    for name, arm in grid.ARMS.items():
        flat = run.settings_of(grid.Training("trec", name, 0.1 * arm.is_noisy, 1e-4, 3), "bfloat16").flat()
        changed = {"task_name": "trec", "method": arm.method, "learning_rate": 1e-4, "seed": 3, "dtype": "bfloat16"}
        changed |= dict(arm.settings) | ({"noise_scale": 0.1} if arm.is_noisy else {})
        defaults = run.Settings(method=arm.method).flat()
        assert flat == defaults | changed  # all else as the authors have it
    assert [name for name, arm in grid.ARMS.items() if not METHODS[arm.method].works_in_lanes] == ["child-d"]
    kinds = [arm.program for arm in grid.ARMS.values()]
    assert len({grid.ARMS[name].program for name in ("plain", "pats", "constant", "reversed", "exponential")}) == 1
    assert len(set(kinds)) == len(kinds) - 4


def test_lines_of_the_first_part_keep_their_protocol():
    given = study.parser().parse_args(["run", "--data_dir", "builtin", "--output_dir", "x", "--questions_lengths", "8"])
    alike = {"epochs": 3, "max_steps": -1, "dtype": "float32"}
    assert run.protocol_of("rte", given) == alike | {"lengths": {"short": [16, 64], "long": [64, 128]}}
    others = {"similarity": [32, 96], "questions": [8], "subjectivity": [32, 64]}
    assert run.protocol_of("subj", given) == alike | {"lengths": others}
    given.train_rows = 100
    assert run.protocol_of("subj", given) == alike | {"lengths": others, "train_rows": 100}
    given.train_rows = None

    protocols = {task: run.protocol_of(task, given) | {"dtype": "bfloat16"} for task in grid.TASKS}
    stored = run.Journal(RESULTS / "h200" / "study" / "runs.jsonl", protocols).finished
    assert {"plain", "pats", "constant"} <= {training.method for training in stored} and len(stored) >= 780


# --- the report -------------------------------------------------------------------------------------------------------


def line(task, method, scale, seed, final):
    concentration = {"gini": final, "entropy": -final, "top_10_percent_share": 0.5}
    settings = {"task": task, "method": method, "noise_scale": scale, "learning_rate": 1e-4, "seed": seed}
    measured = concentration if grid.ARMS[method].is_noisy else None
    return {**settings, "final": final, "sensitivity": measured, "diverged": False}


def lines_of(gains, seeds=20, noise=0.01, tasks=("mrpc", "rte")):
    """Lines of tasks whose settings differ from plain by these gains, up to noise."""
    rng = np.random.default_rng(0)
    for task in tasks:
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
    against = {one["method"]: (one["noise_scale"], one["pooled"]["mean"]) for one in summary["against_controls"]}
    assert against["constant"] == (0.1, pytest.approx(2, abs=0.2))
    assert against["reversed"] == (0.1, pytest.approx(4, abs=0.2)) and len(against) == 2
    plain = summary["concentration"]["mrpc"]["plain"]
    assert plain["gini"]["rho"] == pytest.approx(1) and plain["entropy"]["rho"] == pytest.approx(-1)
    assert plain["gini"]["n"] == 20 and "top_10_percent_share" not in plain

    path = tmp_path / "runs.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    study.main(["report", "--output_dir", str(tmp_path)])
    page = (tmp_path / "study.md").read_text()
    assert "| pats | 0.1 | +" in page and (tmp_path / "study.png").stat().st_size > 10_000


def test_other_parts_have_tables_of_their_own(tmp_path):
    first = {("pats", 0.1): 0.0, ("constant", 0.1): 0.0}
    further = {("not-annealed", 0.01): 0.03, ("not-annealed", 0.1): 0.0, ("lnsr", 0.0): -0.02}
    alone = report.summarise(list(lines_of(first)))
    more_tasks = list(lines_of({("pats", 0.1): 0.02}, tasks=("stsb", "trec")))
    summary = report.summarise([*lines_of(first | further), *more_tasks])
    assert "parts" not in alone and list(summary["parts"]) == ["b", "c", "d"]
    assert summary["tasks"] == ["mrpc", "rte"] and summary["methods"].keys() == {"pats", "constant"}
    assert [one["noise_scale"] for one in summary["settings"]] == [0.1, 0.1]
    for task in ("mrpc", "rte"):  # what does not measure sensitivity takes no part
        assert summary["concentration"][task]["all"]["gini"]["n"] == 60

    others, forms, methods = (summary["parts"][name]["methods"] for name in "bcd")
    assert others["pats"]["pooled"]["counts"] == {"stsb": 20, "trec": 20}  # one scale: nothing was chosen
    assert others["pats"]["pooled"]["mean"] == pytest.approx(2, abs=0.2)
    assert forms["not-annealed"]["noise_scale"] == 0.01 and forms["not-annealed"]["pooled"]["mean"] > 2.5
    assert forms["not-annealed"]["pooled"]["counts"] == {"mrpc": 10, "rte": 10}
    assert methods["lnsr"]["pooled"]["counts"] == {"mrpc": 20, "rte": 20}
    assert methods["lnsr"]["pooled"]["mean"] == pytest.approx(-2, abs=0.2)
    every = [one for part in (summary, *summary["parts"].values()) for one in part["methods"].values()]
    assert [one["p_holm"] for one in every] == list(
        report.holm({number: one["pooled"]["p_value"] for number, one in enumerate(every)})[i] for i in range(5)
    )
    page = report.as_markdown(summary)
    assert "| method | noise scale | stsb | trec | all tasks |" in page and "| lnsr | -" in page
    assert page.count("| task | learning rate |") == 2  # those of mrpc and rte are in one table


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


def stored_summary(machine):
    return report.summarise(report.read_runs(RESULTS / machine / "study" / "runs.jsonl"))


@pytest.mark.parametrize("machine, rows", [("h200", 37), ("cpu", 18)])
def test_the_page_has_the_tables_of_the_stored_runs(machine, rows):
    page = report.as_markdown(stored_summary(machine))
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == rows and set(tables) <= set((ROOT / "docs" / "results.md").read_text().splitlines())


def test_the_default_follows_from_the_stored_runs():
    summary = stored_summary("h200")
    default = inspect.signature(pats_jax.pats).parameters["noise_scale"].default
    assert summary["default"]["noise_scale"] == methods.get_methods("pats")[0].noise_scale == default
