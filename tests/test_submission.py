"""`pats-jax submission`: what the server takes goes in, whole; anything else is refused and leaves nothing behind."""

import json
import os
import pathlib
import shutil
import zipfile

import numpy as np
import pytest
import server_format
import tiny

from pats_jax import glue
from pats_jax.data import TASKS, read_glue
from pats_jax.data.builtin import generate
from pats_jax.errors import InputError
from pats_jax.programs import cli, submission
from pats_jax.run.settings import Settings

HEADER = "index\tprediction\n"
RUNS = {  # task -> the files that its run writes
    "cola": ["CoLA.tsv"],
    "sst2": ["SST-2.tsv"],
    "mrpc": ["MRPC.tsv"],
    "stsb": ["STS-B.tsv"],
    "qqp": ["QQP.tsv"],
    "mnli": ["MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"],
    "qnli": ["QNLI.tsv"],
    "rte": ["RTE.tsv"],
    "wnli": ["WNLI.tsv"],
}


def answers(name, rows):
    """Answers to a test set, drawn at random."""
    rng = np.random.default_rng(len(name) + rows)
    if name == "STS-B.tsv":
        return [f"{score:.3f}" for score in rng.uniform(0, 5, rows)]
    return rng.choice(server_format.FILES[name][1].split("|"), rows).tolist()


def table(predictions):
    return HEADER + "".join(f"{index}\t{answer}\n" for index, answer in enumerate(predictions))


def write_run(folder, task, files, data_dir="builtin", results=True):
    """Writes as much of a run's folder as a submission looks at; files: name -> answers."""
    (folder / "predictions").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"task_name": task, "data_dir": data_dir, "seed": 1}))
    for name, predictions in files.items():
        (folder / "predictions" / name).write_text(table(predictions))
    if results:
        (folder / "results.json").write_text("{}")
    return folder


