"""Runs that are killed, interrupted, short of disk or moved to other devices end as if nothing had happened."""

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import damage
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from safetensors.numpy import load_file
from test_full_disk import full_from

from pats_jax import glue
from pats_jax.errors import InputError, Preempted
from pats_jax.programs import cli
from pats_jax.run import replacing, run_folder, training_run
from pats_jax.training.checkpoints import Checkpoints

STEPS = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of PATS on a tiny SST-2 with everything that has a state: dropout, noise, evaluations, early stop, best."""
    return tiny.quick_settings(
        tmp_path_factory.mktemp("resume"),
        method="pats",
        noise_scale=0.1,
        max_steps=STEPS,
        logging_steps=7,
        eval_steps=5,
        early_stopping_patience=50,
        load_best_model_at_end=True,
        sensitivity_batches=1,
        save_steps=4,
        save_total_limit=None,
    )


def flags(settings):
    given = {name: value for name, value in settings.flat().items() if value is not None}
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items() if value is not False
    ]


def start(settings, arguments=None, **options):
    """The run as a user starts it, in a process of its own that reuses compiled programs."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(settings.model.model_name_or_path).parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "pats_jax", "glue", *(arguments or flags(settings))]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, **options)


def finish(process):
    _, error = process.communicate(timeout=300)
    return process.returncode, error


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The run in one piece, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    settings = dataclasses.replace(base, output_dir=str(folder), save_total_limit=100)  # all: flags cannot say None
    code, error = finish(start(settings))
    assert code == 0, error
    return pathlib.Path(settings.folder.output_dir)


def final_state(folder):
    """Every array of the last checkpoint, read by Orbax alone."""
    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    assert int(last.name) == STEPS
    return ocp.StandardCheckpointer().restore(last / "state")


def lines(folder):
    return [{k: v for k, v in record.items() if k != "timing"} for record in run_folder.read_metrics(folder)]


def results(folder):
    return {k: v for k, v in json.loads((folder / "results.json").read_text()).items() if k != "timing"}


def assert_same_run(folder, whole):
    assert lines(folder) == lines(whole)
    assert results(folder) == results(whole)
    ours, theirs = final_state(folder), final_state(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 60
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, whole))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def wait_for_change(paths, process, since=0):
    """Waits until one of the paths has been written, or the process has ended."""
    while process.poll() is None and not any(p.exists() and p.stat().st_mtime_ns > since for p in paths):
        time.sleep(0.01)


@pytest.mark.slow
def test_twenty_kills(base, whole, tmp_path):
    """kill -9 at random moments: in the first steps, between steps and while a checkpoint is being written."""
    settings = dataclasses.replace(base, output_dir=str(tmp_path / "run"), save_steps=2, resume=True)
    folder, rng, kills, during_save = tmp_path / "run", random.Random(0), 0, 0
    while kills < 20:
        since = time.time_ns()
        process = start(settings)
        if kills % 4:  # a save has begun
            wait_for_change([folder / "checkpoints"], process, since)
            time.sleep(rng.uniform(0, 0.3))
        else:  # a process has begun: it may still be compiling
            wait_for_change([folder / "metrics.jsonl"], process, since)
            time.sleep(rng.uniform(0, 3.0))
        assert process.poll() is None, f"it ended after {kills} kills: {process.stderr.read()}"
        process.kill()
        process.wait()
        kills += 1
        during_save += any("tmp" in path.name for path in (folder / "checkpoints").glob("*"))
    assert during_save > 0
    code, error = finish(start(settings))
    assert code == 0, error
    assert_same_run(folder, whole)


@pytest.mark.slow  # in a process of its own; below it is in this one
def test_a_process_that_is_terminated_says_how_to_go_on_and_does(base, whole_here, tmp_path, caplog):
    folder = tmp_path / "run"
    process = start(dataclasses.replace(base, output_dir=str(folder), save_steps=0))
    assert any("made the first step" in line for line in process.stderr)  # earlier there is nothing to save
    process.send_signal(signal.SIGTERM)
    code, error = finish(process)
    assert code == 143 and "Traceback" not in error
    assert error.splitlines()[-1].endswith(f"to resume, run: pats-jax glue --config {folder}/config.json --resume")
    command = error.splitlines()[-1].partition("to resume, run: pats-jax glue ")[2].split()
    caplog.set_level("INFO")
    cli.main(["glue", *command, "--save_steps=20"])
    assert "resuming after step" in caplog.text
    assert_same_run(folder, whole_here)


# in this process: signals are raised, and the run goes on, by hand


