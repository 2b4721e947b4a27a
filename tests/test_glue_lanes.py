"""Sets of GLUE runs in lanes: folders against those of the same runs alone, failures, interruptions, devices."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import rich.console
import tiny
from safetensors.numpy import load_file

from pats_jax import glue, models
from pats_jax.errors import InputError, Preempted
from pats_jax.programs import glue_lanes, lane_sets
from pats_jax.run import flags, lane_training, run_folder
from pats_jax.training import lanes
from pats_jax.training.table import TableSource

STEPS = 15
# Each run: what it has of its own.
OWN = [
    {"seed": 3, "noise_scale": 0.1},
    {"seed": 2**40, "noise_scale": 0.03, "learning_rate": 3e-4, "weight_decay": 0.1, "decay": 0.5},
    {"seed": 5, "learning_rate": 1e30},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run with everything that a run may have: dropout, noise, evaluations, best model, predictions, sensitivity."""
    return tiny.quick_settings(
        tmp_path_factory.mktemp("lanes"),
        method="pats",
        learning_rate=1e-3,
        max_steps=STEPS,
        logging_steps=4,
        eval_steps=5,
        load_best_model_at_end=True,
        max_nonfinite_steps=0,
        sensitivity_batches=1,
        do_train=True,
        do_eval=True,
        do_predict=True,
    )


def request(runs, folder, lanes=None, keeps_models=True):
    """What `pats-jax compare` would ask for."""
    described = [
        {
            "run": {"task": "own", "method": run.method, "seed": run.seed},
            "arguments": [*flags.as_flags(run), "--resume"],
            "log": f"{run.folder.output_dir}.log",
        }
        for run in runs
    ]
    return json.dumps({"folder": str(folder), "runs": described, "lanes": lanes, "keeps_models": keeps_models})


def in_lanes(runs, folder, program=glue_lanes, **options):
    program.main(request(runs, folder, **options), rich.console.Console(file=io.StringIO()))


def settings_of(base, home, owns=OWN, **changes):
    """The settings of some runs, each with a folder in home."""
    return [base.replace(output_dir=str(home / f"run{number}"), **own | changes) for number, own in enumerate(owns)]


def rows_of_steps(monkeypatch):
    """Notes the rows of each training step, by the seed of the run."""
    real, noted = TableSource.counts, {}

    def counts(self, rows, length):
        noted.setdefault(self._seed, []).append((rows.tolist(), length))
        return real(self, rows, length)

    monkeypatch.setattr(TableSource, "counts", counts)
    return noted


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A folder with a set of runs, trained in lanes, and the rows of their steps."""
    home = tmp_path_factory.mktemp("set")
    with pytest.MonkeyPatch.context() as patch:
        noted = rows_of_steps(patch)
        in_lanes(settings_of(base, home), home / "lanes" / "set1")
    return home, noted


def lines(folder):
    return [{k: v for k, v in record.items() if k != "timing"} for record in run_folder.read_metrics(folder)]


def results(folder):
    return {k: v for k, v in json.loads((folder / "results.json").read_text()).items() if k != "timing"}


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def contents(folder):
    """The files of a run's folder, without checkpoints."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if "checkpoints" not in path.relative_to(folder).parts
    )