def write_runs(folder, builtin):
    """Writes a run for each task; returns their folders by task, and the answers by file."""
    rows = {name: server_format.BUILTIN_ROWS if builtin else rows for name, (rows, _) in server_format.FILES.items()}
    given = {name: answers(name, rows[name]) for name in rows}
    data_dir = "builtin" if builtin else "GLUE"
    runs = {
        task: write_run(folder / task, task, {name: given[name] for name in names}, data_dir)
        for task, names in RUNS.items()
    }
    return runs, given


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("builtin"), builtin=True)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("official"), builtin=False)


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """Submits runs from a wide terminal as a user would type it; gives the archive."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(folders, *flags, out="out"):
        cli.main(["submission", *map(str, folders), "--output_dir", str(tmp_path / out), *flags])
        assert [path.name for path in (tmp_path / out).iterdir()] == ["submission.zip"]
        return tmp_path / out / "submission.zip"

    return run


@pytest.fixture
def refuses(tmp_path, capsys):
    """A submission must end with code 2 and one line that holds the parts, and write nothing."""

    def run(folders, *parts, flags=()):
        with pytest.raises(SystemExit) as caught:
            cli.main(["submission", *map(str, folders), "--output_dir", str(tmp_path / "out"), *flags])
        printed, error = capsys.readouterr()
        assert caught.value.code == 2 and printed == ""
        assert error.startswith("pats-jax: error: ") and error.count("\n") == 1, error
        for part in parts:
            assert str(part) in error
        assert not (tmp_path / "out").exists()

    return run


# what goes in


def test_nine_runs_on_glue_make_an_archive_that_the_server_takes(official, submit, capsys, caplog):
    runs, given = official
    path = submit(runs.values())
    assert server_format.check(path) == given
    with zipfile.ZipFile(path) as archive:
        for task, names in RUNS.items():
            for name in names:
                assert archive.read(name) == (runs[task] / "predictions" / name).read_bytes()
    printed, error = capsys.readouterr()
    assert "submission (GLUE)" in printed and f"written: {path}" in printed
    assert "placeholder" not in printed and "built-in" not in printed and error == caplog.text == ""


def test_runs_on_the_built_in_data_are_said_to_be_no_glue(builtin, submit, capsys, caplog):
    runs, given = builtin
    path = submit(runs.values())
    assert server_format.check(path, builtin=True) == given
    with pytest.raises(server_format.Refused):
        server_format.check(path)
    assert "built-in data, not GLUE" in capsys.readouterr().out
    assert "do not submit this zip" in caplog.text and "not GLUE" in caplog.text


def test_the_same_predictions_are_the_same_bytes(builtin, submit, tmp_path):
    runs, _ = builtin
    first = submit(runs.values())
    moved = [pathlib.Path(shutil.copytree(run, tmp_path / "later" / name)) for name, run in runs.items()]
    for file in (tmp_path / "later").rglob("*.tsv"):
        os.utime(file, (2e9, 2e9))
        file.chmod(0o600)
    assert submit(reversed(moved), out="again").read_bytes() == first.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_table_says_what_went_in(builtin, submit, tmp_path, capsys):
    runs, given = builtin
    cola = write_run(tmp_path / "cola [bold]", "cola", {"CoLA.tsv": ["1"] * 100 + ["0"] * 300})
    submit([cola, *(run for task, run in runs.items() if task != "cola")])
    printed = capsys.readouterr().out
    cells = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]] for line in lines(printed)}
    assert cells.keys() == server_format.FILES.keys()
    assert cells["CoLA.tsv"][0] == "400" and cells["CoLA.tsv"][2] == "0 75.0%, 1 25.0%"
    assert f"mean {np.mean([float(score) for score in given['STS-B.tsv']]):.3f}" == cells["STS-B.tsv"][2]
    shares = [f"{label} {given['AX.tsv'].count(label) / 4:.1f}%" for label in server_format.THREE_WAY.split("|")]
    assert cells["AX.tsv"][2] == ", ".join(shares)
    for name in cells:
        assert len(cells[name][1]) > 3, "the run is named"
    assert "cola [bold]" in "".join(printed.split("\n")), "brackets are no markup"


def lines(printed):
    """The lines of a printed table that begin a row."""
    return [line for line in printed.splitlines() if line.startswith("│") and ".tsv" in line.split("│")[1]]


def test_ax_may_come_from_a_run_of_its_own(builtin, submit, tmp_path):
    """`pats-jax glue --task_name ax --model_name_or_path RUN/model --do_predict`, if MNLI was predicted without it."""
    runs, given = builtin
    mnli = write_run(tmp_path / "mnli", "mnli", {name: given[name] for name in ("MNLI-m.tsv", "MNLI-mm.tsv")})
    ax = write_run(tmp_path / "ax", "AX", {"AX.tsv": given["AX.tsv"]})
    path = submit([mnli, ax, *(run for task, run in runs.items() if task != "mnli")])
    assert server_format.check(path, builtin=True) == given


# what is missing


def test_missing_files_are_listed(builtin, refuses):
    runs, _ = builtin
    some = [run for task, run in runs.items() if task not in ("mnli", "qnli")]
    refuses(some, "no run provides MNLI-m.tsv, MNLI-mm.tsv, QNLI.tsv, AX.tsv;", "--placeholders")


def test_placeholders_are_constant_and_named(official, submit, capsys, caplog):
    runs, given = official
    some = ("wnli", "mnli", "stsb")
    found = server_format.check(submit([runs[task] for task in some], "--placeholders"))
    taken = {name for task in some for name in RUNS[task]}
    assert {name: found[name] for name in taken} == {name: given[name] for name in taken}
    rows = {line.split("│")[1].strip(): line for line in lines(capsys.readouterr().out)}
    for name, predictions in found.items():
        assert (len(set(predictions)) == 1) == ("placeholder" in rows[name]) == (name not in taken)
        assert (name in caplog.text) == (name not in taken)
    assert "placeholders, not predictions of a model" in caplog.text


def test_a_placeholder_of_scores_is_a_score(builtin, submit):
    found = server_format.check(submit([builtin[0]["rte"]], "--placeholders"), builtin=True)
    assert len(set(found["STS-B.tsv"])) == 1


# rows


@pytest.mark.parametrize("name", server_format.FILES)
def test_the_number_of_rows_is_that_of_the_data(name):
    assert submission.expected_rows(name, is_builtin=False) == server_format.FILES[name][0]
    task, split = submission.FILES[name]
    assert submission.expected_rows(name, is_builtin=True) == len(generate(task.name)[split])


GLUE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "glue"


@pytest.mark.skipif(not GLUE.is_dir(), reason=f"the real GLUE files are not at {GLUE}")
def test_the_official_numbers_are_those_of_the_files():
    assert len(read_glue("mrpc", GLUE, splits=["test"])["test"]) == TASKS["mrpc"].test_rows["test"]
    assert (GLUE / "STS-B" / "sts-test.tsv").read_bytes().count(b"\n") == TASKS["stsb"].test_rows["test"]


@pytest.mark.parametrize("rows", [100, 400])
def test_a_subset_is_refused(rows, tmp_path, refuses):
    run = write_run(tmp_path / "run", "cola", {"CoLA.tsv": answers("CoLA.tsv", rows)}, data_dir=None)
    parts = ("CoLA.tsv: ", f"{rows} rows, but the GLUE test set has 1063", "--max_predict_samples")
    refuses([run], *parts, flags=["--placeholders"])


# damaged files


def replace_line(number, line):
    """Replaces a line of a text; the header is number 0, then row n is number n + 1."""

    def damage(text):
        parts = text.splitlines(keepends=True)
        parts[number] = line
        return "".join(parts)

    return damage


def swap_rows(text):
    header, first, second, *rest = text.splitlines(keepends=True)
    return "".join([header, second, first, *rest])


DAMAGES = {
    "header of other names": ("RTE.tsv", replace_line(0, "id\tlabel\n"), ":1: the header is 'id\\tlabel'"),
    "no header": ("RTE.tsv", replace_line(0, ""), ":1: the header"),
    "byte-order mark": ("RTE.tsv", lambda text: f"\ufeff{text}", ":1: the header"),
    "row missing": ("RTE.tsv", replace_line(8, ""), ":9: '8\\t"),
    "last row missing": ("RTE.tsv", replace_line(-1, ""), ": 399 rows, but the built-in test set has 400"),
    "row too many": ("RTE.tsv", lambda text: text + "400\tentailment\n", ": 401 rows"),
    "index twice": (
        "RTE.tsv",
        replace_line(8, "6\tentailment\n"),
        ":9: '6\\tentailment': expected the row with index 7",
    ),
    "rows in another order": ("RTE.tsv", swap_rows, ":2: '1\\t"),
    "index with zeros": ("RTE.tsv", replace_line(8, "07\tentailment\n"), ":9: '07\\t"),
    "label of another task": ("RTE.tsv", replace_line(8, "7\tneutral\n"), ":9: the prediction 'neutral' is not one"),
    "label by number": ("MNLI-mm.tsv", replace_line(8, "7\t0\n"), ":9: the prediction '0' is not one of 'entailment'"),
    "number by label": ("WNLI.tsv", replace_line(8, "7\tentailment\n"), ":9: the prediction 'entailment'"),
    "no such class": ("QQP.tsv", replace_line(400, "399\t2\n"), ":401: the prediction '2' is not one of '0', '1'"),
    "capital letter": ("AX.tsv", replace_line(1, "0\tNeutral\n"), ":2: the prediction 'Neutral'"),
    "blank behind a label": ("QNLI.tsv", replace_line(8, "7\tentailment \n"), ":9: the prediction 'entailment '"),
    "no prediction": ("CoLA.tsv", replace_line(8, "7\n"), ":9: the prediction ''"),
    "third column": ("CoLA.tsv", replace_line(8, "7\t1\t0.9\n"), ":9: the prediction '1\\t0.9'"),
    "comma": ("CoLA.tsv", replace_line(8, "7,1\n"), ":9: '7,1': expected"),
    "nan": ("STS-B.tsv", replace_line(8, "7\tnan\n"), ":9: the prediction 'nan' is not a number from 0 to 5"),
    "infinite score": ("STS-B.tsv", replace_line(8, "7\tinf\n"), ":9: the prediction 'inf'"),
    "score too low": ("STS-B.tsv", replace_line(8, "7\t-0.100\n"), ":9: the prediction '-0.100'"),
    "score too high": ("STS-B.tsv", replace_line(8, "7\t5.001\n"), ":9: the prediction '5.001'"),
    "score with a blank": ("STS-B.tsv", replace_line(8, "7\t 1.000\n"), ":9: the prediction ' 1.000'"),
    "score in other digits": ("STS-B.tsv", replace_line(8, "7\t١.٠\n"), ":9: the prediction"),
    "carriage returns": ("SST-2.tsv", lambda text: text.replace("\n", "\r\n"), "carriage returns"),
    "blank line at the end": ("SST-2.tsv", lambda text: f"{text}\n", ":402: '': expected the row with index 400"),
    "blank at the end": ("SST-2.tsv", lambda text: f"{text} ", "the last line is incomplete"),
    "cut off": ("STS-B.tsv", lambda text: text[:-2], "the last line is incomplete"),
    "nothing in it": ("MRPC.tsv", lambda text: "", ":1: the header is ''"),
    "header alone, without its end": ("MRPC.tsv", lambda text: HEADER.strip(), "the last line is incomplete"),
    "not UTF-8": ("MRPC.tsv", replace_line(8, "7\t1\udcff\n"), ":9: the prediction '1\ufffd'"),
}


@pytest.mark.parametrize("name, damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_here_as_by_the_server(name, damage, message, builtin, tmp_path, refuses):
    task = next(task for task, names in RUNS.items() if name in names)
    run = pathlib.Path(shutil.copytree(builtin[0][task], tmp_path / "run"))
    file = run / "predictions" / name
    good = file.read_text()
    file.write_bytes(damage(good).encode(errors="surrogateescape"))
    assert file.read_bytes() != good.encode()
    refuses([run], f"{file}{message if message.startswith(':') else ''}", message, flags=["--placeholders"])
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w") as archive:
        for other, predictions in builtin[1].items():
            archive.writestr(other, file.read_bytes() if other == name else table(predictions))
    with pytest.raises(server_format.Refused, match=name):
        server_format.check(tmp_path / "damaged.zip", builtin=True)


def test_a_file_that_cannot_be_read(builtin, tmp_path, refuses):
    run = pathlib.Path(shutil.copytree(builtin[0]["rte"], tmp_path / "run"))
    (run / "predictions" / "RTE.tsv").unlink()
    (run / "predictions" / "RTE.tsv").mkdir()
    refuses([run], "RTE.tsv: cannot be read (Is a directory)", flags=["--placeholders"])
    (run / "predictions" / "RTE.tsv").rmdir()
    os.mkfifo(run / "predictions" / "RTE.tsv")
    refuses([run], "RTE.tsv: not a regular file", flags=["--placeholders"])
    (run / "predictions" / "RTE.tsv").unlink()
    (run / "predictions" / "RTE.tsv").symlink_to("/dev/zero")
    refuses([run], "RTE.tsv: not a regular file", flags=["--placeholders"])


# folders that are not what they should be


def test_two_runs_that_offer_the_same_file(builtin, tmp_path, refuses):
    runs, given = builtin
    other = write_run(tmp_path / "other", "cola", {"CoLA.tsv": given["CoLA.tsv"]})
    refuses([*runs.values(), other], runs["cola"], other, "both have CoLA.tsv")
    refuses([other, other], "both have CoLA.tsv", flags=["--placeholders"])


def test_built_in_data_and_glue_do_not_mix(builtin, official, refuses):
    rte, wnli = builtin[0]["rte"], official[0]["wnli"]
    for runs in ((rte, wnli), (wnli, rte)):
        message = f"{rte} used the built-in data, {wnli} did not"
        refuses(runs, message, flags=["--placeholders"])


def test_folders_that_are_no_runs_are_skipped_with_a_word(builtin, submit, tmp_path, caplog):
    """As of `runs/*`, where grids, gyms, primed models, runs on own data and notes lie beside runs."""
    others = [tmp_path / name for name in ("compare", "model", "own", "notes.txt")]
    for folder in others[:3]:
        folder.mkdir()
    (tmp_path / "compare" / "grid.json").write_text("{}")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "own" / "config.json").write_text('{"task_name": null, "train_file": "a.csv"}')
    others[3].write_text("nothing")
    unpredicted = write_run(tmp_path / "unpredicted", "cola", {})
    runs, given = builtin
    assert server_format.check(submit([*others, unpredicted, *runs.values()]), builtin=True) == given
    assert f"skipped, for these are not runs on a GLUE task: {', '.join(map(str, others))}" in caplog.text
    assert f"skipped, for these have no predictions (made by --do_predict): {unpredicted}" in caplog.text


def test_folders_that_are_no_finished_run_with_predictions(builtin, tmp_path, refuses):
    good, given = builtin[0]["rte"], builtin[1]["RTE.tsv"]

    def bad(folder, message):
        refuses([good, folder], folder, message, flags=["--placeholders"])

    bad(tmp_path / "none", "none: no such folder")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("[")
    bad(model, "config.json: Invalid JSON")
    (model / "config.json").write_text("[]")
    bad(model, "config.json: Input should be an object")
    (model / "config.json").write_text('{"task_name": ["rte"]}')
    bad(model, "config.json: task_name: Input should be a valid string")
    (model / "config.json").write_text('{"task_name": "../../rte"}')
    bad(model, "config.json: there is no GLUE task '../../rte'")
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    bad(model, "config.json: not a regular file")
    bad(write_run(tmp_path / "killed", "cola", {"CoLA.tsv": given}, results=False), "unfinished: it has no results")
    bad(write_run(tmp_path / "stray", "cola", {"QNLI.tsv": given}), "QNLI.tsv: a run on cola writes no such file")


def test_no_run_at_all(refuses, tmp_path, capsys):
    refuses([], "no runs: name the folders", flags=["--placeholders"])
    with pytest.raises(InputError, match="no runs: name the folders"):
        submission.read_runs([str(tmp_path)])


# where it goes


def test_a_submission_is_not_overwritten(builtin, submit, capsys):
    runs, _ = builtin
    path = submit(runs.values())
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        submit([runs["rte"]], "--placeholders")
    assert f"{path}: already exists" in capsys.readouterr().err and path.read_bytes() == before


def test_no_place_in_a_run(builtin, capsys):
    folder = builtin[0]["rte"]
    for place in (folder, folder / "predictions"):
        with pytest.raises(SystemExit):
            cli.main(["submission", *map(str, builtin[0].values()), "--output_dir", str(place)])
        assert f"--output_dir {place}: is inside the run {folder}" in capsys.readouterr().err
        assert not (place / "submission.zip").exists()


def test_a_place_that_cannot_be_written(builtin, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["submission", *map(str, builtin[0].values()), "--output_dir", str(tmp_path / place)])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and f"--output_dir {tmp_path / place}: cannot be written (" in error


# from a real run


def test_the_files_of_a_real_run_on_mnli(tmp_path, submit, caplog):
    settings = Settings(
        model_name_or_path=str(tiny.save_checkpoint(tmp_path / "model", 3)),
        task_name="mnli",
        data_dir="builtin",
        output_dir=str(tmp_path / "run"),
        do_predict=True,
        max_seq_length=16,
    )
    glue.run(settings)
    found = server_format.check(submit([tmp_path / "run"], "--placeholders"), builtin=True)
    for name in RUNS["mnli"]:
        assert (tmp_path / "run" / "predictions" / name).read_text() == table(found[name])
        assert name not in caplog.text, "no placeholder"
    assert "RTE.tsv" in caplog.text
