"""Which runs of a grid go side by side, and a grid of real runs in lanes."""

import io
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import rich.console
import test_compare
import tiny
from safetensors.numpy import load_file

from pats_jax.comparison import compare, run_sets
from pats_jax.comparison.arms import Arm
from pats_jax.comparison.run_sets import RunSet
from pats_jax.comparison.seed_statistics import Run
from pats_jax.errors import InputError
from pats_jax.run.workers import Ended


def planned(root, flags, lanes, methods="finetune pats", seeds="0 1 2 3 4"):
    """The sets of a grid, as (method, settings of the arm, seeds) each."""
    args = f"--methods {methods} --tasks sst2 --seeds {seeds} --output_dir {root} {flags}".split()
    grid, others = compare.parse(args)
    shared = compare.check(grid, others)

    def settings_of(run):
        return compare.settings_of(run, root, shared) if run.arm in shared else None

    return run_sets.in_sets(grid.runs(shared), settings_of, root, lanes)


def named(sets):
    return [(*dict.fromkeys(run.arm.folder for run in one.runs), [run.seed for run in one.runs]) for one in sets]


def test_seeds_of_a_method_are_a_set(tmp_path):
    sets = planned(tmp_path, "", 3)
    assert named(sets) == [("finetune", [0, 1, 2]), ("pats", [0, 1, 2]), ("finetune", [3, 4]), ("pats", [3, 4])]
    assert [one.name for one in sets] == ["set1", "set3", "set2", "set4"]
    assert [len(one.runs) for one in planned(tmp_path, "", None)] == [5, 5]
    assert all(one.name is None and len(one.runs) == 1 for one in planned(tmp_path, "", 1))
    assert planned(tmp_path, "", 4)[-1] == RunSet((Run("sst2", Arm("pats"), 4),))  # one that is left over


def test_listed_numbers_are_lanes_and_other_settings_are_not(tmp_path):
    listed = "--noise_scale 0.1 0.2 --max_grad_norm 1.0 2.0"
    sets = planned(tmp_path, listed, None, "pats", "0 1")
    assert [len(one.runs) for one in sets] == [4, 4]
    assert [{dict(run.arm.overrides)["max_grad_norm"] for run in one.runs} for one in sets] == [{1.0}, {2.0}]
    assert len(planned(tmp_path, "--response linear constant", None, "pats", "0 1")) == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--train_file {0}/own.csv --validation_file {0}/own.csv --text_column_names question --label_column_name kind",
        "--tasks mnli --out_of_domain snli sick",
    ],
)
def test_settings_that_are_lists_are_part_of_the_program(flags, tmp_path):
    (tmp_path / "own.csv").write_text("question,kind\nwhy?,a\nwho?,b\n")
    args = f"--methods pats --seeds 0 1 --output_dir {tmp_path} {flags}".format(tmp_path).split()
    grid, others = compare.parse(args)
    (settings,) = compare.check(compare.name_data(grid, others), others).values()
    assert any(isinstance(value, list) for value in settings.flat().values())
    run = Run("one", Arm("pats"), 0)
    assert {run_sets.program_of(run, one) for one in (settings, settings.replace(seed=1))} == {
        run_sets.program_of(run, settings)
    }


def test_what_cannot_be_a_lane_goes_alone(tmp_path):
    sets = planned(tmp_path, "", None, "pats child-d", "0 1")
    assert named(sets) == [("pats", [0, 1]), ("child-d", [0]), ("child-d", [1])]
    assert all(one.name is None for one in planned(tmp_path, "--profile", None))
    (Run("sst2", Arm("pats"), 1).folder(tmp_path) / "checkpoints").mkdir(parents=True)  # begun alone
    assert named(planned(tmp_path, "", None, "pats", "0 1 2")) == [("pats", [0, 2]), ("pats", [1])]


@pytest.mark.parametrize(
    "flags", ["--class_weights balanced", "--label_smoothing_factor 0.1", "--validation_split_percentage 20"]
)
def test_what_differs_by_seed_or_weighs_rows_goes_alone(flags, tmp_path):
    assert named(planned(tmp_path, flags, None, "pats", "0 1")) == [("pats", [0]), ("pats", [1])]
    assert named(planned(tmp_path, "", None, "pats", "0 1")) == [("pats", [0, 1])]


@pytest.mark.parametrize("flags", ["--fsdp 2", "--parallel pmap", "--attention cudnn --dtype bfloat16"])
def test_what_excludes_lanes_is_refused_by_name(flags, tmp_path):
    flag, value = flags.split()[:2]
    with pytest.raises(InputError, match=re.escape(f"{flag} {value}: not available in lanes; set --lanes 1")):
        planned(tmp_path, flags, 4)
    assert planned(tmp_path, f"{flags} --lanes 1", 1)


def finish(root, *runs):
    for run in runs:
        test_compare.write_run(root, run, 0.8)


def begin(root, name, runs, lanes=3):
    folder = root / "lanes" / name
    folder.mkdir(parents=True)
    found = {"runs": [run.record() for run in runs], "lanes": lanes, "layers": "separate"}
    (folder / "lanes.json").write_text(json.dumps(found))