def close(ours, theirs, key=""):
    """Whether two JSON values are the same but for rounding."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), key
        for name in ours:
            close(ours[name], theirs[name], f"{key}.{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), key
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            close(*pair, f"{key}.{number}")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=2e-2, abs=2e-3), key
    else:
        assert ours == theirs, key


def assert_same_weights(ours, theirs, atol=2e-4):
    """Key biases are left out: their gradient is zero in exact arithmetic, and Adam magnifies rounding there."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith("self.key.bias"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_a_small_table_of_ones_own_has_the_batch_of_a_run_alone(base, tmp_path):
    """Of 6 rows, a batch of 32 is one of 6; a given number of rows stays."""
    rows = zip(*tiny.sentences(6, 0), strict=True)
    table = tiny.write_table(tmp_path / "own.csv", ("text", "label"), *rows, separator=",")
    own = base.replace(
        **{"task_name": None, "data_dir": None, "train_file": str(table), "validation_file": str(table)},
        **{"do_predict": False, "max_steps": 3, "train_batch_size": None, "per_device_train_batch_size": 32},
    )
    runs = settings_of(own, tmp_path, OWN[:2])
    in_lanes(runs, tmp_path / "set")
    glue.run(own.replace(output_dir=str(tmp_path / "alone"), **OWN[0]))
    sizes = [
        json.loads((tmp_path / name / "config.json").read_text())["train_batch_size"]
        for name in ("run0", "run1", "alone")
    ]
    assert sizes == [6, 6, 6]
    assert_same_weights(weights(tmp_path / "run0"), weights(tmp_path / "alone"))


@pytest.mark.slow
def test_texts_with_several_labels_in_lanes(base, tmp_path):
    texts, _ = tiny.sentences(24, 0)
    labels = [str([name for name in ("warm", "calm", "rude") if name in text]) for text in texts]
    rows = zip(texts, labels, strict=True)
    table = tiny.write_table(tmp_path / "own.tsv", ("text", "label"), *rows)
    own = base.replace(
        task_name=None, data_dir=None, train_file=str(table), validation_file=str(table), do_predict=False
    )
    lane, alone = (settings_of(own, tmp_path / kind, OWN[:2]) for kind in ("lanes", "alone"))
    in_lanes(lane, tmp_path / "set")
    for number, run in enumerate(alone):
        glue.run(run)
        ours, theirs = (tmp_path / kind / f"run{number}" for kind in ("lanes", "alone"))
        assert results(ours)["final"]["metrics"].keys() >= {"micro_f1", "macro_f1"}
        close(lines(ours), lines(theirs))
        close(results(ours), results(theirs))
        assert_same_weights(weights(ours), weights(theirs))


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_in_lanes_is_the_run_alone(base, trained, tmp_path, number, monkeypatch):
    home, rows_in_lanes = trained
    alone, lane = settings_of(base, tmp_path)[number], home / f"run{number}"
    noted = rows_of_steps(monkeypatch)
    glue.run(alone)
    folder = tmp_path / f"run{number}"
    assert rows_in_lanes[alone.seed][:STEPS] == noted[alone.seed][:STEPS]
    assert contents(lane) == contents(folder)
    configs = [json.loads((one / "config.json").read_text()) for one in (lane, folder)]
    assert configs[0] == configs[1] | {"output_dir": str(lane)}
    close(lines(lane), lines(folder))
    ours, theirs = results(lane), results(folder)
    for one in (ours, theirs):
        one["diagnosis"].pop("interval"), one["diagnosis"].pop("calibration_error")
    close(ours, theirs)
    assert_same_weights(weights(lane), weights(folder))
    files = [(one / "predictions" / "SST-2.tsv").read_text() for one in (lane, folder)]
    assert files[0] == files[1]


def test_a_lane_that_diverges_is_reported_and_the_others_go_on(trained):
    home, _ = trained
    assert "loss or gradient was not finite in" in (home / "run2.log").read_text()
    assert (home / "run2.log").read_text().startswith("pats-jax: error: training stopped at step 4: ")
    assert not (home / "run2" / "results.json").exists() and not (home / "run2" / "model").exists()
    assert all((home / f"run{number}" / "results.json").exists() for number in (0, 1))
    assert not (home / "lanes" / "set1").exists()
    record = run_folder.read_metrics(home / "run0")[0]
    assert record["timing"]["lanes"] == 3


def interrupt(runs, home, step, program=glue_lanes):
    """Starts a set, which gets SIGTERM at a step."""
    real = lane_training.SetHooks.on_step

    def on_step(self, number, state):
        real(self, number, state)
        if number == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_training.SetHooks, "on_step", on_step)
        with pytest.raises(Preempted, match="interrupted and saved") as caught:
            in_lanes(runs, home / "lanes" / "set1", program)
    assert caught.value.signal_number == signal.SIGTERM