def run(settings, folder, **changes):
    return glue.run(dataclasses.replace(settings, output_dir=str(folder), **changes))


@pytest.fixture(scope="module")
def whole_here(base, tmp_path_factory):
    """The run in one piece in this process; `--resume`, where there is nothing yet, begins."""
    folder = tmp_path_factory.mktemp("whole_here") / "run"
    assert run(base, folder, save_steps=20, resume=True)["steps"] == STEPS
    return folder


@contextlib.contextmanager
def signal_at(step, number):
    """The signal comes after a step; what it ends as, and that the signal has its handler of before again."""
    real, handler = training_run.TrainingHooks.on_step, signal.getsignal(number)

    def on_step(self, made, state):
        real(self, made, state)
        if made == step:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run.TrainingHooks, "on_step", on_step)
        with pytest.raises((Preempted, SystemExit)) as caught:
            yield caught
    assert signal.getsignal(number) is handler


def interrupt(base, folder, step=13, **changes):
    """Runs up to a step, where Ctrl-C comes; gives the folder."""
    with signal_at(step, signal.SIGINT) as caught:
        run(base, folder, **changes)
    assert caught.value.signal_number == signal.SIGINT and "interrupted and saved" in str(caught.value)
    assert str(step) in os.listdir(folder / "checkpoints")
    assert not (folder / "results.json").exists()
    return folder


@pytest.fixture
def interrupted(base, tmp_path):
    return functools.partial(interrupt, base, tmp_path / "run")


@pytest.fixture(scope="module")
def first_steps(base, tmp_path_factory):
    return interrupt(base, tmp_path_factory.mktemp("first_steps") / "run")


@pytest.fixture
def cut_short(first_steps, tmp_path):
    """A folder of the run up to step 13."""
    return shutil.copytree(first_steps, tmp_path / "run")


@pytest.fixture(scope="module")
def without_dropout(base, tmp_path_factory):
    """A run without dropout, which pmap draws by device: its settings, the whole run, and the one that was cut."""
    home = tmp_path_factory.mktemp("without_dropout")
    config = tiny.save_checkpoint(home / "model") / "config.json"
    values = json.loads(config.read_text())
    assert values["classifier_dropout"] == 0.1
    config.write_text(json.dumps(values | {"classifier_dropout": 0.0}))
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "method": "finetune"}
    still["model_name_or_path"] = str(home / "model")
    run(base, home / "whole", **still)
    return still, home / "whole", interrupt(base, home / "cut", **still)


def test_ctrl_c_saves_the_step_and_a_second_one_is_as_ever(first_steps):
    """As `interrupt` has found."""
    assert (
        json.loads((first_steps / "checkpoints" / "13" / "state" / "record.json").read_text())["progress"]["step"] == 13
    )


def test_a_run_that_is_terminated_says_how_to_go_on_and_does(base, whole_here, tmp_path, caplog, capsys):
    """Though it was to save no checkpoints."""
    folder = tmp_path / "run"
    with signal_at(13, signal.SIGTERM) as caught:
        cli.main(["glue", *flags(dataclasses.replace(base, output_dir=str(folder), save_steps=0))])
    error = capsys.readouterr().err
    assert caught.value.code == 143 and "Traceback" not in error
    assert error.splitlines()[-1].endswith(f"to resume, run: pats-jax glue --config {folder}/config.json --resume")
    command = error.splitlines()[-1].partition("to resume, run: pats-jax glue ")[2].split()
    caplog.set_level("INFO")
    cli.main(["glue", *command, "--save_steps=20"])
    assert "resuming after step 13" in caplog.text
    assert_same_run(folder, whole_here)


