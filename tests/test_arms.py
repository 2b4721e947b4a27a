"""Arms of a grid: methods under listed settings, what each is compared with, and one's own files in place of a task."""

import io
import itertools
import json
import pathlib
import re

import pytest
import rich.console
import test_compare

from pats_jax.comparison import arms, compare, comparison_page, seed_statistics
from pats_jax.comparison.arms import Arm
from pats_jax.comparison.seed_statistics import Run
from pats_jax.errors import InputError
from pats_jax.run import flags
from pats_jax.run.records import GridFile
from pats_jax.run.settings import Settings

LISTS = "--learning_rate 1e-4 2e-4 --noise_scale=1e-3 1e-2 --peft none lora --lora_rank 4 8 --max_steps 9".split()


def checked(flags, methods="finetune pats", tasks="--tasks rte"):
    """The grid of a command line and the settings of its arms."""
    args = f"--methods {methods} {tasks} --seeds 1 2 --output_dir nowhere --model_name_or_path model {flags}"
    grid, others = compare.parse(args.split())
    grid = compare.name_data(grid, others)
    return grid, compare.check(grid, others)


def test_arms_are_the_combinations_that_a_method_and_a_kind_read():
    lists, others = arms.split_lists(LISTS)
    assert others == ["--max_steps", "9"]
    found = arms.make_arms(["finetune", "pats"], lists, None)
    kinds = [{"peft": None}, {"peft": "lora", "lora_rank": 4}, {"peft": "lora", "lora_rank": 8}]
    rates, scales = [{"learning_rate": x} for x in (1e-4, 2e-4)], [{"noise_scale": x} for x in (1e-3, 1e-2)]
    plain = [{"method": "finetune", **a, **b} for a, b in itertools.product(rates, kinds)]
    noisy = [{"method": "pats", **a, **b, **c} for a, b, c in itertools.product(rates, scales, kinds)]
    assert len(found) == len(set(found)) == 6 + 12
    as_sets = [set(one.settings().items()) for one in found]
    assert all(set(one.items()) in as_sets for one in [*plain, *noisy])


def test_the_settings_of_an_arm_are_its_own_and_the_grids():
    grid, shared = checked(" ".join(LISTS))
    for arm, settings in shared.items():
        flat = settings.flat()
        assert settings.method == arm.method and flat["max_steps"] == 9
        assert {name: flat[name] for name in arm.settings()} == arm.settings()
    run = Run("rte", Arm("pats", (("learning_rate", 1e-4), ("noise_scale", 1e-2), ("peft", None))), 2)
    assert run in grid.runs(shared) and run.name == "rte/pats,learning_rate=0.0001,noise_scale=0.01,peft=none/seed2"
    args = compare.run_arguments(run, pathlib.Path("nowhere"), shared)
    settings = flags.parse(args[3:], "pats-jax glue", Settings)
    assert (settings.seed, settings.optimizer.learning_rate, settings.peft) == (2, 1e-4, None)
    assert settings.methods[0].noise_scale == 1e-2