def assert_same_set(home, whole):
    for number in (0, 1):
        ours, theirs = home / f"run{number}", whole / f"run{number}"
        assert lines(ours) == lines(theirs)
        assert results(ours) == results(theirs)
        ours, theirs = weights(ours), weights(theirs)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert (home / "run2.log").read_text().splitlines()[-1] == (whole / "run2.log").read_text().splitlines()[-1]


def test_a_set_that_is_interrupted_goes_on_bit_for_bit(base, trained, tmp_path):
    interrupt(settings_of(base, tmp_path), tmp_path, 7)
    assert os.listdir(tmp_path / "lanes" / "set1" / "round-1" / "checkpoints") == ["7"]
    in_lanes(settings_of(base, tmp_path), tmp_path / "lanes" / "set1", lanes=2)  # as it was begun
    assert_same_set(tmp_path, trained[0])
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("compile")]


@pytest.mark.slow
def test_side_by_side_they_are_as_in_turns(base, trained, tmp_path, monkeypatch):
    """As on an accelerator; interrupted and resumed."""
    monkeypatch.setattr(lane_sets, "take_turns", lambda *_: False)
    interrupt(settings_of(base, tmp_path), tmp_path, 7)
    in_lanes(settings_of(base, tmp_path), tmp_path / "lanes" / "set1")
    for number in (0, 1):
        ours, theirs = tmp_path / f"run{number}", trained[0] / f"run{number}"
        close(lines(ours), lines(theirs))
        close(results(ours), results(theirs))
        assert_same_weights(weights(ours), weights(theirs))


@pytest.mark.slow
def test_a_set_of_which_some_runs_are_finished_goes_on(base, trained, tmp_path, monkeypatch):
    """Killed while it wrote the folders: the lanes of finished runs are trained once more, and nothing is written."""
    real = lane_sets.Group._finish

    def finish(self, part, trained, lane, run):
        if lane == 1:
            raise KeyboardInterrupt
        real(self, part, trained, lane, run)

    with monkeypatch.context() as patch:
        patch.setattr(lane_sets.Group, "_finish", finish)
        with pytest.raises(KeyboardInterrupt):
            in_lanes(settings_of(base, tmp_path), tmp_path / "lanes" / "set1")
    written = (tmp_path / "run0" / "results.json").stat().st_mtime_ns
    in_lanes(settings_of(base, tmp_path), tmp_path / "lanes" / "set1")
    assert (tmp_path / "run0" / "results.json").stat().st_mtime_ns == written
    assert_same_set(tmp_path, trained[0])


@pytest.mark.slow
def test_rounds_models_and_patience(base, tmp_path):
    """Five runs in rounds of two, the last one of one run; each lane stops by its own scores, as its run alone."""
    changes = {"early_stopping_patience": 1, "max_nonfinite_steps": 5, "eval_steps": 2, "load_best_model_at_end": False}
    owns = [{"seed": seed} for seed in range(5)]
    runs = settings_of(base, tmp_path / "lanes", owns, **changes)
    in_lanes(runs, tmp_path / "set", lanes=2, keeps_models=False)
    steps = []
    for number, run in enumerate(settings_of(base, tmp_path / "alone", owns, **changes)):
        glue.run(run)
        lane, folder = tmp_path / "lanes" / f"run{number}", tmp_path / "alone" / f"run{number}"
        assert not (lane / "model").exists() and (lane / "README.md").exists()
        close(lines(lane), lines(folder))
        assert results(lane)["model_step"] == results(folder)["model_step"]
        steps.append(results(lane)["steps"])
    assert len(set(steps)) > 1


