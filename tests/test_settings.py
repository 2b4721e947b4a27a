"""Settings: from flags, from a saved run, and every value that makes no sense."""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
import typing

import numpy as np
import pytest

from pats_jax import errors, methods
from pats_jax.errors import InputError
from pats_jax.models.patterns import compile_pattern
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.upstream import PrimingSettings
from pats_jax.run import settings
from pats_jax.run.settings import FOREIGN_FLAGS, Settings
from pats_jax.training.fine_tuning import count_steps


def parse(*args):
    return settings.parse(["--task_name", "rte", *args], "pats-jax glue", settings.Settings)


@contextlib.contextmanager
def refused(*parts):
    """Expects an InputError of one line that holds all the parts."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    for part in parts:
        assert part in message


def save(folder, content):
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# flags


def test_flags_as_people_know_them():
    parsed = parse("--do_train", "--learning_rate", "2e-5", "--max_steps=7", "--per_device_train_batch_size", "4")
    assert parsed == Settings(
        task_name="rte", do_train=True, learning_rate=2e-5, max_steps=7, per_device_train_batch_size=4
    )
    assert parse("--method", "pats", "--response", "exponential", "--hidden-dropout", "0").hidden_dropout == 0.0


@pytest.mark.parametrize(
    "flags, phases",
    [((), {"train", "eval"}), (("--do_predict",), {"predict"}), (("--do_eval", "--do_train"), {"eval", "train"})],
)
def test_phases(flags, phases):
    assert parse(*flags).phases == phases


@pytest.mark.parametrize("flag", FOREIGN_FLAGS)
def test_flags_of_run_glue_without_meaning_here_are_refused_by_name(flag):
    for written in ([f"--{flag}", "1"], [f"--{flag}=1"], [f"--{flag.replace('_', '-')}"]):
        with refused(f"--{flag} is not supported: "):
            parse(*written)


def test_what_we_name_instead_exists():
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert not fields & FOREIGN_FLAGS.keys()
    for advice in FOREIGN_FLAGS.values():
        ours = {word.strip(",;.").removeprefix("--") for word in advice.split() if word.startswith("--")}
        assert ours <= fields, advice


@pytest.mark.parametrize(
    "args",
    [["--learning_rate", "fast"], ["--response", "cubic"], ["--seed", "1.5"], ["--lerning_rate", "1"], ["--seed"]],
)
def test_the_parsers_own_complaints(args, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    assert caught.value.code == 2
    assert args[0].lstrip("-") in capsys.readouterr().err


POSITIVE_INTEGERS = (
    "max_seq_length max_train_samples max_eval_samples max_predict_samples per_device_train_batch_size "
    "per_device_eval_batch_size logging_steps eval_steps length_buckets"
).split()
WRONG = [
    *((name, value) for name in POSITIVE_INTEGERS for value in ("0", "-1")),
    *((name, value) for name in ("learning_rate", "num_train_epochs", "adam_epsilon") for value in ("0", "-1", "inf")),
    ("max_grad_norm", "0"),
    *((name, value) for name in ("weight_decay", "noise_scale") for value in ("-0.1", "nan", "inf")),
    ("sensitivity_batches", "-1"),
    *(("seed", value) for value in ("-1", str(2**63), "1" + "0" * 400)),
    *(("warmup_ratio", value) for value in ("-0.1", "1.1", "nan")),
    *((name, "1") for name in ("decay", "adam_beta1", "adam_beta2", "hidden_dropout", "attention_dropout")),
    *((name, "-0.1") for name in ("decay", "adam_beta1", "adam_beta2", "hidden_dropout", "attention_dropout")),
    *(("max_steps", value) for value in ("0", "-2", str(2**31))),
    ("task_name", "a\udcff"),
]


@pytest.mark.parametrize("name, saved", [("train_batch_size", 64), ("length_buckets", 3), ("sensitivity_batches", 8)])
def test_what_a_run_chose_is_taken_over_where_it_is_unset(name, saved):
    settings = parse("--task_name", "rte")
    of_before = dataclasses.replace(settings, **{name: saved})
    assert getattr(settings, name) is None
    assert getattr(settings.resuming(of_before), name) == saved
    with pytest.raises(errors.InputError, match=f"{name} was {saved} and is 5"):
        dataclasses.replace(settings, **{name: 5}).resuming(of_before)


@pytest.mark.parametrize("name, value", WRONG)
def test_numbers_that_make_no_sense(name, value):
    with refused(f"--{name} {errors.shown(value, quoted=False)}"[:60], ": must be "):
        parse(f"--{name}={value}")


@pytest.mark.parametrize(
    "name, value",
    [("weight_decay", "0"), ("noise_scale", "0"), ("warmup_ratio", "1"), ("warmup_ratio", "0"), ("decay", "0")]
    + [("seed", "0"), ("seed", str(2**63 - 1)), ("sensitivity_batches", "0"), ("max_steps", "-1"), ("max_steps", "1")],
)
def test_numbers_at_the_edge_of_sense(name, value):
    assert getattr(parse(f"--{name}={value}"), name) == pytest.approx(float(value))


KINDS = {Settings: {"task_name": "rte"}, PrimingSettings: {}, GymSettings: {"output_dir": "x"}}
NUMBERS = [
    (kind, field.name)
    for kind in KINDS
    for field in dataclasses.fields(kind)
    if field.type in (int, float, "int", "float", int | None, float | None)
]


@pytest.mark.parametrize("kind, name", NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_no_number_is_beyond_all_sense(kind, name):
    """What passes is finite, fits 32 bits (the seed: 63) and is below what memory or a lifetime would end at."""
    whole = type(getattr(kind, name)) is int or "int" in str(kind.__annotations__.get(name, ""))
    values = [-1, 0, 10**30, 2**31] if whole else [-1.0, 0.0, 1e308, 1e39, float("nan"), float("inf"), -float("inf")]
    for value in values:
        try:
            kind(**KINDS[kind] | {name: value}).check()
        except InputError as error:
            assert str(error).startswith("--") and len(str(error)) < 300 and "\n" not in str(error)
        else:
            assert value in (-1, 0) or name == "seed", (name, value)
            assert value == 0 or name in ("max_steps", "seed"), (name, value)


def test_epochs_without_end_are_refused_before_any_step():
    with refused("--num_train_epochs 1e+308: must be at most"):
        parse("--num_train_epochs", "1e308")
    assert count_steps(parse("--num_train_epochs", "2.5", "--train_batch_size", "32"), 320) == 25
    with refused("--num_train_epochs 1e+06: gives 1e+12 steps"):
        count_steps(parse("--num_train_epochs", "1e6", "--train_batch_size", "1"), 10**6)


def test_a_task_is_no_path():
    with refused("--task_name: '../../x' cannot be part of a path"):
        settings.parse(["--task_name", "../../x"], "pats-jax glue", settings.Settings)


def test_where_the_data_come_from_must_be_clear():
    with refused("no data: set --task_name", "--task_name", "--train_file"):
        settings.parse([], "pats-jax glue", settings.Settings)
    with refused("--task_name", "--train_file", "cannot be used with"):
        parse("--train_file", "a.csv")


# a saved run


def test_a_saved_run_comes_back_and_flags_override_it(tmp_path):
    saved = Settings(task_name="cola", learning_rate=1, do_train=True, eval_steps=5, response="reciprocal")
    path = save(tmp_path, saved.to_dict())
    assert "config" not in saved.to_dict()
    assert settings.parse(["--config", path], "x", settings.Settings) == dataclasses.replace(saved, config=path)
    again = settings.parse([f"--config={path}", "--seed", "7", "--no_do_train"], "x", settings.Settings)
    assert again == dataclasses.replace(saved, config=path, seed=7, do_train=False)


@pytest.mark.parametrize(
    "content, parts",
    [
        ({"lerning_rate": 1.0}, ["unknown setting 'lerning_rate'; did you mean 'learning_rate'?"]),
        ({"xyz": 1}, ["unknown setting 'xyz'"]),
        ({"learning_rate": "fast"}, ["learning_rate is 'fast'; it must be a number"]),
        ({"learning_rate": True}, ["learning_rate is true; it must be a number"]),
        ({"max_steps": 2.0}, ["max_steps is 2.0; it must be a whole number"]),
        ({"max_steps": None}, ["max_steps is null; it must be a whole number"]),
        ({"do_train": 1}, ["do_train is 1; it must be true or false"]),
        ({"response": "cubic"}, ["response is 'cubic'", "linear"]),
        ([1], ["not a JSON object"]),
        ({"do_train": None}, ["do_train is null; it must be true or false"]),
        ({"out_of_domain": ["mnli", "news"]}, ['out_of_domain is ["mnli", "news"]; it must be ']),
        ({"out_of_domain": "mnli"}, ["out_of_domain is 'mnli'; it must be "]),
        ({"response": ["linear"]}, ['response is ["linear"]']),
        ({"learning_rate": 10**400}, ["learning_rate is 1000", "must be greater than 0"]),
        ({"learning_rate": -1}, ["learning_rate is -1; it must be greater than 0"]),
        ('{"learning_rate": NaN}', ["learning_rate is NaN; it must be "]),
        ({"max_steps": 2**31}, ["max_steps is 2147483648; it must be at most 2147483647"]),
        ({"seed": 2**63}, ["seed is 9223372036854775808; it must be in [0, 2^63)"]),
        ({"output_dir": "a\0b"}, ["output_dir is 'a\\x00b'; it must be text without null bytes"]),
        ({"train_file": "\ud800"}, ["train_file is '\\ud800'; it must be text without null bytes"]),
        ({"x" * 9999: 1}, ["unknown setting 'xxx", "(9999 characters)"]),
        ({"response": "x" * 9999}, ["response is 'xxx", "(9999 characters)"]),
        ("{learning_rate", ["not valid JSON"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"seed": 1' + "0" * 5000 + "}", ["a number is too long"]),
        ("", ["not valid JSON"]),
        ("\udcff", ["not UTF-8"]),
    ],
)
def test_config_files_that_are_wrong(content, parts, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), errors="surrogateescape")
    with refused(f"--config {path}: ", *parts):
        parse("--config", str(path))


@pytest.mark.parametrize("kind", [Settings, PrimingSettings, GymSettings])
def test_every_number_of_a_config_file_has_a_range(kind, tmp_path):
    """What no computation survives is refused whatever the setting: infinities, and more than 32 bits of steps."""
    for field in dataclasses.fields(kind):
        is_sequence = typing.get_origin(field.type) in (list, tuple)
        types = () if is_sequence else (field.type, *typing.get_args(field.type))
        for value in [math.nan, math.inf, -math.inf, 10**400] if float in types else [10**30] if int in types else []:
            with refused(f"{field.name} is ", "; it must be "):
                settings.read_config(save(tmp_path, {field.name: value}), kind)


@pytest.mark.parametrize("kind", [Settings, PrimingSettings, GymSettings])
def test_every_setting_comes_back_as_it_was(kind, tmp_path):
    saved = kind()
    if kind is GymSettings:
        saved = kind(primed=("a",), kinds=("lora", "full"), tasks=("b",), samples=(1, 2), grid=("lora=1",))
    if kind is Settings:
        saved = kind(out_of_domain=["mnli", "rte"], hidden_dropout=0.1)
    assert settings.read_config(save(tmp_path, dataclasses.asdict(saved)), kind) == saved


def test_a_config_file_of_the_first_upstream_stage_loads(tmp_path):
    """Its query_batch_size has another name now, and the sizes of a batch followed from tasks_per_step."""
    old = {"algorithm": "maml", "tasks_per_step": 8, "query_batch_size": 5, "train_batch_size": 8}
    path = save(tmp_path, {**old, "per_device_train_batch_size": 2})
    found = settings.read_config(path, PrimingSettings)
    assert found == PrimingSettings(algorithm="maml", tasks_per_step=8, task_batch_size=5)
    found.check()
    with refused("unknown setting 'query_batch_size'"):
        settings.read_config(save(tmp_path, {"query_batch_size": 5}), Settings)


def test_config_files_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "pipe"):
        with refused(f"--config {path}: "):
            parse("--config", str(path))


# batches over devices


def test_the_global_batch_is_the_product_of_rows_devices_and_micro_batches():
    given = Settings(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert given.with_batch_size(8).train_batch_size == 96
    moved = given.with_batch_size(8).with_batch_size(2)
    assert (moved.train_batch_size, moved.per_device_train_batch_size) == (96, 16)
    with pytest.raises(InputError, match="--train_batch_size 96: cannot be split evenly across 5 devices"):
        given.with_batch_size(8).with_batch_size(5)


def test_a_typed_batch_size_counts_more_than_a_saved_product(tmp_path):
    saved = Settings(task_name="rte", per_device_train_batch_size=4).with_batch_size(8)
    (tmp_path / "config.json").write_text(json.dumps(saved.to_dict()))
    assert settings.parse(["--config", str(tmp_path / "config.json")], "x", settings.Settings).train_batch_size == 32
    typed = settings.parse(
        ["--config", str(tmp_path / "config.json"), "--per_device_train_batch_size", "2"], "x", settings.Settings
    )
    assert typed.with_batch_size(8).train_batch_size == 16


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resume", "--overwrite"], "--resume and --overwrite cannot be used together"),
        (["--load_best_model_at_end", "--do_train"], "need --do_train and --do_eval"),
        (["--early_stopping_patience", "2", "--do_eval"], "need --do_train and --do_eval"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(InputError, match=message):
        settings.parse(["--task_name", "rte", *flags], "x", settings.Settings)


# paths


PATHS = [name for name in settings._PATHS if hasattr(Settings, name) and name != "config"]


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_no_system_has_are_refused_by_their_flag(name):
    own = [] if name.endswith("_file") else ["--task_name", "rte"]
    for value, reason in (
        ("x" * 300, "the path is too long"),
        ("x/" * 3000, "the path is too long"),
        ("~nosuchuser/x", "there is no user nosuchuser"),
        ("", "empty"),
        ("a\0b", "null byte"),
    ):
        with refused(f"--{name}", reason):
            settings.parse([*own, f"--{name}={value}"], "x", Settings)


def test_a_home_folder_is_what_the_shell_makes_of_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert parse("--output_dir=~/runs/x").output_dir == "/home/ann/runs/x"
    assert parse("--output_dir=./~x").output_dir == "./~x"


def test_paths_of_a_config_file_are_checked_like_flags(tmp_path):
    with refused("output_dir is 'a\\x00b'", "null bytes"):
        parse("--config", save(tmp_path, {"output_dir": "a\0b"}))


# regular expressions


def test_a_regex_that_would_take_forever_is_refused_in_time():
    params = {"a" * 60 + "b": np.zeros(1)}
    since = time.monotonic()
    with refused("--noise_layers '(a|aa)+$': takes too long to match"):
        methods.layer_mask(params, "(a|aa)+$")
    assert time.monotonic() - since < 20  # of which it computes for one


def test_regexes_mean_what_they_mean_to_python():
    layers = [
        f"bert.encoder.layer.{n}.{part}" for n in (0, 11) for part in ("attention.self.query", "output.LayerNorm")
    ]
    names = [*(f"{layer}.{leaf}" for layer in layers for leaf in ("kernel", "bias", "scale")), "classifier.kernel", ""]
    defaults = [value for value in vars(Settings()).values() if isinstance(value, str) and "\\" in value]
    patterns = [*defaults, *(method.layers for method in methods.METHODS.values()), r"^bert(?!.*LayerNorm)", "[0-9]{2}"]
    assert len(defaults) >= 4
    for pattern in patterns:
        matches = compile_pattern(pattern, "--x")
        assert [matches(name) for name in names] == [re.search(pattern, name) is not None for name in names], pattern
