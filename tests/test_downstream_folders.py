"""`pats-jax gym` before the first tuning: what is refused, which folders it writes in, how tunings become jobs."""

import dataclasses
import json
import sys

import pytest
import tiny
from gym_runs import quick_settings, refused, run

from pats_jax.data import load_gym
from pats_jax.errors import InputError
from pats_jax.priming import downstream
from pats_jax.priming.gym_settings import GymSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return quick_settings(tiny.write_gym_home(tmp_path_factory.mktemp("home")))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"output_dir": None}, "--output_dir is missing"),
        ({"tasks": ("manners", "voice")}, "--tasks voice: not among the target tasks manners, choice"),
        ({"samples": (7,)}, "manners: no sample of seed 7; there are 13, 21"),
        ({"share": "1/2"}, "--share: use --jobs on one machine, and --executor dask"),
        ({"executor": "dask"}, "--executor dask: set --scheduler"),
        *(({"grid": (grid,)}, f"--grid {grid}: write KIND") for grid in ("lora", "lora=", "nose=1", "lora=1,-1")),
        ({"max_steps": 0}, "--max_steps 0: must be at least 1"),
        ({"max_steps": -1}, "--max_steps -1: must be at least 1"),
        ({"jobs": 0}, "--jobs 0: must be at least 1"),
        ({"max_test_rows": 0}, "--max_test_rows 0: must be at least 1"),
        ({"kinds": ("lora", "lora")}, "--kinds lora lora: list at least one kind, each only once"),
        ({"kinds": ("adalora",), "adalora_tfinal": 3, "max_steps": 3}, "adalora_tfinal 3: leave none of 3 steps"),
        ({"method": "r-drop"}, "--method r-drop: works only with pats-jax glue"),
        ({"method": "sam"}, "--method sam: works only with pats-jax glue"),
        ({"method": "noisytune"}, "--method noisytune: works only with pats-jax glue"),
        ({"overwrite": True}, "--overwrite: not needed"),
        ({"resume": True}, "--resume: not needed"),
        ({"peft": "lora"}, "--peft: use --kinds"),
        ({"learning_rate": 1e-3}, "--learning_rate: use --grid"),
        ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps: each step takes one batch"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience: a tuning runs all its steps"),
        ({"direct": None, "no_direct": True}, "nothing is left to tune; set --primed"),
    ],
)
def test_wrong_settings(base, tmp_path, capsys, changes, message):
    assert message in refused(base, tmp_path, capsys, **changes)


def test_a_task_on_two_lists(base, tmp_path, capsys):
    path = tmp_path / "partition.json"
    path.write_text(json.dumps(tiny.PARTITION | {"dev": ["manners"]}, indent=1))
    error = refused(base, tmp_path, capsys, partition=path)
    assert error.startswith(f"{path}:") and "the task manners is listed in 'dev' and in 'test'" in error


def test_a_folder_of_a_version_with_fewer_settings_goes_on(tmp_path):
    settings = GymSettings(output_dir=str(tmp_path))
    downstream.open_folder(tmp_path, settings, ())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("ignore_mismatched_sizes") is False and saved.pop("shots") == GymSettings.defaults()["shots"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    downstream.open_folder(tmp_path, settings, ())
    with pytest.raises(InputError, match="ignore_mismatched_sizes was False and is True"):
        downstream.open_folder(tmp_path, dataclasses.replace(settings, ignore_mismatched_sizes=True), ())


@pytest.mark.parametrize("executor", ["local", "dask"])
def test_tunings_are_dealt_out(executor, base, tmp_path, monkeypatch):
    """Each to one job; on a cluster a job's tunings are of one start, which is loaded once."""
    monkeypatch.setattr(downstream, "_TUNINGS_OF_A_JOB", 3)
    settings = dataclasses.replace(base, kinds=("full", "lora"), executor=executor, output_dir=str(tmp_path), jobs=5)
    tasks = [load_gym(base.data.data_dir)[name] for name in tiny.PARTITION["test"]]
    starts = downstream.find_starts(settings, tiny.PARTITION["test"])
    tunings = [one for start in starts for one in downstream.tunings_of(settings, start, tasks, tmp_path)]
    jobs = downstream.jobs_of(settings, ["--some", "flags"], tunings)
    names = [job.stdin.splitlines() for job in jobs]
    assert sorted(sum(names, [])) == sorted(tuning.name for tuning in tunings) and len(tunings) == 8
    assert [len(part) for part in names] == ([2, 2, 2, 1, 1] if executor == "local" else [3, 1, 3, 1])
    for job, part in zip(jobs, names, strict=True):
        assert job.results == tuple(str(tmp_path / "tunings" / f"{name}.json") for name in part)
        assert job.arguments[-2:] == ("--some", "flags")
        assert executor == "local" or len({name.split("/")[0] for name in part}) == 1


def test_a_job_that_fails_is_named(base, tmp_path, monkeypatch):
    """The others are told to end and do so with a code of their own; it is not their fault."""
    script = tmp_path / "job"
    script.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        "if 'manners-13' not in sys.stdin.read():\n    sys.exit('pats-jax: error: it burns')\ntime.sleep(60)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(InputError, match=r"job2\.log: it burns"):
        run(base, tmp_path / "gym", jobs=2)


@pytest.mark.parametrize("name", ["tunings", "tunings/direct-lora", "report"])
def test_a_planted_link_is_not_followed(name, base, tmp_path, monkeypatch):
    monkeypatch.setattr(downstream, "Tuner", None)
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "gym"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"a link leads out of {folder}"):
        run(base, folder)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_report_that_no_gym_wrote_is_not_written_over(base, tmp_path, monkeypatch):
    monkeypatch.setattr(downstream, "Tuner", None)
    folder = tmp_path / "gym"
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "report.html").write_text("mine")
    with pytest.raises(InputError, match="contains report, which no gym wrote"):
        run(base, folder)
    assert [path.name for path in folder.iterdir()] == ["report"]