@pytest.mark.slow
def test_as_many_lanes_as_fit_into_memory(base, tmp_path, monkeypatch):
    """By XLA's figures, which must count each lane's parameters and moments; side by side, as on an accelerator."""
    used = {}
    monkeypatch.setattr(lane_sets, "take_turns", lambda *_: False)
    real = lanes.CompiledLanes.bytes_of_step

    def bytes_of_step(self, batch):
        used[self.lanes] = real(self, batch)
        return used[self.lanes]

    monkeypatch.setattr(lanes.CompiledLanes, "bytes_of_step", bytes_of_step)
    owns = [{"seed": seed} for seed in range(6)]
    changes = {"max_steps": 4, "do_predict": False}
    monkeypatch.setattr(lane_sets, "memory_of", lambda device: 2**40)
    in_lanes(settings_of(base, tmp_path / "large", owns, **changes), tmp_path / "large" / "set")
    assert list(used) == [6] and run_folder.read_metrics(tmp_path / "large" / "run5")[0]["timing"]["lanes"] == 6
    parameters = run_folder.read_results(tmp_path / "large" / "run0")["num_parameters"]
    assert used[6] > 6 * 12 * parameters
    monkeypatch.setattr(lane_sets, "memory_of", lambda device: used[6] / 2)
    in_lanes(settings_of(base, tmp_path / "small", owns, **changes), tmp_path / "small" / "set")
    chosen = run_folder.read_metrics(tmp_path / "small" / "run0")[0]["timing"]["lanes"]
    assert 1 <= chosen <= 2 and used[chosen] < 0.8 * used[6] / 2


