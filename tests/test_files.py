"""What comes in from files is checked, and what goes out is whole; every refusal is one line that names the file."""

import dataclasses
import os
import pathlib

import pytest

from pats_jax import errors
from pats_jax.core import files
from pats_jax.errors import InputError


@dataclasses.dataclass
class Run:
    name: str
    scores: dict[str, float]
    seeds: list[int]


def refusal(call, *args) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ('{"a": ', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5_000, "a number is too long"),
        ('"\\ud800', "not valid JSON"),
        (b"\xff\xfe{", "not"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{\n"a": 1,\n}', "line 3"),
    ],
)
def test_json_that_is_damaged_is_one_line(tmp_path, text, reason):
    path = tmp_path / "results.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (files.read_json, lambda path: files.read_record(path, Run)):
        message = refusal(read, path)
        assert message.startswith(f"{path}: ")
    assert reason in refusal(files.read_json, path)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("null", ""),
        ("[]", ""),
        ('{"name": "x", "scores": {}}', "seeds: "),
        ('{"name": 3, "scores": {}, "seeds": []}', "name: "),
        ('{"name": "x", "scores": {"f1": "0.5"}, "seeds": []}', "scores.f1: "),
        ('{"name": "x", "scores": {}, "seeds": [1, true]}', "seeds.1: "),
        ('{"name": "x", "scores": {}, "seeds": [1' + "0" * 5000 + "]}", ""),
        ('{"name": "x", "scores": {"' + "k" * 9999 + '": []}, "seeds": []}', "scores.kkk"),
    ],
)
def test_a_record_names_the_field_that_is_wrong(tmp_path, text, field):
    path = tmp_path / "results.json"
    path.write_text(text)
    assert refusal(files.read_record, path, Run).startswith(f"{path}: {field}")


def test_a_record_is_read_as_it_was_written_and_other_keys_are_left(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"name": "x", "scores": {"f1": 1, "loss": float("nan")}, "seeds": [3], "later": None})
    run = files.read_record(path, Run)
    assert run.name == "x" and run.seeds == [3] and run.scores["f1"] == 1 and run.scores["loss"] != run.scores["loss"]


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert "not a regular file" in refusal(files.read_bytes, tmp_path / "pipe")  # and does not wait for a writer
    assert "not a regular file" in refusal(files.read_bytes, "/dev/zero")
    assert "no such file" in refusal(files.read_bytes, tmp_path / "link")
    assert "cannot be read" in refusal(files.read_bytes, tmp_path / ("x" * 300))
    assert "null byte" in refusal(files.read_bytes, "a\0b")
    assert str(tmp_path) in refusal(files.read_bytes, tmp_path)
    (tmp_path / "file").write_bytes(b"text")
    assert files.read_bytes(tmp_path / "link") == b"text"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/x", "a\0b", "a\nb", ".x", "x" * 201, 3, None])
def test_a_name_that_leads_elsewhere_is_no_part_of_a_path(name):
    assert refusal(files.checked_name, name, "grid.json").startswith("grid.json: ")


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    for path in (folder / "plots", other):
        path.mkdir(parents=True)
    (folder / "model").symlink_to(other)
    (folder / "circle").symlink_to(folder / "circle")
    (tmp_path / "name").symlink_to(folder)
    assert files.checked_place(folder / "plots" / "a.png", folder) == folder / "plots" / "a.png"
    assert files.checked_place(tmp_path / "name" / "plots" / "a.png", folder)  # the folder itself may be a link
    assert "leads out of" in refusal(files.checked_place, folder / "model" / "a", folder)
    assert "leads out of" in refusal(files.checked_place, folder / "circle" / "a", folder)


def test_a_file_is_replaced_whole_and_a_link_in_its_place_is_not_followed(tmp_path):
    kept, path = tmp_path / "kept", tmp_path / "results.json"
    kept.write_text("mine")
    path.symlink_to(kept)
    (tmp_path / "results.json.new").symlink_to(kept)
    files.write_text(path, "new")
    assert path.read_text() == "new" and kept.read_text() == "mine" and not path.is_symlink()
    assert sorted(tmp_path.iterdir()) == [kept, path]


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    (tmp_path / "results.json").mkdir()
    assert "cannot be written" in refusal(files.write_text, tmp_path / "results.json", "text")
    assert "cannot be written" in refusal(files.write_text, tmp_path / "none" / "results.json", "text")
    assert "surrogate" in refusal(files.write_text, tmp_path / "x", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")
    real = os.open
    monkeypatch.setattr(os, "open", lambda name, *args: real("/dev/full", os.O_WRONLY))
    assert "No space left on device" in refusal(files.write_text, path, "new")
    assert path.read_text() == "old"


def test_long_values_are_cut_in_messages():
    assert errors.shown("x" * 100_000, 10) == "'xxxxxxxxxx'... (100000 characters)"
    assert errors.shown("a\nb\t") == "'a\\nb\\t'"
    assert errors.shown([1, 2]) == "[1, 2]" and "\n" not in errors.shown("a\nb", quoted=False)
