"""Runs of `pats-jax gym` that tests ask for."""

import dataclasses
import json

import rich.console
import tiny

from pats_jax.priming import downstream
from pats_jax.priming.gym_settings import GymSettings

RATES = {"full": 2e-3, "lora": 2e-2, "bitfit": 1e-2}
QUICK = {
    "max_seq_length": 16,
    "max_steps": 3,
    "eval_steps": 1,
    "warmup_ratio": 0.0,
    "per_device_train_batch_size": 6,  # all training rows: their order does not matter
    "per_device_eval_batch_size": 5,
    "lora_rank": 2,
}
GRID = tuple(f"{kind}={rate}" for kind, rate in RATES.items())


def quick_settings(home):
    """The settings of a quick run on the gym in a folder of `tiny.write_gym_home`."""
    return GymSettings(
        model_name_or_path=str(home / "model"),
        data_dir=str(home / "gym"),
        partition=str(home / "partition.json"),
        kinds=("lora",),
        grid=GRID,
        compilation_cache_dir=str(home / "compiled"),
        **QUICK,
    )


def run(base, folder, **changes):
    settings = dataclasses.replace(base, output_dir=str(folder), **changes)
    downstream.run(settings, ["--some", "flags"], rich.console.Console(quiet=True))
    return records(folder)


def records(folder):
    """Start, task and sample -> record without the time it took."""
    found = {}
    for path in sorted((folder / "tunings").glob("*/*.json")):
        record = json.loads(path.read_text())
        assert record.pop("seconds") > 0
        found[path.parent.name, record["task"], record["sample"]] = record
    return found


def arguments(base, **changes):
    given = {name: value for name, value in base.flat().items() if value != GymSettings.all_entries()[name].default}
    return ["gym", *tiny.flags(**with_read(given, changes))]


def with_read(given, changes):
    """Settings with changes, without those of kinds that are no longer tuned."""
    if "kinds" in changes and "lora" not in changes["kinds"]:
        given = {name: value for name, value in given.items() if name != "lora_rank"}
    return given | changes


def refused(base, tmp_path, capsys, **changes):
    error = tiny.refused(capsys, *arguments(base, **({"output_dir": tmp_path / "gym"} | changes)))
    assert not (tmp_path / "gym").exists()
    return error
