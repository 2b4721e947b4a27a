"""A disk that is full or read-only while something is written: one line, nothing half-written, the last state kept."""

import contextlib
import errno
import os
import resource
import subprocess

import numpy as np
import pytest
import tiny

from pats_jax import models
from pats_jax.comparison import comparison_page
from pats_jax.comparison.seed_statistics import Comparison
from pats_jax.data import write_builtin
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.programs import submission
from pats_jax.reporting import plots
from pats_jax.run import model_card, run_folder
from pats_jax.run.journal import Journal
from pats_jax.training import evaluation

LINES = [{"step": 1, "loss": 1.0, "learning_rate": 0.0}]
SETTINGS = {"model_name_or_path": "m", "load_best_model_at_end": False, "data_dir": None}
SUMMARY = Comparison("finetune", missing=[], settings=SETTINGS, versions={}, tasks={}, pooled={})


@contextlib.contextmanager
def full_from(size):
    """To this process a disk is full where a file is that large: writing beyond raises EFBIG as a full disk ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tree(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def save_model(folder, seed=0):
    config = tiny.CONFIG
    params = tiny.random_params(config)
    params["classifier"]["bias"] = np.full(2, seed, np.float32)
    models.save_pretrained(folder / "model", params=params, config=config, tokenizer=tiny.tokenizer())


def save_adapter(folder):
    model, params = models.SequenceClassifier(tiny.CONFIG), tiny.random_params(tiny.CONFIG)
    model, params = peft.add_peft(model, params, peft.KINDS["ia3"](), key=0)
    peft.save_peft(folder / "adapter", model=model, params=params, tokenizer=tiny.tokenizer())


def write_card(folder):
    results = {"model_name_or_path": "m", "data": "d", "method": "pats", "seed": 1, "num_labels": 2, "versions": {}}
    model_card.write_fine_tuned(folder, {}, results)


WRITERS = {
    "model": save_model,
    "adapter": save_adapter,
    "config.json": lambda folder: run_folder.start(folder, {"seed": 1}),
    "results.json": lambda folder: run_folder.write_results(folder, {"seed": 1}),
    "metrics.jsonl": lambda folder: run_folder.write_metrics(folder, LINES),
    "README.md": write_card,
    "plots/loss.png": lambda folder: plots.plot_loss(folder / "plots" / "loss.png", LINES),
    "predictions/test.tsv": lambda folder: evaluation.write_files(folder / "predictions", {"test.tsv": "index\n"}),
    "comparison.json": lambda folder: comparison_page.write_report(folder, SUMMARY, [], []),
    "submission.zip": lambda folder: submission.write_bytes(folder / "submission.zip", b"PK"),
    "CoLA/train.tsv": lambda folder: write_builtin(folder / "builtin", tasks=["cola"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_one_line_and_no_empty_file(name, tmp_path):
    with full_from(0), pytest.raises(InputError) as caught:
        WRITERS[name](tmp_path)
    assert str(caught.value).endswith(f"{name}: cannot be written (File too large)")
    assert not any(path.is_file() or path.name.startswith(".") for path in tmp_path.rglob("*"))
    WRITERS[name](tmp_path)
    assert list(tmp_path.rglob(name.split("/")[-1]))


@pytest.mark.parametrize("size", [0, 200, 1500, 8000])
def test_the_model_of_before_stays_whole(size, tmp_path):
    """Whichever of its files is the first that has no room."""
    save_model(tmp_path, 1)
    (tmp_path / "model" / "notes.txt").write_text("keep")
    before = tree(tmp_path)
    assert min(len(x) for x in before.values() if x) < 1500 < max(len(x) for x in before.values() if x)
    with full_from(size), pytest.raises(InputError, match="model: cannot be written"):
        save_model(tmp_path, 2)
    assert tree(tmp_path) == before
    save_model(tmp_path, 2)
    after = tree(tmp_path)
    assert after.keys() == before.keys()
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed == {"model.safetensors"}


def test_a_model_is_never_a_mix_of_old_and_new(tmp_path, monkeypatch):
    """Every file that is there is of one of the two at the moment of each renaming, and they take turns as one."""
    save_model(tmp_path, 1)
    folder, seen = tmp_path / "model", []
    before, rename = tree(folder), type(folder).rename

    def watched(self, target):
        seen.append(tree(folder))
        rename(self, target)
        seen.append(tree(folder))

    monkeypatch.setattr(type(folder), "rename", watched)
    save_model(tmp_path, 2)
    assert len(seen) >= 4 and all(state in ({}, before, tree(folder)) for state in seen)


def test_a_folder_that_cannot_be_renamed_stays(tmp_path, monkeypatch):
    save_model(tmp_path, 1)
    before, rename = tree(tmp_path), type(tmp_path).rename

    def fail_to_arrive(self, target):
        if target.name == "model" and not self.name.endswith("-old"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail_to_arrive)
    with pytest.raises(InputError, match=r"model: cannot be written \(Device or resource busy\)"):
        save_model(tmp_path, 2)
    assert tree(tmp_path) == before


def test_saving_to_the_folder_one_is_in_and_through_a_link(tmp_path, monkeypatch):
    save_model(tmp_path, 1)
    monkeypatch.chdir(tmp_path / "model")
    models.save_pretrained(".", params=tiny.random_params(tiny.CONFIG), config=tiny.CONFIG)
    assert os.listdir(".") and os.path.samefile(".", tmp_path / "model")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    models.save_pretrained(tmp_path / "link", params=tiny.random_params(tiny.CONFIG), config=tiny.CONFIG)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "model.safetensors").exists()


# lines


@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_line_is_there_whole_or_not_at_all(room, tmp_path):
    with Journal(tmp_path, LINES) as journal:
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with full_from(size + room), pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(File too"):
            journal.write({"step": 2, "loss": 0.5})
        assert run_folder.read_metrics(tmp_path) == LINES
        journal.write({"step": 3, "loss": 0.25})
    assert run_folder.read_metrics(tmp_path) == [*LINES, {"step": 3, "loss": 0.25}]


def test_event_files_end_in_a_line_too_and_nobody_waits_for_a_dead_thread(tmp_path):
    with pytest.raises(InputError, match=r"tensorboard: cannot be written \(File too large\)"):
        with Journal(tmp_path, [], tensorboard=True) as journal, full_from(5000):
            for step in range(1000):
                journal.write({"step": step, "loss": 0.5})
                (tmp_path / "metrics.jsonl").write_text("")


def test_what_is_on_its_way_comes_before_event_files_that_cannot_end(tmp_path, caplog):
    with pytest.raises(KeyError), full_from(1000), Journal(tmp_path, [], tensorboard=True) as journal:
        for step in range(50):
            journal._events.write({"step": step, "loss": 0.5})
        raise KeyError
    assert "tensorboard: cannot be written" in caplog.text


# a disk, where one can be had


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 pages in memory; gives how to make it read-only, too."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip("only root can mount a disk")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_small_disk_and_a_read_only_one(disk):
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        for number in range(100):
            save_model(disk / str(number))
    whole = [path for path in disk.iterdir() if any(path.iterdir())]
    assert whole and all((path / "model" / "model.safetensors").stat().st_size > 1000 for path in whole)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name, write in WRITERS.items():
        with pytest.raises(InputError) as caught:
            write(disk / "0")
        assert str(caught.value).endswith("(Read-only file system)"), name


def test_a_run_on_a_disk_of_its_own_is_not_renamed(disk):
    from test_replacing import refuses, write_run

    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    write_run(disk)
    assert refuses(disk) == f"--output_dir {disk}: --overwrite cannot rename it (Device or resource busy)"