def test_a_set_is_resumed_as_it_was_begun(tmp_path):
    runs = [Run("sst2", Arm("pats"), seed) for seed in range(5)]
    begin(tmp_path, "set1", runs[:3])
    finish(tmp_path, runs[0])
    sets = planned(tmp_path, "", 2, "pats")
    assert sets == [RunSet(tuple(runs[:3]), "set1"), RunSet(tuple(runs[3:]), "set2")]
    assert sets[0].log_file(tmp_path) == tmp_path / "lanes" / "set1.log"
    assert named(planned(tmp_path, "", 2, "pats", "3 4")) == [("pats", [3, 4])]
    finish(tmp_path, *runs[1:3])
    assert named(planned(tmp_path, "", 2, "pats")) == [("pats", [3, 4])]
    assert not (tmp_path / "lanes" / "set1").exists()


def test_a_damaged_set_is_one_line(tmp_path):
    begin(tmp_path, "set1", [Run("sst2", Arm("pats"), 0)])
    (tmp_path / "lanes" / "set1" / "lanes.json").write_text('{"runs": [], "lanes": 0}')
    with pytest.raises(InputError, match="lanes.json"):
        planned(tmp_path, "", 2, "pats")


def test_why_a_run_of_a_set_failed(tmp_path):
    runs = [Run("sst2", Arm("pats"), seed) for seed in range(2)]
    shared = {Arm("pats"): test_compare.BASE.replace(method="pats")}
    grid = compare.Grid(lanes=2, keep_models="none")
    job = compare.job_of(RunSet(tuple(runs), "set1"), tmp_path, shared, grid)
    assert json.loads(job.stdin)["lanes"] == 2 and not json.loads(job.stdin)["keeps_models"]
    finish(tmp_path, runs[0])
    run_sets.log_file(tmp_path, runs[1]).write_text("pats-jax: error: diverged\n")
    assert [compare.failure(run, tmp_path, job, Ended(0, 1.0)) for run in runs] == [
        None,
        ("diverged", run_sets.log_file(tmp_path, runs[1])),
    ]
    pathlib.Path(job.log).parent.mkdir()
    pathlib.Path(job.log).write_text("pats-jax: error: no memory\n")
    killed = [compare.failure(run, tmp_path, job, Ended(2, 1.0)) for run in runs]
    assert killed == [None, ("no memory", pathlib.Path(job.log))]


def test_kept_models(tmp_path):
    scores = {"finetune": {1: 0.7, 2: 0.9, 3: 0.8}, "pats": {1: 0.8, 2: 0.7}}
    runs = test_compare.write_grid(tmp_path, scores)
    for run in runs:
        (run.folder(tmp_path) / "model").mkdir()

    def kept(keep):
        compare.drop_models(compare.Grid(keep_models=keep), {("mrpc", Arm("finetune"))}, runs, tmp_path)
        return [(run.arm.method, run.seed) for run in runs if (run.folder(tmp_path) / "model").exists()]

    assert len(kept("all")) == 5
    assert kept("best") == [("finetune", 2), ("pats", 1), ("pats", 2)]
    assert kept("none") == [("pats", 1), ("pats", 2)]


@pytest.mark.parametrize(
    "devices, lanes", [("1 cpu", 4), ("2 cpu", 4), ("unknown", 4), ("1 NVIDIA H100 80GB HBM3", None)]
)
def test_the_default_number_of_lanes(devices, lanes):
    assert run_sets.default_lanes([{"devices of JAX": "1 cpu"}, {"devices of JAX": devices}]) == lanes


@pytest.mark.slow
def test_a_grid_of_real_runs_in_lanes(tmp_path, monkeypatch):
    """As `pats-jax compare --lanes 1` makes it, in one process; two of the runs diverge."""
    monkeypatch.setenv("XLA_FLAGS", tiny.flags_for_one_device())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    flags = f"""
        --methods pats --tasks sst2 --seeds 1 --noise_scale 0.1 0.2 --learning_rate 1e-3 1e30
        --model_name_or_path {tiny.save_checkpoint(tmp_path / "checkpoint")}
        --data_dir {tiny.write_sst2(tmp_path / "data")} --max_seq_length 16 --per_device_train_batch_size 8
        --length_buckets 1 --save_steps 0 --max_steps 8 --logging_steps 2 --max_nonfinite_steps 0"""
    found = {}
    for lanes in (4, 1):
        root = tmp_path / str(lanes)
        with pytest.raises(InputError, match="2 of 4 runs failed"):
            args = shlex.split(f"{flags} --lanes {lanes} --output_dir {root}")
            compare.run(args, rich.console.Console(file=io.StringIO(), width=200))
        found[lanes] = json.loads((root / "comparison.json").read_text())
    ours, theirs = (one["tasks"]["sst2"]["methods"] for one in found.values())
    assert found[4]["missing"] == found[1]["missing"] and len(found[4]["missing"]) == 2
    assert ours.keys() == theirs.keys() and len(ours) == 2
    for arm in ours:
        losses = [one[arm]["curves"]["loss"]["mean"] for one in (ours, theirs)]
        np.testing.assert_allclose(*losses, rtol=1e-2)
    assert [path.name for path in (tmp_path / "4" / "lanes").iterdir()] == ["set1.log"]
    model = "runs/sst2/pats,noise_scale=0.1,learning_rate=0.001/seed1/model/model.safetensors"
    ours, theirs = (load_file(tmp_path / lanes / model) for lanes in ("4", "1"))
    for name in ours:
        if not name.endswith("self.key.bias"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-4, err_msg=name)
