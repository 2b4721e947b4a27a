"""Settings: from flags, from a saved run, and every value that makes no sense."""

import contextlib
import json
import math
import os
import pathlib
import re
import time
import typing

import numpy as np
import pytest

from pats_jax import errors, methods
from pats_jax.core.settings import entries
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.models.patterns import compile_pattern
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.programs import cli
from pats_jax.run import flags
from pats_jax.run.flags import FOREIGN_FLAGS
from pats_jax.run.settings import Settings, resuming
from pats_jax.run.text2text_settings import Text2TextSettings
from pats_jax.training.table import count_steps
from tests import tiny

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def parse(*args, kind=Settings, **options):
    own = ["--task_name", "rte"] if kind is Settings else ["--output_dir", "x"] if kind is GymSettings else []
    return flags.parse([*own, *args], "pats-jax test", kind, **options)


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
    assert parse("--method", "pats", "--response", "exponential", "--hidden-dropout", "0").model.hidden_dropout == 0.0


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
    fields = {*Settings.all_entries(), "config"}
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
    of_before = settings.replace(**{name: saved})
    assert settings.flat()[name] is None
    assert resuming(settings, of_before).flat()[name] == saved
    with pytest.raises(errors.InputError, match=f"{name} was {saved} and is 5"):
        resuming(settings.replace(**{name: 5}), of_before)


@pytest.mark.parametrize("name, value", WRONG)
def test_numbers_that_make_no_sense(name, value):
    own = [f"--method={METHOD_OF[name]}"] if name in METHOD_OF else []
    with refused(f"--{name} {errors.shown(value, quoted=False)}"[:60], ": must be "):
        parse(*own, f"--{name}={value}")


@pytest.mark.parametrize(
    "name, value",
    [("weight_decay", "0"), ("noise_scale", "0"), ("warmup_ratio", "1"), ("warmup_ratio", "0"), ("decay", "0")]
    + [("seed", "0"), ("seed", str(2**63 - 1)), ("sensitivity_batches", "0"), ("max_steps", "-1"), ("max_steps", "1")],
)
def test_numbers_at_the_edge_of_sense(name, value):
    own = [f"--method={METHOD_OF[name]}"] if name in METHOD_OF else []
    assert parse(*own, f"--{name}={value}").flat()[name] == pytest.approx(float(value))


KINDS = {Settings: {"task_name": "rte"}, PrimingSettings: {}, GymSettings: {"output_dir": "x"}}
METHOD_OF = {flag: name for name, method in methods.METHODS.items() for flag in entries(method)}
CHOOSES = {"method": METHOD_OF} | {
    "peft": {flag: kind for kind, config in peft.KINDS.items() for flag in entries(config)}
}
NUMBERS = [
    (kind, entry)
    for kind in KINDS
    for entry in kind.all_entries().values()
    if entry.type in (int, float, int | None, float | None)
]


def chosen_for(kind, flag):
    """What chooses the method or the adapter that reads a flag."""
    found = {choice: owners[flag] for choice, owners in CHOOSES.items() if flag in owners}
    if kind is GymSettings and "peft" in found:
        return {"kinds": (found["peft"],)}
    return found | ({"train": "pe"} if kind is PrimingSettings and "peft" in found else {})


@pytest.mark.parametrize("kind, entry", NUMBERS, ids=lambda x: getattr(x, "flag", getattr(x, "__name__", x)))
def test_no_number_is_beyond_all_sense(kind, entry):
    """What passes is finite, fits 32 bits (the seed: 63) and is below what memory or a lifetime would end at."""
    whole, name = entry.type in (int, int | None), entry.flag
    values = [-1, 0, 10**30, 2**31] if whole else [-1.0, 0.0, 1e308, 1e39, float("nan"), float("inf"), -float("inf")]
    for value in values:
        try:
            settings = kind(**KINDS[kind] | chosen_for(kind, name) | {name: value})
            if set(chosen_for(kind, name).get("method", "").split("+")) <= READ_BY_ALL:
                settings.check()
            else:
                entry.check(value)
        except InputError as error:
            assert name in str(error) and len(str(error)) < 300 and "\n" not in str(error)
        else:
            assert value in (-1, 0) or name == "seed", (name, value)
            assert value == 0 or name in ("max_steps", "seed"), (name, value)


# The others work with `pats-jax glue` alone, which the checks of the other programs say first.
READ_BY_ALL = {"", "pats", "perturbed", "dps-dense", "dps-mix", "sage", "child-f", "child-d", "mixout", "l2-sp"}


