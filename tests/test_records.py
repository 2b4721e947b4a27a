"""Files of ours that something has damaged: whatever they hold, a program ends with one line that names the file."""

import io
import json
import math
import os
import re
import shutil
import typing

import numpy as np
import pytest
import rich.console
import tiny

from pats_jax.comparison import compare, seed_statistics
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.priming import downstream
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.meta_losses import ALGORITHMS
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.programs import cli
from pats_jax.reporting import plots
from pats_jax.run import records, run_folder, workers
from pats_jax.run.settings import Settings

GLUE = {"task_name": "rte", "model_name_or_path": "model", "seed": 1}
PRIME = {"model_name_or_path": "model", "seed": 1}
SCORES = {"metrics": {"accuracy": 0.5}}
FIGURES = {"all": {name: 0.5 for name in seed_statistics.FIGURES}}
GLUE_RESULTS = {
    "method": "finetune",
    "data": "rte from a folder",
    "peft": None,
    "main_metric": "accuracy",
    "versions": {"jax": "0.10.2"},
    "train_examples": 20,
    "eval_examples": 10,
    "steps": 20,
    "model_step": 20,
    "final": {"step": 20, **SCORES},
    "best": {"step": 10, **SCORES},
    "majority_class": SCORES,
    "concentration": {
        "before": FIGURES,
        "after": FIGURES,
        "log10_histogram": {"edges": [-1.0, 0.0, 1.0], "before": [0.5, 0.5], "after": [0.1, 0.9]},
    },
    "out_of_domain": {"snli": {"examples": 3, **SCORES}},
}
METRICS = [
    {"step": 10, "loss": 0.7, "learning_rate": 1e-5, "timing": {"seconds": 3.0}},
    {"step": 10, "eval": {"accuracy": 0.5}},
    {"step": 20, "loss": 0.5, "learning_rate": 0.0, "timing": {"seconds": 2.0}},
    {"step": 20, "eval": {"accuracy": 0.5}},
]
PRIMED_RESULTS = {
    "model_name_or_path": "model",
    "algorithm": "mtl",
    "train": "plm",
    "peft": None,
    "head": "embedding",
    "seed": 1,
    "upstream_tasks": ["weather", "voice"],
    "final": {"step": 5, **SCORES},
}


def grid_record(method):
    return {"task": "rte", "method": method, "seed": 1}