@pytest.mark.slow
@pytest.mark.parametrize(
    "there",
    [
        {"num_devices": 4, "train_batch_size": None, "per_device_train_batch_size": 5},
        {"num_devices": 8, "parallel": "pmap"},
        {"num_devices": 8, "fsdp": 2},
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_devices(base, without_dropout, tmp_path, there, caplog):
    """The global batch stays, whatever is asked: 8 rows, on 1 device, then on 4 or 8."""
    caplog.set_level("INFO")
    still, whole, cut = without_dropout
    folder = shutil.copytree(cut, tmp_path / "run")
    run(base, folder, resume=True, **still | there)
    assert f"8 rows per step: {8 // there['num_devices']} x {there['num_devices']} devices" in caplog.text
    assert "after step 13 of 60" in caplog.text
    ours, theirs = lines(folder), lines(whole)
    assert [(line["step"], line.keys()) for line in ours] == [(line["step"], line.keys()) for line in theirs]
    pairs = [(a["loss"], b["loss"]) for a, b in zip(ours, theirs, strict=True) if "loss" in a]
    assert all(a == pytest.approx(b, rel=1e-3) for a, b in pairs) and pairs[0][0] == pairs[0][1]


def test_a_finished_run_returns_at_once(base, whole_here, monkeypatch):
    monkeypatch.setattr(glue, "load_data", None)
    assert run(base, whole_here, resume=True)["final"] == results(whole_here)["final"]


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_begins_again(base, whole_here, tmp_path):
    folder = tmp_path / "run"
    config = json.loads((whole_here / "config.json").read_text())
    run_folder.start(folder, config | {"output_dir": str(folder)})
    (folder / "metrics.jsonl").write_text('{"step": 7, "lo')
    (folder / ".model-abc").mkdir()
    run(base, folder, resume=True, save_steps=20)
    assert lines(folder) == lines(whole_here) and not (folder / ".model-abc").exists()


def test_other_settings_are_refused_by_name(base, cut_short):
    folder = cut_short
    with pytest.raises(InputError) as caught:
        run(base, folder, resume=True, learning_rate=1e-3, seed=1, per_device_eval_batch_size=3, save_steps=1)
    assert str(caught.value) == (
        f"--resume: {folder} holds a run with different settings: "
        "seed was 42 and is 1, learning_rate was 0.01 and is 0.001"
    )
    with pytest.raises(InputError, match="train_batch_size was 8 and is 16"):
        run(base, folder, resume=True, train_batch_size=16)
    with pytest.raises(InputError, match=r"--train_batch_size 8: cannot be split evenly across 3 devices"):
        run(base, folder, resume=True, num_devices=3)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(base, whole_here, cut_short, caplog):
    folder = cut_short
    (folder / "checkpoints" / "13" / "state" / "record.json").write_text("{")
    run(base, folder, resume=True, save_steps=20)
    assert f"{folder / 'checkpoints' / '13'} is damaged" in caplog.text
    assert lines(folder) == lines(whole_here) and (folder / "checkpoints" / "13.damaged").is_dir()


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_found_before_training_goes_on(base, whole_here, interrupted, caplog):
    """Not when the best model is needed, after the last step: training comes to it once more."""
    folder = interrupted(step=28)
    record = json.loads((folder / "checkpoints" / "28" / "state" / "record.json").read_text())
    best = record["best_step"]
    assert best < 28
    (folder / "checkpoints" / str(best) / "state" / "manifest.ocdbt").write_bytes(b"")
    run(base, folder, resume=True)
    assert f"{folder / 'checkpoints' / str(best)} is damaged" in caplog.text
    assert f"28 needs the best checkpoint so far, {folder / 'checkpoints' / str(best)}" in caplog.text
    assert lines(folder) == lines(whole_here) and results(folder)["best"] == results(whole_here)["best"]


# damage


@pytest.fixture(scope="module")
def saved(base, whole, tmp_path_factory):
    """Some checkpoints of a run, the state that they are restored into, and what each of them holds."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())

    def best_of(step):
        return json.loads((folder / "checkpoints" / str(step) / "state" / "record.json").read_text())["best_step"]

    kept = {*steps[-3:], *[step for step in steps if step < best_of(STEPS)][-2:]}
    while more := {best_of(step) for step in kept} - kept - {None}:
        kept |= more
    for step in {*steps} - kept:
        shutil.rmtree(folder / "checkpoints" / str(step))
    taken = []

    def take(self, state, kind):
        taken.append((state, kind))
        raise InputError("taken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "restore", take)
        with pytest.raises(InputError, match="taken"):
            run(base, folder, resume=True)
    ((state, kind),) = taken
    alone, held = folder.parent / "alone", {}
    for step in sorted(int(path.name) for path in (folder / "checkpoints").iterdir()):
        shutil.copytree(folder / "checkpoints" / str(step), alone / str(step))
        restored, progress = Checkpoints(alone, None).restore(state, kind)
        assert progress.step == step
        held[step] = (jax.tree.map(np.asarray, jax.tree.leaves(restored)), progress)
    return folder, state, held


@pytest.mark.slow
def test_120_random_damages_of_checkpoints(saved, tmp_path, caplog, capfd):
    """Restored is bit for bit what was saved, of a step that was saved; older than the newest only with a warning."""
    folder, state, held = saved
    newest, rng, outcomes = max(held), random.Random(0), collections.Counter()
    best = held[newest][1].best("accuracy")["step"]
    for number in range(120):
        caplog.clear()
        here = tmp_path / str(number)
        shutil.copytree(folder / "checkpoints", here)
        hit = rng.choice([newest, newest, best])
        what = damage.at_random(rng, here / str(hit), folder / "checkpoints")
        try:
            arrays, progress = Checkpoints(here, None).restore(state, training_run.Progress)
        except InputError as refusal:
            assert str(here) in str(refusal) and "\n" not in str(refusal), what
            outcomes["refused"] += 1
            continue
        expected, at_that_time = held[progress.step]
        assert repr(progress) == repr(at_that_time), what
        for ours, theirs in zip(jax.tree.leaves(arrays), expected, strict=True):
            assert ours.dtype == theirs.dtype and np.asarray(ours).tobytes() == theirs.tobytes(), what
        assert progress.step == newest or f"{here / str(hit)} is damaged" in caplog.text, what
        assert progress.step == newest or sorted(here.glob("*.damaged")), what
        outcomes["newest" if progress.step == newest else "older"] += 1
        shutil.rmtree(here)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert outcomes["older"] > 60 and outcomes["newest"] > 0, outcomes  # and some files nobody reads


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_resumed_from_damaged_checkpoints_is_the_uninterrupted_one(base, whole, tmp_path, seed):
    folder, rng = tmp_path / "run", random.Random(seed)
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    for step in steps[-3:]:
        shutil.rmtree(folder / "checkpoints" / str(step))
    what = [damage.at_random(rng, folder / "checkpoints" / str(steps[-4]), folder / "checkpoints") for _ in range(2)]
    code, error = finish(start(dataclasses.replace(base, output_dir=str(folder), resume=True)))
    assert "Traceback" not in error, what
    if code:
        assert code == 2 and str(folder / "checkpoints") in error.splitlines()[-1], what
    else:
        assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_the_last_checkpoint_is_whole(base, whole_here, cut_short):
    """No file may grow beyond what a checkpoint needs; to the program that is a disk that has no more room."""
    folder = cut_short
    with full_from(20_000), pytest.raises(InputError) as caught:
        run(base, folder, resume=True)
    last = folder / "checkpoints" / "13"
    assert str(caught.value) == f"a checkpoint could not be written: File too large; the last good one is {last}"
    run(base, folder, resume=True, save_steps=20)
    assert lines(folder) == lines(whole_here)


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken, error",
    [
        ("safetensors.numpy.save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("pats_jax.reporting.plots._save", InputError("loss.png: cannot be written (No space left on device)")),
    ],
)
def test_a_disk_that_is_full_at_the_end_costs_no_training(
    broken, error, base, whole_here, tmp_path, monkeypatch, caplog
):
    """Though no checkpoint was asked for; what is left to do is done once there is room."""

    def refuse(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(broken, refuse)
        with pytest.raises(InputError, match=r"(model|loss\.png): cannot be written \(No space left on device\)"):
            run(base, tmp_path / "run", save_steps=0)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "checkpoints" in names and names <= {"config.json", "metrics.jsonl", "checkpoints", "model", "diagnosis"}
    assert replacing.foreign(tmp_path / "run") is None
    caplog.set_level("INFO")
    run(base, tmp_path / "run", resume=True)
    assert f"resuming after step {STEPS} of {STEPS}" in caplog.text
    assert lines(tmp_path / "run") == lines(whole_here) and results(tmp_path / "run") == results(whole_here)


def test_the_best_model_is_kept(base, tmp_path, monkeypatch):
    """The saved model is that of the best score, not the last one, although only one newest checkpoint is kept."""
    scores = iter([0.2, 0.5, 0.3, 0.8, 0.8, 0.1, 0.7, 0.4])  # after steps 5, 10, ..., 40
    monkeypatch.setattr(glue.Predictor, "evaluate", lambda self, params: {"accuracy": next(scores)})
    trained = run(base, tmp_path / "run", save_total_limit=1, max_steps=40)
    assert trained["best"] == {"step": 20, "metrics": {"accuracy": 0.8}} and trained["model_step"] == 20
    assert trained["final"] == {"step": 40, "metrics": {"accuracy": 0.4}}
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir()) == [20, 40]
    states = {step: ocp.StandardCheckpointer().restore(folder / str(step) / "state") for step in (20, 40)}
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")["classifier.weight"]
    assert np.array_equal(saved.T, states[20]["params.classifier.kernel"])
    assert not np.array_equal(saved.T, states[40]["params.classifier.kernel"])