def test_epochs_without_end_are_refused_before_any_step():
    with refused("--num_train_epochs 1e+308: must be at most"):
        parse("--num_train_epochs", "1e308")
    assert count_steps(parse("--num_train_epochs", "2.5").length, 32, 320) == 25
    with refused("num_train_epochs 1e+06: gives 1e+12 steps"):
        count_steps(parse("--num_train_epochs", "1e6").length, 1, 10**6)


def test_a_task_is_no_path():
    with refused("--task_name: '../../x' cannot be part of a path"):
        flags.parse(["--task_name", "../../x"], "pats-jax glue", Settings)


def test_where_the_data_come_from_must_be_clear():
    with refused("no data: set --task_name", "--task_name", "--train_file"):
        flags.parse([], "pats-jax glue", Settings)
    with refused("--task_name", "--train_file", "cannot be used with"):
        parse("--train_file", "a.csv")


# a saved run


def test_a_saved_run_comes_back_and_flags_override_it(tmp_path):
    saved = Settings(
        task_name="cola", learning_rate=1.0, do_train=True, eval_steps=5, method="pats", response="reciprocal"
    )
    path = save(tmp_path, saved.to_dict())
    assert "config" not in saved.to_dict()
    assert flags.parse(["--config", path], "x", Settings) == saved
    again = flags.parse([f"--config={path}", "--seed", "7", "--no_do_train"], "x", Settings)
    assert again == saved.replace(seed=7, do_train=False)


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
    for name, entry in kind.all_entries().items():
        types = () if typing.get_origin(entry.type) in (list, tuple) else (entry.type, *typing.get_args(entry.type))
        for value in [math.nan, math.inf, -math.inf, 10**400] if float in types else [10**30] if int in types else []:
            with refused(f"{name} is ", "; it must be "):
                flags.read_config(save(tmp_path, {name: value}), kind)


@pytest.mark.parametrize("kind", [Settings, PrimingSettings, GymSettings])
def test_every_setting_comes_back_as_it_was(kind, tmp_path):
    saved = kind(method="pats+mixout", noise_scale=0.5)
    if kind is GymSettings:
        saved = kind(primed=("a",), kinds=("lora", "full"), lora_rank=3, tasks=("b",), samples=(1, 2), grid=("lora=1",))
    if kind is Settings:
        saved = saved.replace(out_of_domain=["mnli", "rte"], hidden_dropout=0.1, peft="ia3")
    assert flags.read_config(save(tmp_path, saved.to_dict()), kind) == saved


@pytest.mark.parametrize("kind", [Settings, PrimingSettings, GymSettings])
def test_flags_and_settings_are_two_ways_to_write_the_same(kind):
    first = kind(**KINDS[kind])
    changes = {"seed": 7, "method": "pats", "noise_scale": 0.25, "attention_dropout": 0.0, "deterministic": True}
    if kind is Settings:
        changes |= {"out_of_domain": ["mnli"], "save_total_limit": None, "do_regression": False, "peft": "lora"}
    for given in (first, first.replace(**changes)):
        assert flags.parse(flags.as_flags(given), "x", kind) == given


def test_only_given_flags_are_parsed_unless_one_is_not_known(monkeypatch):
    read, parse_all = [], flags.parse_flags

    def record(kind, **options):
        read.append(flags.vars_of(kind()).keys())
        return parse_all(kind, **options)

    monkeypatch.setattr(flags, "parse_flags", record)
    words = ["--seed", "7", "--no_do_train", "--task_name=cola", "--model_name_or_path", "m", "--output_dir", "o"]
    found = flags.parse(words, "x", Settings)
    assert read.pop() == {"seed", "do_train", "task_name", "model_name_or_path", "output_dir"}
    with pytest.raises(SystemExit):
        flags.parse([*words, "--sed", "7"], "x", Settings)
    assert read.pop() == Settings.all_entries().keys()  # to say which one may be meant
    monkeypatch.setattr(flags, "_known", lambda given, kind: None)
    assert flags.parse(words, "x", Settings) == found


# methods and adapters


def test_a_flag_that_no_chosen_method_reads_is_refused_by_name():
    with refused("--noise_scale: not a setting of --method finetune; omit it"):
        parse("--noise_scale", "0.1")
    with refused("--lora_rank: not a setting of a run without --peft; omit it"):
        parse("--lora_rank", "4")
    with refused("--freeze_unselected: not a setting of --method child-f"):
        parse("--method", "child-f", "--freeze_unselected")
    assert parse("--noise_scale", "0.1", others_read=frozenset({"noise_scale"})).method == "finetune"
    with refused("--drop_fraction: not a setting of --method pats"):
        Settings(method="pats", drop_fraction=0.1)


@pytest.mark.parametrize("kind", [PrimingSettings, GymSettings, Text2TextSettings])
def test_a_flag_that_a_program_does_not_read_is_refused_by_name(kind):
    for flag in sorted((kind.former | kind.elsewhere.keys()) - kind.all_entries().keys()):
        with refused(f"--{flag}: "):
            parse(f"--{flag}=1", kind=kind)