def tuning(**changes):
    return {
        "algorithm": "direct",
        "trained": None,
        "peft": "lora",
        "upstream_seed": None,
        "upstream_digest": None,
        "task": "manners",
        "sample": 13,
        "metric": "accuracy",
        "chance": 0.5,
        "learning_rates": [1e-3],
        "diverged": [],
        "learning_rate": 1e-3,
        "curve": {"step": [0, 25], "dev": [0.5, 0.7]},
        "step": 25,
        "dev": 0.7,
        "test": 0.6,
        "test_rows": 12,
        "seconds": 1.5,
        **changes,
    }


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = value if isinstance(value, list) else [value]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def settings_of(kind, folder, **given):
    return kind(output_dir=str(folder), **given).to_dict()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A grid of two runs, a gym with two tunings, a primed run, a run with predictions: nothing was trained."""
    home = tmp_path_factory.mktemp("home")
    runs = [grid_record("finetune"), grid_record("pats")]
    write(home / "grid" / "grid.json", {"runs": runs, "commands": ["pats-jax compare"], "machines": [{"cores": "2"}]})
    for run in runs:
        folder = home / "grid" / "runs" / "rte" / run["method"] / "seed1"
        write(folder / "config.json", settings_of(Settings, folder, **GLUE, method=run["method"], train_batch_size=32))
        write(folder / "results.json", GLUE_RESULTS | {"method": run["method"]})
        write(folder / "metrics.jsonl", METRICS)
    write(home / "primed" / "config.json", settings_of(PrimingSettings, home / "primed", **PRIME))
    write(home / "primed" / "results.json", PRIMED_RESULTS)
    tiny.write_gym(home / "tasks")
    write(home / "partition.json", tiny.PARTITION)
    settings = GymSettings(
        model_name_or_path="model", partition=str(home / "partition.json"), data_dir=str(home / "tasks")
    )
    kept = {name: value for name, value in settings.to_dict().items() if name not in downstream._FREE}
    write(home / "gym" / "config.json", kept)
    write(home / "gym" / "tunings" / "direct-lora" / "manners-13.json", tuning())
    upstream = {"algorithm": "mtl", "trained": "plm", "upstream_seed": 1}
    write(home / "gym" / "tunings" / "mtl-plm-seed1-lora" / "manners-13.json", tuning(test=0.9, **upstream))
    write(home / "submitted" / "config.json", {"task_name": "rte", "data_dir": "builtin"})
    write(home / "submitted" / "results.json", {})
    (home / "submitted" / "predictions").mkdir()
    (home / "submitted" / "predictions" / "RTE.tsv").write_text("index\tprediction\n0\tentailment\n")
    return home


RUN = "grid/runs/rte/finetune/seed1"
GYM_FLAGS = "gym --model_name_or_path model --partition {home}/partition.json --data_dir {home}/tasks --kinds lora"
COMMANDS = [  # a file, and the commands that read it
    ("grid/grid.json", "compare --output_dir {home}/grid --report_only"),
    ("grid/grid.json", "compare --output_dir {home}/grid --methods finetune --tasks rte --seeds 1"),
    (f"{RUN}/results.json", "compare --output_dir {home}/grid --report_only"),
    (f"{RUN}/metrics.jsonl", "compare --output_dir {home}/grid --report_only"),
    (f"{RUN}/config.json", "compare --output_dir {home}/grid --report_only"),
    (f"{RUN}/config.json", "glue --config {home}/" + f"{RUN}/config.json"),
    (f"{RUN}/config.json", "glue --resume --task_name rte --output_dir {home}/" + RUN),
    (f"{RUN}/results.json", "glue --resume --config {home}/config.json --output_dir {home}/" + RUN),
    ("primed/config.json", "prime --config {home}/primed/config.json"),
    ("primed/config.json", "prime --resume --output_dir {home}/primed"),
    ("primed/results.json", "prime --resume --model_name_or_path model --seed 1 --output_dir {home}/primed"),
    ("primed/results.json", GYM_FLAGS + " --primed {home}/primed --output_dir {home}/gym"),
    ("gym/config.json", "gym --report_only --output_dir {home}/gym"),
    ("gym/config.json", GYM_FLAGS + " --output_dir {home}/gym"),
    ("gym/tunings/direct-lora/manners-13.json", "gym --report_only --output_dir {home}/gym"),
    ("gym/tunings/direct-lora/manners-13.json", GYM_FLAGS + " --output_dir {home}/gym"),
    ("submitted/config.json", "submission {home}/submitted --placeholders --output_dir {home}/out"),
    ("submitted/predictions/RTE.tsv", "submission {home}/submitted --placeholders --output_dir {home}/out"),
]


def damages(path):
    """Name -> what puts something else into the file's place."""
    good = path.read_bytes()
    contents = {
        "truncated": good[: len(good) * 2 // 3],
        "empty": b"" if path.suffix != ".jsonl" else b"\n",
        "null": b"null",
        "list": b"[]",
        "number": b"3",
        "string": b'"text"',
        "nested": b'{"a": ' * 100_000,
        "nested lists": b"[" * 100_000,
        "long number": good.replace(b"{", b'{"zzz": 1' + b"0" * 5000 + b", ", 1) or b"1",
        "no UTF-8": good.replace(b'"', b'"\xff', 1) if b'"' in good else b"\xff",
        "two byte order marks": b"\xff\xfe" + good,
    }
    for name, content in contents.items():
        yield name, lambda content=content: path.write_bytes(content)
    yield "directory", path.mkdir
    yield "pipe", lambda: os.mkfifo(path)
    yield "device", lambda: path.symlink_to("/dev/zero")
    yield "circle", lambda: path.symlink_to(path)


@pytest.fixture
def own(home, tmp_path, monkeypatch):
    """A copy of the folders that a test may damage; no command may come so far as to train."""
    monkeypatch.setattr(cli, "_show_warnings_in_a_line", lambda: None)
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # as that does
    monkeypatch.setattr(workers, "describe_machine", lambda: {"cores": "2"})
    monkeypatch.setattr(compare, "run_all", None)
    monkeypatch.setattr(downstream, "tune_all", None)
    for path in home.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    for path in [*tmp_path.rglob("config.json"), *tmp_path.glob("gym/*.json")]:
        path.write_text(path.read_text().replace(str(home), str(tmp_path)))
    shutil.copy(tmp_path / RUN / "config.json", tmp_path / "config.json")
    return tmp_path


@pytest.mark.parametrize(
    "file, command", COMMANDS, ids=[f"{f.split('/')[-1]}-{c.split(' {')[0][:40]}" for f, c in COMMANDS]
)
def test_a_damaged_file_is_one_line_that_names_it(file, command, own, capsys):
    path, args = own / file, command.format(home=own).split()
    good = path.read_bytes()
    for name, damage in damages(path):
        path.unlink()
        damage()
        error = tiny.refused(capsys, *args)
        named = path.parent if name == "circle" else path  # --resume finds no run there
        assert str(named) in error and len(error) < 700, (name, error)
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(good)


# fields


def nodes(value, place=()):
    """Where anything stands in a JSON value."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*place, key))


def changed(value, place, new):
    """The value with another at a place; `...` takes it out."""
    value = json.loads(json.dumps(value))
    if not place:
        return new
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    if new is ...:
        del parent[place[-1]]
    else:
        parent[place[-1]] = new
    return value


ODD = [..., None, True, "x", "../../x", "a\0b", "", "x" * 9999, -1, 0, 10**30, 10**400, 2.5, -0.0, 1e308]
ODD += [5e-324, math.nan, math.inf, [], [1], [None], {}, {"x": None}]


@pytest.fixture
def quick_plots(monkeypatch):
    def draw(path, *args, **kwargs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG")

    for name in [name for name in vars(plots) if name.startswith("plot_")]:
        monkeypatch.setattr(plots, name, draw)


def quiet():
    return rich.console.Console(file=io.StringIO())


def report_on_grid(root):
    compare.report(root / "grid", quiet())
    return json.loads((root / "grid" / "comparison.json").read_text())


def report_on_gym(root):
    downstream.report(root / "gym", quiet(), "pats-jax gym")
    return json.loads((root / "gym" / "report" / "report.json").read_text())


def read_primed(root):
    settings = GymSettings(model_name_or_path="model", kinds=("lora",), primed=(str(root / "primed"),))
    return [start.name for start in downstream.find_starts(settings, ["manners"])]


def resume(kind):
    def read(root):
        from pats_jax import glue
        from pats_jax.priming import upstream

        folder = root / (RUN if kind is Settings else "primed")
        results = run_folder.read_results(folder)
        return (glue if kind is Settings else upstream).summary(results, folder)

    return read


def fields_of(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "file, read",
    [
        ("grid/grid.json", report_on_grid),
        (f"{RUN}/results.json", report_on_grid),
        pytest.param(f"{RUN}/metrics.jsonl", report_on_grid, marks=pytest.mark.slow),
        ("gym/tunings/mtl-plm-seed1-lora/manners-13.json", report_on_gym),
        ("primed/results.json", read_primed),
        (f"{RUN}/results.json", resume(Settings)),
        ("primed/results.json", resume(PrimingSettings)),
    ],
    ids=["grid", "results", "metrics", "tuning", "primed", "resume-glue", "resume-prime"],
)
def test_any_value_in_any_field_is_taken_or_refused_in_a_line(file, read, own, quick_plots):
    """And what is taken is a report without NaN or infinity, in no other place than its own."""
    path = own / file
    good = fields_of(path.read_text())
    read(own)
    before = sorted(own.parent.iterdir())
    refused = 0
    for place in nodes(good):
        for new in ODD if place else ():
            lines = changed(good, place, new)
            write(path, lines)
            try:
                found = read(own)
            except InputError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 700, (place, new, error)
                assert str(path.parent) in str(error) or "no run is finished" in str(error)
            else:
                json.dumps(found, allow_nan=False)
    assert refused > 20 and sorted(own.parent.iterdir()) == before


def test_scores_that_are_not_finite_are_refused_by_name(own, quick_plots):
    for value in (math.nan, math.inf, -math.inf, 1e300):
        for place in (("final", "metrics", "accuracy"), ("best", "metrics", "accuracy")):
            write(own / RUN / "results.json", changed(GLUE_RESULTS, place, value))
            with pytest.raises(InputError, match=re.escape(f"{own / RUN}/results.json: {'.'.join(place)}: ")):
                report_on_grid(own)


def test_a_loss_that_is_not_finite_is_left_out_of_the_curve(own, quick_plots):
    """An early version wrote such."""
    write(own / RUN / "metrics.jsonl", changed(METRICS, (0, "loss"), math.nan))
    (task,) = report_on_grid(own)["tasks"].values()
    assert task["methods"]["finetune"]["curves"]["loss"] == {"step": [20], "mean": [0.5], "low": [0.5], "high": [0.5]}


def test_a_line_cut_off_is_named_by_its_number(own):
    path = own / RUN / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=re.escape(f"{path}:4: ")):
        report_on_grid(own)


def test_records_that_contradict_each_other_are_named_by_their_files(own, quick_plots):
    second = own / "gym" / "tunings" / "mtl-plm-seed1-lora" / "manners-13.json"
    for changes, message in (
        ({}, "direct/lora, seed None, manners, sample 13 occurs twice"),
        ({"sample": 21, "chance": 0.25}, "but earlier"),
        ({"sample": 21, "trained": "plm"}, "direct tuning has no upstream stage"),
        ({"sample": 21, "curve": {"step": [5, 0], "dev": [0.5, 0.5]}}, "the steps of its curve must ascend"),
        ({"sample": 21, "curve": {"step": [5], "dev": []}}, "its curve needs"),
    ):
        write(second, tuning(**changes))
        with pytest.raises(InputError, match=f"^{re.escape(str(second))}: .*{message}"):
            report_on_gym(own)


# names


def test_a_name_that_leads_out_of_the_folder_is_refused(own):
    for name, value in (("algorithm", "../../x"), ("train", "../x"), ("peft", "/x"), ("head", "x"), ("seed", "1/../x")):
        write(own / "primed" / "results.json", PRIMED_RESULTS | {name: value})
        with pytest.raises(InputError, match=re.escape(f"{own}/primed/results.json: {name}: ")):
            read_primed(own)
    for name, value in (("algorithm", "../../x"), ("trained", "../x"), ("peft", "/x"), ("task", "../x"), ("task", ".")):
        path = own / "gym" / "tunings" / "direct-lora" / "manners-13.json"
        write(path, tuning(**{name: value}))
        with pytest.raises(InputError, match=re.escape(f"{path}: {name}: ")):
            report_on_gym(own)
    for name, value in (
        ("task", "../x"),
        ("task", ""),
        ("method", "../x"),
        ("overrides", {"peft": "../x"}),
        ("seed", "../x"),
    ):
        grid = {"runs": [grid_record("pats") | {name: value}], "commands": [], "machines": []}
        write(own / "grid" / "grid.json", grid)
        with pytest.raises(InputError, match=re.escape(f"{own}/grid/grid.json: runs.0.{name}")):
            report_on_grid(own)


def test_the_names_of_records_are_those_of_the_library():
    assert set(typing.get_args(records.PeftKind)) == set(peft.KINDS)
    assert set(typing.get_args(records.Algorithm)) == set(ALGORITHMS)
    assert set(typing.get_args(records.Part)) == set(typing.get_args(PrimingSettings.all_entries()["train"].type))


# earlier versions


def test_files_of_earlier_versions_are_read(own, quick_plots):
    """What they lack: the kept step, concentration, timing; a gym's settings that came later, and seconds."""
    later = ("model_step", "concentration", "peft", "out_of_domain")
    write(own / RUN / "results.json", {name: value for name, value in GLUE_RESULTS.items() if name not in later})
    write(own / RUN / "metrics.jsonl", [{k: v for k, v in line.items() if k != "timing"} for line in METRICS])
    (task,) = report_on_grid(own)["tasks"].values()
    finetune = task["methods"]["finetune"]
    assert finetune["mean"] == 0.5 and finetune["seconds_per_step"] is None and finetune["concentration"] is None
    record = tuning()
    for name in ("upstream_digest", "learning_rates", "diverged", "test_rows", "seconds"):
        del record[name]
    write(own / "gym" / "tunings" / "direct-lora" / "manners-13.json", record)
    path = own / "gym" / "config.json"
    kept = json.loads(path.read_text())
    del kept["share_sources"], kept["max_test_rows"], kept["gradient_checkpointing"]
    write(path, kept)
    assert report_on_gym(own)["tunings"] == 2
    settings = GymSettings(
        model_name_or_path="model", partition=kept["partition"], data_dir=kept["data_dir"], output_dir=str(own / "gym")
    )
    downstream.check_folder(own / "gym", settings, ())
    assert np.isclose(report_on_gym(own)["arms"]["mtl/plm/lora"]["against_direct"]["arg"], 50)
