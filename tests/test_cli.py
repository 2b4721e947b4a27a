"""Bad input at the command line: exit code 2, one line that says what and where, nothing written."""

import subprocess
import sys
import time

import pytest
import tiny

from pats_jax.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny checkpoint, one with a head for three classes, data, and data that is wrong."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.save_checkpoint(folder / "checkpoint")
    tiny.save_checkpoint(folder / "three", num_labels=3)
    tiny.write_sst2(folder / "data")
    write = tiny.write_table
    rows = [(text, label) for text, label in zip(*tiny.sentences(12, 0), strict=True)]
    write(folder / "good.tsv", ("sentence", "label"), *rows)
    write(folder / "header.tsv", ("alpha", "label"), *rows)
    write(folder / "columns.tsv", ("sentence", "label"), rows[0], ("one cell",))
    write(folder / "label.tsv", ("sentence", "label"), *rows, ("ann is warm .", "maybe"))
    write(folder / "empty_split.tsv", ("sentence", "label"))
    (folder / "empty.tsv").write_text("")
    (folder / "bytes.tsv").write_bytes(b"sentence\tlabel\nann is warm .\t1\n\xff\xfe\t0\n")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "unknown.json").write_text('{"learning_rat": 1e-3}')
    (folder / "type.json").write_text('{"seed": "many"}')
    return folder


def glue(world, **changes):
    """Command line of a run on the tiny data, with changes; {} in a value stands for the folder."""
    flags = {
        "model_name_or_path": "{}/checkpoint",
        "task_name": "sst2",
        "data_dir": "{}/data",
        "output_dir": "{}/out",
        "max_seq_length": "16",
        "per_device_train_batch_size": "4",
    }
    merged = {name: value for name, value in {**flags, **changes}.items() if value is not None}
    return ["glue", *(part for name, value in merged.items() for part in (f"--{name}", value.format(world)))]


def own(train, validation="{}/good.tsv"):
    return {"task_name": None, "data_dir": None, "train_file": train, "validation_file": validation}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (own("{}/missing.tsv"), ["missing.tsv"]),
        (own("{}/empty.tsv"), ["empty.tsv", "empty"]),
        (own("{}/empty_split.tsv"), ["empty_split.tsv"]),
        (own("{}/header.tsv"), ["header.tsv:1", "alpha"]),
        (own("{}/columns.tsv"), ["columns.tsv:3"]),
        (own("{}/good.tsv", "{}/label.tsv"), ["label.tsv:14", "maybe"]),
        (own("{}/bytes.tsv"), ["bytes.tsv:3"]),
        ({"data_dir": "{}/nowhere"}, ["--data_dir", "nowhere"]),
        ({"task_name": "glue"}, ["--task_name glue", "cola"]),
        ({"method": "magic"}, ["--method magic", "pats"]),
        ({"learning_rate": "-1"}, ["--learning_rate -1"]),
        ({"num_train_epochs": "0"}, ["--num_train_epochs 0"]),
        ({"max_seq_length": "0"}, ["--max_seq_length 0"]),
        ({"per_device_train_batch_size": "64"}, ["--per_device_train_batch_size", "64"]),
        ({"noise_layers": "nothing_like_this"}, ["--noise_layers", "nothing_like_this"]),
        ({"noise_layers": "("}, ["--noise_layers", "regular expression"]),
        ({"output_dir": "{}/full"}, ["--output_dir", "full", "not empty"]),
        ({"output_dir": "{}/good.tsv"}, ["--output_dir", "good.tsv"]),
        ({"model_name_or_path": "{}/three"}, ["three"]),
        ({"model_name_or_path": "{}/nothing"}, ["nothing"]),
        ({"fp16": ""}, ["--fp16"]),
        ({"config": "{}/unknown.json"}, ["unknown.json", "learning_rate"]),
        ({"config": "{}/type.json"}, ["type.json", "seed"]),
        ({"train_file": "{}/good.tsv"}, ["--task_name", "--train_file"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(world, capsys, changes, words):
    before = sorted(path.relative_to(world) for path in world.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(glue(world, **changes))
    printed = capsys.readouterr()
    error = [line for line in printed.err.splitlines() if line.startswith("pats-jax: error: ")]
    assert stopped.value.code == 2 and len(error) == 1, printed.err
    assert all(word in error[0] for word in words), error[0]
    assert sorted(path.relative_to(world) for path in world.rglob("*")) == before


def test_a_hub_id_without_network_says_how_to_work_offline(world, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main(glue(world, model_name_or_path="nobody/no-such-model"))
    assert stopped.value.code == 2 and "offline" in capsys.readouterr().err
    assert not (world / "out").exists()


def test_a_value_that_is_no_number_is_refused_by_the_parser(world, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(glue(world, learning_rate="fast"))
    assert stopped.value.code == 2 and "learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_answer_at_once(flag):
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "pats_jax.cli", flag], capture_output=True, text=True, check=True)
    assert "pats-jax" in done.stdout and time.perf_counter() - started < 5
    loaded = f"import sys, pats_jax.cli as c; sys.argv=['', '{flag}']\ntry: c.main()\nexcept SystemExit: pass"
    code = f"{loaded}\nassert not {{'jax', 'flax', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