def test_methods_that_share_a_flag_share_its_definition():
    owners = {}
    for method in methods.METHODS.values():
        for flag, entry in entries(method).items():
            assert owners.setdefault(flag, entry) == entry
    assert {"keep_fraction", "noise_scale", "freeze_unselected"} <= owners.keys()
    assert not owners.keys() & {flag for config in peft.KINDS.values() for flag in entries(config)}


def test_the_methods_of_a_run_are_objects_with_their_own_settings():
    given = Settings(method="pats+dps-dense", noise_scale=0.1, keep_fraction=0.4)
    pats, dps = given.methods
    assert (pats.noise_scale, dps.keep_fraction, given.method) == (0.1, 0.4, "pats+dps-dense")
    assert given.replace(seed=1).methods == given.methods
    assert given.replace(method="pats").methods == (pats,)
    assert Settings(methods=(pats, dps)) == given


MINE = """
import dataclasses
from typing import ClassVar

import optax

from pats_jax.core.settings import at_least, setting
from pats_jax.methods import Method


@dataclasses.dataclass(frozen=True)
class Shrink(Method):
    name: ClassVar = "shrink"
    kind: ClassVar = "scaling"
    summary: ClassVar = "scales the gradient"
    source: ClassVar = "ours"

    shrink_factor: float = setting(0.5, "Shrink: factor of the gradient", at_least(0))

    def first(self, context):
        return optax.scale(self.shrink_factor)
"""


@pytest.mark.parametrize("factor", [pytest.param("1.0", marks=pytest.mark.slow), "0.0"])
def test_another_package_adds_a_method_with_a_flag_of_its_own(factor, tmp_path, monkeypatch):
    """By an entry point, as an installed package has it; then it is in the table and in ``--method``."""
    (tmp_path / "shrinking.py").write_text(MINE)
    metadata = tmp_path / "shrinking-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shrinking\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pats_jax.methods]\nshrink = shrinking:Shrink\n")
    base = tiny.quick_settings(tmp_path, method="pats", noise_scale=0.0, weight_decay=0.0, max_steps=2, do_train=True)
    args = [*flags.as_flags(base), "--method=shrink", f"--shrink_factor={factor}", f"--output_dir={tmp_path / 'run'}"]
    args = [arg for arg in args if arg != "--method=pats" and not arg.startswith("--noise_scale")]
    monkeypatch.syspath_prepend(str(tmp_path))
    forget_methods()
    try:
        cli.main(["glue", *args])
    finally:
        monkeypatch.undo()
        forget_methods()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["method"], saved["shrink_factor"]) == ("shrink", float(factor))
    norms = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (norms[-1]["update_norm"] < 1e-3) == (factor == "0.0")


def forget_methods():
    """Makes METHODS look for methods again."""
    vars(methods.METHODS).pop("_found", None)


@pytest.mark.parametrize("program", ["glue", "prime", "gym"])
def test_help_shows_what_people_set_and_help_all_everything(program, capsys):
    kind = {"glue": Settings, "prime": PrimingSettings, "gym": GymSettings}[program]
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as caught:
            flags.parse([flag], f"pats-jax {program}", kind)
        assert caught.value.code in (0, None)
        shown[flag] = set(re.findall(r"--([a-z0-9_]+)", capsys.readouterr().out))
    known = kind.all_entries()
    basic = {flag for flag, entry in known.items() if entry.about.is_basic}
    assert 10 <= len(basic) <= 20 and basic <= shown["--help"]
    assert not (shown["--help"] & known.keys()) - basic
    assert known.keys() <= shown["--help_all"]


def test_a_config_file_of_the_first_upstream_stage_loads(tmp_path):
    """Its query_batch_size has another name now, and the sizes of a batch followed from tasks_per_step."""
    old = {"algorithm": "maml", "tasks_per_step": 8, "query_batch_size": 5, "train_batch_size": 8}
    path = save(tmp_path, {**old, "per_device_train_batch_size": 2})
    found = flags.read_config(path, PrimingSettings)
    assert found == PrimingSettings(algorithm="maml", tasks_per_step=8, task_batch_size=5)
    found.check()
    with refused("unknown setting 'query_batch_size'"):
        flags.read_config(save(tmp_path, {"query_batch_size": 5}), Settings)