@pytest.mark.slow
def test_fewer_lanes_where_the_host_has_little_memory(base, tmp_path, monkeypatch, caplog):
    owns = [{"seed": seed} for seed in range(3)]
    changes = {"max_steps": 2, "do_predict": False}
    runs = settings_of(base, tmp_path, owns, **changes)
    checkpoint = runs[0].model.model_name_or_path
    per_lane = 50 * sum(leaf.size for leaf in jax.tree.leaves(models.from_pretrained(checkpoint, num_labels=2)[1]))
    assert 2**26 < lane_sets.free_memory() < 2**50
    monkeypatch.setattr(lane_sets, "free_memory", lambda: int(2.5 * per_lane))
    in_lanes(runs, tmp_path / "set", lanes=3)
    assert run_folder.read_metrics(tmp_path / "run0")[0]["timing"]["lanes"] == 2
    assert run_folder.read_results(tmp_path / "run2")["steps"] == 2
    assert "2 lanes at a time instead of 3: 0.0 GB of memory are free" in caplog.text


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("devices, runs", [(8, 16), (4, 6)])
def test_lanes_over_devices(base, tmp_path, devices, runs):
    owns = [{"seed": seed, "noise_scale": 0.01 * seed} for seed in range(runs)]
    one = settings_of(base, tmp_path / "one", owns)
    many = settings_of(base, tmp_path / "many", owns, num_devices=devices)
    in_lanes(one, tmp_path / "set_of_one", lanes=runs)
    in_lanes(many, tmp_path / "set_of_many", lanes=runs)
    for number in range(runs):
        close(lines(tmp_path / "many" / f"run{number}"), lines(tmp_path / "one" / f"run{number}"))
        assert_same_weights(*(weights(tmp_path / kind / f"run{number}") for kind in ("many", "one")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"peft": "lora", "noise_layers": "peft"},
        {"peft": "adalora", "adalora_init_r": 3, "adalora_target_r": 1, "noise_layers": "lora_B"},
        {"peft": "prefix", "method": "finetune", "prefix_length": 4},
        {"method": "bitfit"},
        {"method": "dps-dense+r3f", "update_ratio": 0.25},
        {"method": "dps-mix", "update_ratio": 0.25},
        {"method": "mixout+noisytune"},
        {"method": "sage"},
        {"method": "child-f+l2-sp"},
        {"method": "sift"},
        {"method": "smart+lnsr", "lnsr_layer": 0},
        {"method": "perturbed"},
        {"low_resource": 16},
        {"gradient_accumulation_steps": 2},
        {"layers": "stacked"},
        {"layers": "stacked", "method": "dps-dense", "update_ratio": 0.25},
        {"length_buckets": None, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_methods_and_adapters_in_lanes(base, tmp_path, changes):
    """The second of two lanes, by its losses and norms: one evaluation of a few rows could not tell."""
    owns = [{"seed": 1}, {"seed": 2, "learning_rate": 3e-4}]
    short = {"max_steps": 8, "logging_steps": 1, "eval_steps": 8, "do_predict": False, "load_best_model_at_end": False}
    known = {"method": base.method, "peft": None, "sensitivity_batches": 0} | short | changes
    base = type(base)(**tiny.read_flags(type(base), **base.flat() | known))
    in_lanes(settings_of(base, tmp_path / "lanes", owns), tmp_path / "set")
    glue.run(settings_of(base, tmp_path / "alone", owns)[1])
    close(lines(tmp_path / "lanes" / "run1"), lines(tmp_path / "alone" / "run1"))


@pytest.mark.slow
def test_ten_kills(base, trained, tmp_path):
    """kill -9 at random moments of a set of four lanes, then the whole set once more: bit for bit the same."""
    owns = [*OWN[:2], *({"seed": seed} for seed in (8, 9))]
    changes = {"max_steps": 60, "save_steps": 2, "save_total_limit": 2}
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(home):
        text = request(settings_of(base, home, owns, **changes), home / "set")
        process = subprocess.Popen(
            [sys.executable, "-m", "pats_jax", "glue-lanes"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None
        return process

    def finish(process):
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error

    finish(start(tmp_path / "whole"))
    rng, kills, checkpoints = random.Random(0), 0, tmp_path / "killed" / "set" / "round-1" / "checkpoints"
    while kills < 10:
        since = time.time_ns()
        process = start(tmp_path / "killed")
        while process.poll() is None and not (checkpoints.exists() and checkpoints.stat().st_mtime_ns > since):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        assert process.poll() is None, f"it ended after {kills} kills: {process.stderr.read()}"
        process.kill()
        process.wait()
        kills += 1
    finish(start(tmp_path / "killed"))
    for number in range(4):
        ours, theirs = tmp_path / "killed" / f"run{number}", tmp_path / "whole" / f"run{number}"
        assert lines(ours) == lines(theirs) and results(ours) == results(theirs)
        ours, theirs = weights(ours), weights(theirs)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_diverging_lane_changes_no_bit_of_the_other_seven(base, tmp_path):
    for name, rate in (("good", 1e-4), ("bad", 1e3)):
        owns = [{"seed": seed} for seed in range(8)]
        owns[2]["learning_rate"] = rate
        changes = {"max_steps": 45, "max_nonfinite_steps": 5}
        in_lanes(settings_of(base, tmp_path / name, owns, **changes), tmp_path / f"set-{name}", lanes=8)
    assert (tmp_path / "good" / "run2" / "results.json").exists()
    assert not (tmp_path / "bad" / "run2" / "results.json").exists()
    for number in {*range(8)} - {2}:
        ours, theirs = (tmp_path / name / f"run{number}" for name in ("bad", "good"))
        assert lines(ours) == lines(theirs) and results(ours) == results(theirs)
        ours, theirs = weights(ours), weights(theirs)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_set_in_the_other_layout_of_layers_is_refused(base, tmp_path):
    folder = tmp_path / "set1"
    folder.mkdir()
    runs = [{"task": "sst2", "method": "pats", "seed": 3}]
    (folder / "lanes.json").write_text(json.dumps({"runs": runs, "lanes": 3, "layers": "stacked"}))
    with pytest.raises(InputError, match="begun with --layers stacked; set that"):
        in_lanes(settings_of(base, tmp_path), folder)
    (folder / "lanes.json").write_text(json.dumps({"runs": runs, "lanes": 3, "layers": "separate"}))
    with pytest.raises(InputError, match=f"begun on other devices, or by an earlier version; .* delete {folder} to "):
        in_lanes(settings_of(base, tmp_path), folder)