def test_without_lists_an_arm_is_a_method():
    _, shared = checked("--noise_scale 0.1")
    assert list(shared) == [Arm("finetune"), Arm("pats")] and Arm("pats").folder == Arm("pats").label == "pats"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--learning_rate 1e-4 fast", "--learning_rate fast: must be a number"),
        ("--learning_rate 1e-4 -1", "--learning_rate -1.0: must be greater than 0"),
        ("--learning_rate 1e-4 0.0001", "--learning_rate 1e-4 0.0001: list each only once"),
        ("--max_steps 5 2.5", "--max_steps 2.5: must be a whole number"),
        ("--peft lora glue", "--peft glue: must be "),
        ("--lora_rank 4 8", "--lora_rank: no method or PEFT kind of this grid has this setting"),
        ("--max_train_samples 10 20", "--max_train_samples 10 20: a grid's runs share their data"),
        ("--num_devices 1 2", "--num_devices 1 2: changes no result"),
        ("--per_device_train_batch_size 8 16", "list --train_batch_size instead"),
        ("--peft none lora --methods bitfit", "--peft lora --method bitfit: "),
        ("--train_file a.csv", "--train_file: cannot be used with --tasks"),
        ("--dataset_name org/reviews", "--dataset_name: cannot be used with --tasks"),
    ],
)
def test_a_wrong_list_is_refused_in_a_line(flags, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        checked(flags)
    assert "\n" not in str(caught.value)


def test_own_files_stand_in_place_of_a_task():
    files = "--train_file data/reviews.csv --validation_file dev.csv"
    grid, shared = checked("--learning_rate 1e-4 2e-4", tasks=files)
    runs = grid.runs(shared)
    assert len(runs) == 8 and {run.task for run in runs} == {"reviews"}
    settings = compare.settings_of(runs[0], pathlib.Path("grid"), shared)
    assert (settings.data.train_file, settings.data.task_name) == ("data/reviews.csv", None)
    assert settings.folder.output_dir == "grid/runs/reviews/finetune,learning_rate=0.0001/seed1"
    grid, shared = checked("", tasks="--dataset_name org/reviews")
    run = grid.runs(shared)[0]
    settings = compare.settings_of(run, pathlib.Path("grid"), shared)
    assert (run.task, settings.data.dataset_name, settings.data.task_name) == ("reviews", "org/reviews", None)
    with pytest.raises(InputError, match="--tasks is missing; for your own data, set --train_file"):
        checked("", tasks="")
    checked("--validation_split_percentage 10", tasks="--train_file data/reviews.csv")
    with pytest.raises(InputError, match="^--validation_file is missing, or --validation_split_percentage; this run"):
        checked("", tasks="--train_file data/reviews.csv")


def test_a_method_is_compared_under_the_same_settings():
    rates, scales = [(("learning_rate", x),) for x in (1, 2)], [(("noise_scale", x),) for x in (3, 4)]
    plain = [Arm("finetune", rate) for rate in rates]
    noisy = [Arm("pats", rate + scale) for rate in rates for scale in scales]
    found = arms.baselines([*noisy, *plain])
    assert found == dict(zip(noisy, [plain[0], plain[0], plain[1], plain[1]], strict=True)) | {
        plain[0]: None,
        plain[1]: plain[0],
    }
    assert arms.baselines([Arm("mixout"), Arm("pats")]) == {Arm("mixout"): None, Arm("pats"): Arm("mixout")}
    assert arms.baselines([Arm("finetune"), Arm("pats", rates[0])])[Arm("pats", rates[0])] == Arm("finetune")


def listed_grid(root):
    """Two learning rates with two methods: PATS is 1 point better at the low one, 2 worse at the high one."""
    scores = {
        ("finetune", 1e-4): {1: 0.80, 2: 0.82},
        ("finetune", 2e-4): {1: 0.90, 2: 0.91},
        ("pats", 1e-4): {1: 0.81, 2: 0.83},
        ("pats", 2e-4): {1: 0.88, 2: 0.89},
    }
    runs = []
    for (method, rate), of in scores.items():
        for seed, score in of.items():
            runs.append(Run("mrpc", Arm(method, (("learning_rate", rate),)), seed))
            test_compare.write_run(root, runs[-1], score, learning_rate=rate)
    return runs


def test_differences_are_those_from_an_arms_own_baseline(tmp_path):
    summary = seed_statistics.summarise(tmp_path, listed_grid(tmp_path))
    found = summary.tasks["mrpc"].methods
    means = {name: one.difference and round(100 * one.difference.mean, 6) for name, one in found.items()}
    assert means == {
        "finetune learning_rate=0.0001": None,
        "finetune learning_rate=0.0002": 9.5,
        "pats learning_rate=0.0001": 1.0,
        "pats learning_rate=0.0002": -2.0,
    }
    assert summary.pooled["pats learning_rate=0.0002"].baseline == "finetune learning_rate=0.0002"
    assert summary.listed == ["learning_rate"] and "learning_rate" not in summary.settings
    header, rows = comparison_page.score_table(summary.tasks["mrpc"], summary.baseline)
    assert header[1:6] == ["difference", "95 % interval", "p", "p (Holm)", "compared with"]
    assert [row[5] for row in rows][2:] == ["finetune learning_rate=0.0001", "finetune learning_rate=0.0002"]
    said = comparison_page.answer(summary)
    assert said.startswith("None of 3 methods is shown to differ from what it is compared with.")


def test_a_listed_grid_is_reported_from_its_file(tmp_path):
    runs = listed_grid(tmp_path)
    compare.record_start(tmp_path, "glue", runs, "pats-jax compare", [])
    record = json.loads((tmp_path / "grid.json").read_text())["runs"][-1]
    assert record == {"task": "mrpc", "method": "pats", "seed": 2, "overrides": {"learning_rate": 2e-4}}
    assert compare.recorded_runs(tmp_path) == runs
    compare.run(["--output_dir", str(tmp_path), "--report_only"], rich.console.Console(file=io.StringIO()))
    text = (tmp_path / "report.md").read_text()
    assert "All runs share their settings, except `learning_rate`;" in text and "score it, so its score is too" in text


def test_a_run_that_is_not_what_its_arm_says_is_refused(tmp_path):
    runs = listed_grid(tmp_path)
    wrong = Run("mrpc", Arm("pats", (("learning_rate", 3e-4),)), 1)
    test_compare.write_run(tmp_path, wrong, 0.9, learning_rate=4e-4)
    with pytest.raises(InputError, match="learning_rate was 0.0004 and is 0.0003"):
        seed_statistics.summarise(tmp_path, [*runs, wrong])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"learning_rate": -1.0}, r"overrides.learning_rate: -1.0: must be greater than 0"),
        ({"rate": 1.0}, "overrides: 'rate' is not a setting"),
        ({"learning_rate": [1.0]}, "overrides.learning_rate"),
    ],
)
def test_a_damaged_grid_file_is_named(overrides, message, tmp_path):
    found: GridFile = {
        "runs": [{"task": "rte", "method": "pats", "seed": 1, "overrides": overrides}],
        "commands": [],
        "machines": [],
    }
    (tmp_path / "grid.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=message):
        compare.recorded_runs(tmp_path)


def test_a_grid_goes_on_with_arms_that_it_no_longer_lists(tmp_path):
    """As a grid first run with one learning rate, and then with others."""
    compare.record_start(tmp_path, "glue", listed_grid(tmp_path), "pats-jax compare", [])
    args = f"--methods finetune --tasks mrpc --seeds 1 --output_dir {tmp_path} --model_name_or_path model".split()
    for added, message in ((["--learning_rate", "3e-4", "4e-4"], None), (["--max_seq_length", "64"], "max_seq_length")):
        grid, others = compare.parse([*args, *added])
        shared = compare.check(grid, others)
        if message is None:
            assert all(one.batches.train_batch_size == 32 for one in compare.as_before(grid, shared).values())
        else:
            with pytest.raises(InputError, match=f"{message} was 128 and is 64"):
                compare.as_before(grid, shared)