@pytest.mark.parametrize("kind", [Settings, PrimingSettings, GymSettings])
def test_config_files_of_before_the_groups_load(kind, tmp_path):
    """They hold the settings of all methods and adapters, and of a gym some that it never read."""
    old = json.loads((FIXTURES / "configs_before_groups.json").read_text())[kind.__name__]
    found = flags.read_config(save(tmp_path, old), kind)
    of_gym = {"output_dir": "x", "lora_layers": old["lora_layers"]}  # whose default fits more models since
    assert found == kind(**(of_gym if kind is GymSettings else {}))
    changed = flags.read_config(save(tmp_path, old | {"method": "mixout", "drop_fraction": 0.25, "seed": 5}), kind)
    assert changed == found.replace(method="mixout", drop_fraction=0.25, seed=5)


def test_a_saved_run_of_a_method_that_is_not_here(tmp_path):
    path = save(tmp_path, {"method": "sgd"})
    with refused(f"{path}: method sgd: no such method"):
        flags.read_config(path, Settings)


def test_config_files_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "pipe"):
        with refused(f"--config {path}: "):
            parse("--config", str(path))


# batches over devices


def test_the_global_batch_is_the_product_of_rows_devices_and_micro_batches():
    given = Settings(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert given.over(8).batches.train_batch_size == 96
    moved = given.over(8).over(2)
    assert (moved.batches.train_batch_size, moved.batches.per_device_train_batch_size) == (96, 16)
    with pytest.raises(InputError, match="--train_batch_size 96: cannot be split evenly across 5 devices"):
        given.over(8).over(5)


def test_a_typed_batch_size_counts_more_than_a_saved_product(tmp_path):
    saved = Settings(task_name="rte", per_device_train_batch_size=4).over(8)
    (tmp_path / "config.json").write_text(json.dumps(saved.to_dict()))
    assert flags.parse(["--config", str(tmp_path / "config.json")], "x", Settings).batches.train_batch_size == 32
    typed = flags.parse(
        ["--config", str(tmp_path / "config.json"), "--per_device_train_batch_size", "2"], "x", Settings
    )
    assert typed.over(8).batches.train_batch_size == 16


@pytest.mark.parametrize(
    "typed, message",
    [
        (["--resume", "--overwrite"], "--resume and --overwrite cannot be used together"),
        (["--load_best_model_at_end", "--do_train"], "need --do_train and --do_eval"),
        (["--early_stopping_patience", "2", "--do_eval"], "need --do_train and --do_eval"),
    ],
)
def test_flags_that_do_not_go_together(typed, message):
    with pytest.raises(InputError, match=message):
        flags.parse(["--task_name", "rte", *typed], "x", Settings)


# paths


PATHS = [name for name, entry in Settings.all_entries().items() if entry.about.is_path]


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_no_system_has_are_refused_by_their_flag(name):
    own = [] if name.endswith("_file") else ["--task_name", "rte"]
    reasons = {
        "x" * 300: "the path is too long",
        "x/" * 3000: "the path is too long",
        "~nosuchuser/x": "there is no user nosuchuser",
        "": "empty",
        "a\0b": "null byte",
    }
    for value, reason in reasons.items() if name == PATHS[0] else (("", "empty"),):
        with refused(f"--{name}", reason):
            flags.parse([*own, f"--{name}={value}"], "x", Settings)


def test_a_home_folder_is_what_the_shell_makes_of_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert parse("--output_dir=~/runs/x").folder.output_dir == "/home/ann/runs/x"
    assert parse("--output_dir=./~x").folder.output_dir == "./~x"


def test_paths_of_a_config_file_are_checked_like_flags(tmp_path):
    with refused("output_dir is 'a\\x00b'", "null bytes"):
        parse("--config", save(tmp_path, {"output_dir": "a\0b"}))


# regular expressions


def test_a_regex_that_would_take_forever_is_refused_in_time():
    params = {"a" * 60 + "b": np.zeros(1)}
    since = time.monotonic()
    with refused("noise_layers '(a|aa)+$': takes too long to match"):
        methods.layer_mask(params, "(a|aa)+$")
    assert time.monotonic() - since < 20  # of which it computes for one


def test_regexes_mean_what_they_mean_to_python():
    layers = [
        f"bert.encoder.layer.{n}.{part}" for n in (0, 11) for part in ("attention.self.query", "output.LayerNorm")
    ]
    names = [*(f"{layer}.{leaf}" for layer in layers for leaf in ("kernel", "bias", "scale")), "classifier.kernel", ""]
    known = Settings.all_entries().values()
    defaults = [e.default for e in known if isinstance(e.default, str) and "\\" in e.default]
    patterns = [*defaults, *(method.layers for method in methods.METHODS.values()), r"^bert(?!.*LayerNorm)", "[0-9]{2}"]
    assert len(defaults) >= 4
    for pattern in patterns:
        matches = compile_pattern(pattern, "--x")
        assert [matches(name) for name in names] == [re.search(pattern, name) is not None for name in names], pattern
