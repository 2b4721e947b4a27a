"""Sets of text-to-text runs in lanes: folders against those of the same runs alone, interruptions, adapters, grids."""

import io
import json
import shutil

import numpy as np
import pytest
import rich.console
import tiny
import tiny_seq2seq
from test_glue_lanes import assert_same_weights, close, contents, in_lanes, interrupt, lines, results, weights

from pats_jax.comparison import compare, first_guess, run_sets
from pats_jax.comparison.arms import Arm
from pats_jax.comparison.seed_statistics import FinishedRun, Run
from pats_jax.errors import InputError
from pats_jax.programs import lane_sets, text2text, text2text_lanes
from pats_jax.run import flags, run_folder
from pats_jax.run.machine import Devices
from pats_jax.run.text2text_settings import Text2TextSettings

# Each run: what it has of its own.
OWN = [
    {"seed": 3, "noise_scale": 0.1},
    {"seed": 2**40, "noise_scale": 0.03, "learning_rate": 3e-3, "weight_decay": 0.1, "decay": 0.5},
    {"seed": 5, "learning_rate": 1e30},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Checkpoints, and tables of sources and targets of several lengths."""
    home = tmp_path_factory.mktemp("home")
    tiny_seq2seq.save_checkpoint(home / "t5", "t5")
    tiny_seq2seq.save_checkpoint(home / "deep", "t5", num_layers=2, num_decoder_layers=2)
    tiny_seq2seq.save_checkpoint(home / "bart", "bart")
    for seed, (name, rows) in enumerate({"train": 20, "dev": 6, "test": 5}.items()):
        tiny_seq2seq.write_pairs(home / f"{name}.tsv", tiny_seq2seq.pairs(rows, seed))
    return home


def flags_of(home, **changes):
    """A run with everything that a run may have: dropout, smoothing, noise, evaluations, best model, predictions."""
    base = {
        "model_name_or_path": home / "t5",
        "train_file": home / "train.tsv",
        "validation_file": home / "dev.tsv",
        "max_source_length": 8,
        "max_target_length": 6,
        "method": "pats",
        "dropout": 0.1,
        "label_smoothing_factor": 0.1,
        "learning_rate": 1e-2,
        "length_buckets": 2,
        "train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "max_steps": 9,
        "logging_steps": 2,
        "eval_steps": 3,
        "save_steps": 0,
        "max_nonfinite_steps": 0,
        "sensitivity_batches": 1,
        "num_devices": 1,
        "metrics": ("token_f1", "exact_match"),
    }
    return base | changes


def settings_of(home, folder, owns=OWN, **changes):
    """The settings of some runs, each with a folder."""
    base = {"test_file": home / "test.tsv", "load_best_model_at_end": True}
    given = {
        name: x if isinstance(x, tuple) else str(x) if hasattr(x, "parts") else x
        for name, x in flags_of(home, **base | changes).items()
    }
    read = tiny.read_flags(Text2TextSettings, **given)
    return [Text2TextSettings(**read | own, output_dir=str(folder / f"run{n}")) for n, own in enumerate(owns)]


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """A folder with a set of runs, trained in lanes; the last one diverges."""
    folder = tmp_path_factory.mktemp("set")
    in_lanes(settings_of(home, folder), folder / "lanes" / "set1", text2text_lanes)
    return folder


def tables(folder):
    return {path.name: path.read_text() for path in (folder / "predictions").iterdir()}


@pytest.mark.slow  # test_glue_lanes.py has what the two programs share
@pytest.mark.parametrize("number", [0, 1])
def test_a_run_in_lanes_is_the_run_alone(home, trained, tmp_path, number):
    lane, folder = trained / f"run{number}", tmp_path / f"run{number}"
    text2text.run(settings_of(home, tmp_path)[number])
    assert contents(lane) == contents(folder)
    configs = [json.loads((one / "config.json").read_text()) for one in (lane, folder)]
    assert configs[0] == configs[1] | {"output_dir": str(lane)}
    close(lines(lane), lines(folder))
    close(results(lane), results(folder))
    assert_same_weights(weights(lane), weights(folder))
    assert tables(lane) == tables(folder) and tables(lane).keys() == {"validation.tsv", "test.tsv"}


@pytest.mark.slow
def test_lanes_differ_in_order_and_noise_and_one_that_diverges_is_reported(home, trained):
    start, *ends = (weights(trained / name) for name in ("run0", "run1"))
    (end,) = ends
    assert all(np.abs(start[name] - end[name]).max() > 1e-3 for name in start if name.endswith("q.weight"))
    assert "loss or gradient was not finite in" in (trained / "run2.log").read_text()
    assert not (trained / "run2" / "results.json").exists() and not (trained / "lanes" / "set1").exists()
    found = run_folder.read_results(trained / "run0")
    assert found["timing"]["lanes"] == 3 and found["test"]["examples"] == 5 and "concentration" in found


@pytest.mark.slow
def test_a_set_that_is_interrupted_goes_on_bit_for_bit(home, trained, tmp_path):
    runs = settings_of(home, tmp_path)
    interrupt(runs, tmp_path, 5, text2text_lanes)
    assert not (tmp_path / "run0" / "results.json").exists()
    in_lanes(runs, tmp_path / "lanes" / "set1", text2text_lanes)
    for number in (0, 1):
        ours, theirs = tmp_path / f"run{number}", trained / f"run{number}"
        assert lines(ours) == lines(theirs) and results(ours) == results(theirs) and tables(ours) == tables(theirs)
        ours, theirs = weights(ours), weights(theirs)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "run2.log").read_text().splitlines()[-1] == (trained / "run2.log").read_text().splitlines()[-1]


@pytest.mark.slow
def test_side_by_side_they_are_as_in_turns(home, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(lane_sets, "take_turns", lambda *_: False)
    in_lanes(settings_of(home, tmp_path), tmp_path / "lanes" / "set1", text2text_lanes)
    for number in (0, 1):
        ours, theirs = tmp_path / f"run{number}", trained / f"run{number}"
        close(lines(ours), lines(theirs))
        assert_same_weights(weights(ours), weights(theirs))
        assert tables(ours) == tables(theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"peft": "lora", "noise_layers": "peft"},
        {"peft": "prefix", "prefix_length": 3, "method": "finetune"},
        {"peft": "prompt", "prompt_length": 3, "method": "finetune"},
        {"peft": "adapters", "method": "finetune"},
        {"peft": "adalora", "adalora_target_r": 6, "method": "finetune"},
        {"model_name_or_path": "bart", "method": "bitfit", "max_source_length": 24, "max_target_length": 20},
        {"method": "dps-dense", "update_ratio": 0.5},
        {"method": "mixout+noisytune"},
        {"method": "perturbed", "noise_scale": 0.01},
        {"method": "sift"},
        {"model_name_or_path": "deep", "layers": "stacked", "gradient_accumulation_steps": 2, "num_beams": 2},
        {"length_buckets": None, "dtype": "bfloat16"},
        {"train_batch_size": None, "per_device_train_batch_size": 32},  # of 20 rows a batch of 20
        {"early_stopping_patience": 1, "eval_steps": 1, "max_steps": 9, "load_best_model_at_end": True},
    ],
    ids=str,
)
def test_methods_and_adapters_in_lanes(home, tmp_path, changes):
    """The second of two lanes, by its losses and norms, and by the texts at its end."""
    changes = changes | {"model_name_or_path": home / changes.get("model_name_or_path", "t5")}
    owns = [{"seed": 1}, {"seed": 2, "learning_rate": 3e-3}]
    short = {"max_steps": 5, "logging_steps": 1, "eval_steps": 5, "load_best_model_at_end": False, "peft": None}
    known = short | {"sensitivity_batches": 0} | changes
    in_lanes(settings_of(home, tmp_path / "lanes", owns, **known), tmp_path / "set", text2text_lanes)
    text2text.run(settings_of(home, tmp_path / "alone", owns, **known)[1])
    ours, theirs = (tmp_path / kind / "run1" for kind in ("lanes", "alone"))
    close(lines(ours), lines(theirs))
    assert contents(ours) == contents(theirs)
    if known.get("dtype") != "bfloat16":
        assert tables(ours) == tables(theirs)


@pytest.mark.slow
@pytest.mark.devices(2)
def test_lanes_over_devices(home, tmp_path):
    owns = [{"seed": seed, "noise_scale": 0.01 * seed} for seed in range(3)]
    one = settings_of(home, tmp_path / "one", owns)
    many = settings_of(home, tmp_path / "many", owns, num_devices=2)
    in_lanes(one, tmp_path / "set_of_one", text2text_lanes, lanes=3, keeps_models=False)
    in_lanes(many, tmp_path / "set_of_many", text2text_lanes, lanes=3, keeps_models=False)
    for number in range(3):
        ours, theirs = (tmp_path / kind / f"run{number}" for kind in ("many", "one"))
        close(lines(ours), lines(theirs))
        assert tables(ours) == tables(theirs)
        assert not (ours / "model").exists() and (ours / "README.md").exists()


# grids


def grid_flags(home, root, **changes):
    own = {"method": None, "methods": ("finetune", "pats"), "seeds": ("1", "2"), "program": "text2text"}
    return tiny.flags(**flags_of(home, **own | {"output_dir": root} | changes))


def sets_of(home, root, **changes):
    grid, others = compare.parse(grid_flags(home, root, **changes))
    shared = compare.check(compare.name_data(grid, others), others)
    runs = compare.name_data(grid, others).runs(shared)
    return run_sets.in_sets(runs, lambda run: compare.settings_of(run, root, shared), root, grid.lanes)


def test_seeds_of_an_arm_are_a_set(home, tmp_path):
    sets = sets_of(home, tmp_path)
    assert [[run.name for run in one.runs] for one in sets] == [
        [f"train/{method}/seed{seed}" for seed in (1, 2)] for method in ("finetune", "pats")
    ]
    assert [len(one.runs) for one in sets_of(home, tmp_path, learning_rate=("1e-3", "1e-2"))] == [4, 4]
    assert [len(one.runs) for one in sets_of(home, tmp_path, num_beams=("1", "2"))] == [2] * 4
    held_out = sets_of(home, tmp_path, validation_file=None)  # by each seed other rows
    assert all(one.name is None for one in held_out) and len(held_out) == 4


def refused(home, root, **changes):
    with pytest.raises(InputError) as caught:
        compare.run(list(map(str, grid_flags(home, root, **changes))), rich.console.Console(file=io.StringIO()))
    assert "\n" not in str(caught.value) and not (root / "runs").exists()
    return str(caught.value)


def test_what_does_not_go_together_is_one_line(home, tmp_path):
    root = tmp_path / "grid"
    assert refused(home, root, tasks="sst2").startswith("--tasks: is for GLUE; for --program text2text, set --train_")
    assert refused(home, root, max_length=8) == "--max_length: use --max_target_length, without the start token"
    assert refused(home, root, max_seq_length=8) == "--max_seq_length: use --max_source_length and --max_target_length"
    assert refused(home, root, task_name="sst2") == "--task_name: use --tasks"
    assert refused(home, root, train_file=None, validation_file=None) == "no data: set --train_file or --dataset_name"
    own = {"max_source_length": None, "max_target_length": None, "dropout": None, "metrics": None}
    assert refused(home, root, program=None, **own, source_prefix="a") == (
        "--source_prefix: is for text to text; set --program text2text, or omit it"
    )
    root.mkdir()
    (root / "grid.json").write_text('{"runs": [], "commands": [], "machines": []}')  # of an earlier version
    assert refused(home, root) == f"--output_dir {root}: holds a grid of --program glue; set that, or another folder"


def test_a_grid_resumes_runs_that_are_its_own(home, tmp_path):
    """The command line of a run gives the settings of its arm, and its place."""
    grid, others = compare.parse(grid_flags(home, tmp_path, peft=("none", "lora")))
    shared = compare.check(compare.name_data(grid, others), others)
    run = Run("train", Arm("pats", (("peft", "lora"),)), 2)
    assert run in compare.name_data(grid, others).runs(shared)
    module, package, program, *arguments = compare.run_arguments(run, tmp_path, shared)
    assert (module, package, program, arguments[-1]) == ("-m", "pats_jax", "text2text", "--resume")
    settings = flags.parse(arguments, "pats-jax text2text", Text2TextSettings)
    assert (settings.seed, settings.peft, settings.method) == (2, "lora", "pats")
    assert settings.folder.output_dir == str(tmp_path / "runs" / "train" / "pats,peft=lora" / "seed2")
    assert settings.metrics == ("token_f1", "exact_match") and settings.data.train_file == str(home / "train.tsv")
    job = compare.job_of(run_sets.RunSet((run, run), "set1"), tmp_path, shared, grid)
    assert job.arguments == ("-m", "pats_jax", "text2text-lanes")
    rates = Devices("1 cpu", 1, "cpu", {"float32": 1e10})
    assert first_guess.guess_seconds([run_sets.RunSet((run,))], lambda _: settings, rates, 1) is None


@pytest.fixture
def reported(trained, tmp_path):
    """A grid of two of the runs above, its folder and what its report says."""
    listed = ("noise_scale", "learning_rate", "weight_decay", "decay")
    runs = []
    for number in (0, 1):
        settings = json.loads((trained / f"run{number}" / "config.json").read_text())
        runs.append(Run("train", Arm("pats", tuple((name, settings[name]) for name in listed)), settings["seed"]))
        shutil.copytree(trained / f"run{number}", runs[-1].folder(tmp_path))
    record = {"program": "text2text", "runs": [run.record() for run in runs], "commands": [], "machines": []}
    (tmp_path / "grid.json").write_text(json.dumps(record))
    out = io.StringIO()
    compare.run(["--output_dir", str(tmp_path), "--report_only"], rich.console.Console(file=out, width=200))
    return tmp_path, runs, out.getvalue()


@pytest.mark.slow
def test_the_report_of_a_grid(reported, home):
    root, runs, said = reported
    found = json.loads((root / "comparison.json").read_text())
    numbers = found["tasks"]["train"]
    assert found["program"] == "text2text" and numbers["metric"] == "token_f1" and numbers["majority_class"] is None
    for run in runs:
        scores = run_folder.read_results(run.folder(root))["best"]["metrics"]
        assert numbers["methods"][run.arm.label]["scores"] == {str(run.seed): scores["token_f1"]}
    assert said.startswith("train, token_f1 x 100")
    text = (root / "report.md").read_text()
    assert "majority" not in text and "head" not in text and "also share the order of examples" in text
    assert (root / "plots" / "train-scores.png").exists() and (root / "plots" / "train-sensitivity.png").exists()
    with pytest.raises(InputError, match="holds a grid of --program text2text"):
        compare.run(["--methods", "pats", "--tasks", "rte", "--seeds", "1", "--output_dir", str(root)], None)


@pytest.mark.slow
def test_bleu_is_a_share_like_the_other_scores(reported):
    root, runs, _ = reported
    for run in runs:
        for name in ("results.json", "metrics.jsonl"):
            path = run.folder(root) / name
            text = path.read_text().replace('"token_f1"', '"bleu"').replace('"exact_match": 0.0', '"exact_match": 25.0')
            path.write_text(text)
    finished = FinishedRun.read(runs[0], root, Text2TextSettings)
    assert finished.results["main_metric"] == "bleu"
    assert finished.score == finished.results["best"]["metrics"]["bleu"] / 100
    out = io.StringIO()
    compare.report(root, rich.console.Console(file=out, width=200))
    assert out.getvalue().startswith("train, bleu\n")


@pytest.mark.slow
def test_a_grid_of_real_runs(home, tmp_path, monkeypatch):
    """In lanes, and each in its own process: the same scores and losses."""
    monkeypatch.setenv("XLA_FLAGS", tiny.flags_for_one_device())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    found = {}
    for lanes in (2, 1):
        root, out = tmp_path / str(lanes), io.StringIO()
        args = list(map(str, grid_flags(home, root, lanes=lanes, keep_models="best")))
        compare.run(args, rich.console.Console(file=out, width=200))
        assert "4 runs to do; the time left is shown as soon as it can be told" in out.getvalue()
        found[lanes] = json.loads((root / "comparison.json").read_text())
        assert len(list(root.glob("runs/train/*/*/model"))) == 2
        again = io.StringIO()
        compare.run(args, rich.console.Console(file=again, width=200))
        assert "4 of 4 runs are already finished" in again.getvalue()
    ours, theirs = (one["tasks"]["train"]["methods"] for one in found.values())
    assert ours.keys() == theirs.keys() == {"finetune", "pats"}
    for arm in ours:
        assert ours[arm]["scores"] == theirs[arm]["scores"]
        losses = [one[arm]["curves"]["loss"]["mean"] for one in (ours, theirs)]
        np.testing.assert_allclose(*losses, rtol=1e-3)
    assert [path.name for path in sorted((tmp_path / "2" / "lanes").iterdir())] == ["set1.log", "set2.log"]
