"""The fuzzer: a few inputs for every reader, and faults planted for it to find."""

import fuzz.__main__ as program
import pytest
from fuzz import campaign, independent, planted, readers

# Reader with a planted fault -> what must be said of it.
FAULTS = {
    "fails": "KeyError at planted.py",
    "hangs": "took too long",
    "hangs-deaf": "took too long",
    "dies": "the process died",
    "takes-memory": "MemoryError at planted.py",
    "writes-elsewhere": "wrote outside of its folder",
    "refuses-all": "refused, but it is sound",
    "accepts-all": "accepted, but it must be refused",
    "two-lines": "the message is not one printable line",
    "no-name": "the message names no file",
    "much": "the message is too long",
    "exits": "SystemExit at planted.py",
}


def test_planted_faults_are_reported_and_their_neighbours_go_on(tmp_path):
    # A process that dies, or must be killed, takes nobody else's inputs with it: each has exactly one verdict.
    names = ["sound", *FAULTS]
    found = campaign.run(names, [0], seed=1, limit=1.0, grace=2.0, keep=tmp_path, module="fuzz.planted")
    assert sorted(verdict.reader for verdict in found) == sorted(names)
    kinds = {verdict.reader: verdict.kind for verdict in found}
    assert kinds.pop("sound") == ""
    assert {name: kind.partition(":")[0] for name, kind in kinds.items()} == FAULTS
    assert (tmp_path / "fails-0" / "data.txt").read_bytes() == b"text"


@pytest.mark.parametrize("name", ["loses-a-row", "other-labels"])
def test_rows_and_labels_that_are_not_those_of_the_file_are_reported(name):
    reader = planted.READERS[name]
    kinds = {campaign.judge(reader, name, 1, number, limit=20).kind for number in range(40)}
    assert "read otherwise than by the independent reader" in kinds


@pytest.mark.parametrize("name", sorted(readers.READERS))
def test_every_reader_accepts_what_is_sound_and_refuses_the_rest_in_a_line(name):
    found = [campaign.judge(readers.READERS[name], name, 1, number, limit=20) for number in range(8)]
    assert [(verdict.number, verdict.kind, verdict.told) for verdict in found if verdict.outcome == "failed"] == []


def test_an_input_depends_on_seed_reader_and_number_alone():
    reader = readers.READERS["csv"]
    once = [campaign.draw_input(reader, "csv", 1, number) for number in (3, 4)]
    again = [campaign.draw_input(reader, "csv", 1, number) for number in (4, 3)]
    assert once == again[::-1] and once[0] != once[1]
    assert campaign.draw_input(reader, "csv", 2, 3) != once[0]


def test_the_program_ends_with_1_on_failures_and_says_how_to_repeat_them(monkeypatch, capsys):
    def run_here(names, numbers, *, seed, limit, each, **_):
        found = [campaign.judge(planted.READERS[name], name, seed, n, limit=limit) for n in numbers for name in names]
        for verdict in found:
            each(verdict)
        return found

    monkeypatch.setattr(program, "READERS", planted.READERS)
    monkeypatch.setattr(program, "run", run_here)
    assert program.main(["--readers", "sound", "--count", "3"]) == 0
    assert program.main(["--readers", "sound", "fails", "--count", "4", "--seed", "5"]) == 1
    out = capsys.readouterr().out
    assert "2 x fails: KeyError at planted.py" in out and "--seed 5 --readers fails --only 0" in out


def test_the_independent_reader_of_csv_on_records_worked_out_by_hand():
    assert independent.csv_records('a,"b\r\n""c""",\r\n\n"",x"y\r\n"z"') == [
        ["a", 'b\r\n"c"', ""],
        [],
        ["", 'x"y'],
        ["z"],
    ]
    for wrong in ('"a', '"a"b', "a\rb"):
        with pytest.raises(independent.Wrong):
            independent.csv_records(wrong)
