"""The benchmark of written tasks: what it reads, what it runs, and its statistics."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
import tiny

from benchmarks import written_tasks
from pats_jax.comparison import compare
from pats_jax.errors import InputError


@pytest.fixture
def flags(tmp_path):
    data = tmp_path / "data"
    mrpc = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    for name, rows in (("train", 5), ("dev", 2)):
        lines = [(number % 2, 1, 2, f"a {number}", f"b {number}") for number in range(rows)]
        tiny.write_table(data / "glue" / "MRPC" / f"{name}.tsv", mrpc, *lines)
    tiny.write_sst2(data / "glue")
    gym = data / "gym" / "wikisql"
    for seed, split, rows in ((13, "train", 2), (21, "train", 3), (13, "dev", 1), (13, "test", 4)):
        records = [
            {"input": f"{split} {number}", "output": f"SELECT {number}", "options": []} for number in range(rows)
        ]
        tiny.write_lines(gym / f"wikisql_16_{seed}_{split}.jsonl", records)
    return written_tasks.Flags("tiny_t5", data, tmp_path / "out")


def test_tasks_are_written_as_text(flags):
    assert written_tasks.write_data(flags, "mrpc") == {"train": 5, "validation": 2}
    with flags.data_file("mrpc", "train").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:3] == [
        ["mrpc sentence1: a 0 sentence2: b 0", "not_equivalent"],
        ["mrpc sentence1: a 1 sentence2: b 1", "equivalent"],
    ]
    assert written_tasks.write_data(flags, "sst2") == {"train": 22, "validation": 10}
    # rows of several samples count once, and test rows are never trained on
    assert written_tasks.write_data(flags, "wikisql") == {"train": 4, "validation": 4}
    assert written_tasks.constant_scores(flags, "mrpc") == 0.5  # not_equivalent, three times of five


@pytest.mark.parametrize("task", written_tasks.TASKS)
def test_commands_are_those_of_the_program(flags, task):
    """Read as `pats-jax compare` reads them; each run is where its results are looked for."""
    written_tasks.write_data(flags, task)
    _, module, package, program, *args = dataclasses.replace(flags, seeds=3, lanes=2).command(task)
    assert (module, package, program) == ("-m", "pats_jax", "compare")
    grid, others = compare.parse(args)
    grid = compare.name_data(grid, others)
    shared = compare.check(grid, others)
    assert grid.program == "text2text" and grid.lanes == 2 and len(shared) == 2
    assert all(
        settings.model.max_source_length == written_tasks.TASKS[task].source_length for settings in shared.values()
    )
    places = {run.folder(flags.output_dir / task) / "results.json" for run in grid.runs(shared)}
    flags = dataclasses.replace(flags, seeds=3)
    assert places == {path for method in written_tasks.METHODS for path in flags.results_of(task, method)}


def test_the_difference_has_the_interval_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    plain, noisy = rng.normal(size=5), rng.normal(0.3, 1, 5)
    found = written_tasks.compared(list(plain), list(noisy))
    interval = scipy.stats.ttest_rel(noisy, plain).confidence_interval(0.95)
    np.testing.assert_allclose(found["interval"], [interval.low, interval.high])
    np.testing.assert_allclose(found["difference"], np.mean(noisy) - np.mean(plain))
    np.testing.assert_allclose(found["plain_sd"], np.std(plain, ddof=1))


def test_finished_runs_are_read_not_repeated(flags):
    for method, scores in (("finetune", (0.5, 0.5)), ("pats", (0.6, 0.7))):
        for path, score in zip(dataclasses.replace(flags, seeds=2).results_of("sst2", method), scores, strict=True):
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"final": {"metrics": {"exact_match": score}}}))
    arguments = ["--model", flags.model, "--data_dir", str(flags.data_dir), "--output_dir", str(flags.output_dir)]
    written_tasks.main([*arguments, "--tasks", "sst2", "--seeds", "2"])
    found = json.loads((flags.output_dir / "written_tasks.json").read_text())["tasks"]["sst2"]
    assert found["rows"] == {"train": 22, "validation": 10}
    assert found["scores"]["exact_match"]["difference"] == pytest.approx(0.15)


def test_mistakes_are_one_line(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        written_tasks.main(["--model", "x", "--data_dir", "y", "--output_dir", "z", "--tasks", "nose"])
    assert capsys.readouterr().err == "error: --tasks nose: choose from mrpc, sst2, wikisql\n"
    for path in (flags.data_dir / "gym" / "wikisql").glob("*test*"):
        path.unlink()
    with pytest.raises(InputError, match="lacks files of train, dev or test rows"):
        written_tasks.write_data(flags, "wikisql")
