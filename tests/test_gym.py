"""The few-shot gym: readers of both kinds of files, every complaint, the metrics, and the real gym if it is at hand."""

import collections
import json
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from pats_jax.data.few_shot import KINDS, FewShotTask, Row, Sample, build_task, task_metric
from pats_jax.data.gym import load_gym, task_names
from pats_jax.data.partitions import load_partitioned_gym
from pats_jax.errors import InputError
from pats_jax.training.metrics import METRICS, compute_metrics

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gym"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real few-shot gym is not at {SHARED}")
SPLITS = ("train", "dev", "test")


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def line(output: str, *options: str, given: str = "a text", task: str = "mood", **other) -> str:
    return json.dumps({"task": task, "input": given, "output": output, "options": list(options)} | other)


def write_task(folder: Path, name: str, suffix: str, *lines: str, seeds=(13,), splits=SPLITS) -> Path:
    """Writes files of one task that all hold the same lines."""
    for seed in seeds:
        for split in splits:
            write(folder / name / f"{name}_16_{seed}_{split}.{suffix}", *lines)
    return folder


# --- both kinds of files ----------------------------------------------------------------------------------------------


def test_json_lines_with_the_same_options_are_classification(tmp_path):
    good, bad = line("good", "bad", "good", given="so warm"), line("bad", "good", "bad", given="so cold")
    write(tmp_path / "mood/mood_16_21_train.jsonl", good, bad)
    write(tmp_path / "mood/mood_16_21_dev.jsonl", bad)
    write(tmp_path / "mood/mood_16_13_train.jsonl", bad)
    write(tmp_path / "mood/mood_16_13_dev.jsonl", good)
    write(tmp_path / "mood/mood_16_100_test.jsonl", good, good, bad)
    [(name, task)] = load_gym(tmp_path).items()
    assert (name, task.name, task.kind) == ("mood", "mood", "classification")
    # The order of the first row of the first sample is the order of the classes everywhere.
    warm, cold = Row("so warm", ("good", "bad"), 0), Row("so cold", ("good", "bad"), 1)
    assert task.options == ("good", "bad")
    assert task.samples == (
        Sample(13, (cold,), (warm,), (warm, warm, cold)),
        Sample(21, (warm, cold), (cold,), (warm, warm, cold)),
    )
    assert task.sample(21) is task.samples[1]
    with pytest.raises(InputError, match="mood: no sample of seed 7; there are 13, 21"):
        task.sample(7)


def test_json_lines_with_options_of_their_own_are_multiple_choice(tmp_path):
    lines = line("tea", "tea", "rock", "tea"), line("a bird", "a fish", "a bird", given="¿ caf\u2028é ?")
    write_task(tmp_path, "mood", "jsonl", *lines)
    task = load_gym(tmp_path)["mood"]
    assert (task.kind, task.options) == ("multiple_choice", None)
    assert task.samples[0].train == (
        Row("a text", ("tea", "rock", "tea"), 0),  # spelt alike twice, as it occurs: the first one counts
        Row("¿ caf\u2028é ?", ("a fish", "a bird"), 1),
    )
    assert [row.output for row in task.samples[0].test] == ["tea", "a bird"]


def test_blank_lines_between_json_lines_do_not_count(tmp_path):
    write_task(tmp_path, "mood", "jsonl", "", line("a", "a", "b"), " ", "", line("b", "a", "b"), "")
    assert [row.output for row in load_gym(tmp_path)["mood"].samples[0].test] == ["a", "b"]
    with pytest.raises(InputError, match=r"mood_16_13_dev.jsonl:4: no field 'task'"):
        write(tmp_path / "mood/mood_16_13_dev.jsonl", line("a", "a", "b"), "", "", "{}")
        load_gym(tmp_path)


def test_tsv_takes_the_options_from_the_outputs_of_all_splits(tmp_path):
    write(tmp_path / "topic_4_13_train.tsv", 'say "hi"\tsport', "x (A) y\tart")
    write(tmp_path / "topic_4_13_dev.tsv", "z\tsport", "z\tsport")
    write(tmp_path / "topic_4_13_test.tsv", "w\tlaw", "w\tart", "w\tlaw")
    task = load_gym(tmp_path, shots=4)["topic"]
    assert (task.kind, task.options) == ("classification", ("art", "law", "sport"))
    assert task.samples[0].train == (Row('say "hi"', task.options, 2), Row("x (A) y", task.options, 0))
    assert [row.answer for row in task.samples[0].test] == [1, 0, 1]


def test_tsv_takes_the_options_that_end_the_inputs(tmp_path):
    lines = "Who? (1) you (2) me\tme", "What (to do)? (A) go home (B) stay (C) run (fast)\trun (fast)"
    write_task(tmp_path, "quiz", "tsv", *lines)
    task = load_gym(tmp_path)["quiz"]
    assert task.kind == "multiple_choice"
    assert task.samples[0].dev == (
        Row("Who?", ("you", "me"), 1, whole="Who? (1) you (2) me"),
        Row(
            "What (to do)?",
            ("go home", "stay", "run (fast)"),
            2,
            whole="What (to do)? (A) go home (B) stay (C) run (fast)",
        ),
    )


def test_each_seed_has_its_own_test_file_or_all_share_one(tmp_path):
    write_task(tmp_path, "mood", "tsv", "a\tx", "b\ty", seeds=(13, 21))
    write(tmp_path / "mood/mood_16_21_test.tsv", "c\tx")
    assert [sample.test[0].input for sample in load_gym(tmp_path)["mood"].samples] == ["a", "c"]
    (tmp_path / "mood/mood_16_13_test.tsv").unlink()
    assert [sample.test[0].input for sample in load_gym(tmp_path)["mood"].samples] == ["c", "c"]
    (tmp_path / "mood/mood_16_21_test.tsv").unlink()
    assert [sample.test for sample in load_gym(tmp_path)["mood"].samples] == [(), ()]


def test_tasks_seeds_and_shots_can_be_chosen(tmp_path):
    for name in ("b", "a_2", "c"):
        write_task(tmp_path, name, "tsv", "x\tyes", "z\tno", seeds=(13, 21))
    write_task(tmp_path, "c", "txt", "no few-shot file")
    assert list(load_gym(tmp_path)) == ["a_2", "b", "c"]
    chosen = load_gym(tmp_path, tasks=["c", "a_2", "c"], seeds=[21])
    assert {name: [sample.seed for sample in task.samples] for name, task in chosen.items()} == {"a_2": [21], "c": [21]}
    with pytest.raises(InputError, match=r"no task 'd'; its tasks are 'a_2', 'b', 'c'"):
        load_gym(tmp_path, tasks=["a_2", "d"])
    with pytest.raises(InputError, match=r"b: no sample of seed 42; there are 13, 21"):
        load_gym(tmp_path, tasks=["b"], seeds=[13, 42])
    with pytest.raises(InputError, match=r"no file <task>_32_<seed>_train.* \(there are files of 16 shots\)"):
        load_gym(tmp_path, shots=32)


def test_the_order_of_the_classes_does_not_depend_on_the_samples_that_are_read(tmp_path):
    write_task(tmp_path, "mood", "jsonl", line("b", "b", "a"), seeds=(13,))
    write_task(tmp_path, "mood", "jsonl", line("b", "a", "b"), seeds=(21,))
    assert load_gym(tmp_path, seeds=[21])["mood"].samples[0].train == (Row("a text", ("b", "a"), 0),)


# --- what can be wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"mood_16_13_dev.jsonl: the file is empty"),
        ([line("a", "a", "b"), "{task"], r"mood_16_13_dev.jsonl:2: not valid JSON \("),
        ([line("a", "a", "b"), "", "{task"], r"mood_16_13_dev.jsonl:3: not valid JSON \("),
        (
            [line("a", "a", "b"), '{"a": ' + "[" * 100_000],
            r"mood_16_13_dev.jsonl:2: .* \(nested too deeply",
        ),
        (
            [line("a", "a", "b"), '{"a": ' + "9" * 5000],
            r"mood_16_13_dev.jsonl:2: .* \(a number is too long",
        ),
        ([line("a", "a", "b")[:-1] + ', "output": "b"}'], r"mood_16_13_dev.jsonl:1: two keys are named 'output'"),
        ([line("a", "a", "b", given="x\ud800")], r"mood_16_13_dev.jsonl:1: \\ud800 is a lone surrogate"),
        ([line("a", "a", "b\udfff")], r"mood_16_13_dev.jsonl:1: \\udfff is a lone surrogate"),
        ([line("a", "a", "b"), "[1]"], r"mood_16_13_dev.jsonl:2: expected a JSON object"),
        ([line("a", "a", "b"), line("c", "a", "b")], r"jsonl:2: the output 'c' is not among its options 'a', 'b'$"),
        (
            [line("a", "a", "b"), line("a", "a")],
            r"dev.jsonl:2: a row needs at least two different options; it has 'a'$",
        ),
        ([line("a", "a", "a")], r"dev.jsonl:1: a row needs at least two different options; it has 'a', 'a'$"),
        (
            [line("a", "a", "b"), line("a")],
            r"dev.jsonl:2: the row has no options, but .*_train.jsonl:1 has 2; give options to all rows of a task",
        ),
        ([line("a", "a", "b", task="mod")], r"dev.jsonl:1: a row of task 'mod' in a file of mood"),
        ([line("a", "a", "b", options="ab")], r"dev.jsonl:1: 'options' must be a list of strings"),
        (
            [line("a", "a", "b", input=1)],
            r"dev.jsonl:1: 'options' must be a list of strings, and all other fields strings",
        ),
        (
            ['{"task": "mood", "input": "x"}'],
            r"dev.jsonl:1: no field 'output', 'options'; each row needs 'task', 'input'",
        ),
    ],
)
def test_a_wrong_json_line_is_one_line_with_file_and_line(tmp_path, lines, message):
    write_task(tmp_path, "mood", "jsonl", line("a", "a", "b"))
    write(tmp_path / "mood/mood_16_13_dev.jsonl", *lines)
    with pytest.raises(InputError, match=message) as caught:
        load_gym(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"mood_16_13_train.tsv: the file is empty"),
        (["a\tx", "b\ty\tz", "c\t "], r"mood_16_13_train.tsv:3: an answer is empty; every right answer needs text"),
        (["a\tx", "b\ty\t"], r"mood_16_13_train.tsv:2: an answer is empty"),
        (["a\tx", "b"], r"mood_16_13_train.tsv:2: expected 2 columns separated by tabs, got 1"),
        (["a\tx"], r"mood_16_13_train.tsv:1: mood has only one output, 'x'"),
    ],
)
def test_a_wrong_tsv_line_is_one_line_with_file_and_line(tmp_path, lines, message):
    write(tmp_path / "mood_16_13_train.tsv", *lines)
    write(tmp_path / "mood_16_13_dev.tsv", "d\tw" if len(lines) == 3 else "d\tx")
    with pytest.raises(InputError, match=message) as caught:
        load_gym(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_output_that_is_not_among_the_options_of_a_tsv_line(tmp_path):
    write_task(tmp_path, "quiz", "tsv", "q (A) a (B) b\ta", "q (A) a (B) b\tc")
    with pytest.raises(InputError, match=r"quiz_16_13_\w+.tsv:2: the output 'c' is not among its options 'a', 'b'$"):
        load_gym(tmp_path)


def test_more_outputs_than_any_classification_task_has_are_texts(tmp_path):
    for name, outputs in (("long", 201), ("short", 200)):
        lines = [f"x\t{number // 2}" for number in range(2 * outputs)]
        write_task(tmp_path, name, "tsv", *lines, splits=("train", "dev"))
    write_task(tmp_path, "few", "tsv", "x\ta", "x\tb", splits=("train",))
    write_task(tmp_path, "few", "tsv", "x\tc", splits=("dev",))
    kinds = {name: task.kind for name, task in load_gym(tmp_path).items()}
    assert kinds == {"long": "text_to_text", "short": "classification", "few": "text_to_text"}


def test_missing_and_superfluous_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder; .* or builtin"):
        load_gym(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no few-shot task: no file <task>_16_<seed>_train.jsonl or .tsv$"):
        load_gym(tmp_path)
    write(tmp_path / "mood/mood_16_13_test.tsv", "a\tx", "b\ty")
    with pytest.raises(InputError, match=r"mood: mood has only a test file"):
        load_gym(tmp_path)
    write_task(tmp_path, "mood", "tsv", "a\tx", "b\ty", seeds=(13, 21))
    (tmp_path / "mood/mood_16_21_dev.tsv").unlink()
    with pytest.raises(InputError, match=r"mood: mood has files of seed 21, but no dev file"):
        load_gym(tmp_path)
    write_task(tmp_path, "mood", "tsv", "a\tx", "b\ty", seeds=(13, 21, 42))
    (tmp_path / "mood/mood_16_42_test.tsv").unlink()
    with pytest.raises(InputError, match=r"mood: mood has files of seed 42, but no test file"):
        load_gym(tmp_path)
    double = write(tmp_path / "mood_16_42_dev.jsonl", line("a", "a", "b"))
    with pytest.raises(InputError, match=r"mood_16_42_dev.jsonl: the same split as .*mood/mood_16_42_dev.tsv"):
        load_gym(tmp_path)
    double.rename(tmp_path / "mood/mood_16_42_test.jsonl")
    with pytest.raises(
        InputError, match=r"mood_16_42_test.jsonl: mood also has .tsv files; all files of a task must be"
    ):
        load_gym(tmp_path)
    (tmp_path / "mood/mood_16_42_test.jsonl").rename(tmp_path / "mood/mood_16_42_tst.jsonl")
    with pytest.raises(
        InputError, match=r"mood_16_42_tst.jsonl: not named like a few-shot file, <task>_<shots>_<seed>"
    ):
        load_gym(tmp_path)


def test_tasks_that_are_not_asked_for_may_be_anything(tmp_path):
    write_task(tmp_path, "mood", "tsv", "a\tx", "b\ty")
    write_task(tmp_path, "long", "tsv", "a")  # no output
    write_task(tmp_path, "flat", "jsonl", line("a", "a", task="flat"))  # one option
    write_task(tmp_path, "torn", "jsonl", "{")
    write(tmp_path / "half/half_16_13_train.tsv", "a\tx")
    write(tmp_path / "odd/notes.tsv", "no few-shot file")
    write(tmp_path / "twin_16_13_dev.jsonl", "{")
    write(tmp_path / "twin/twin_16_13_dev.tsv", "{")
    (tmp_path / "wait").mkdir()
    os.mkfifo(tmp_path / "wait/wait_16_13_train.tsv")
    assert list(load_gym(tmp_path, tasks=["mood"])) == ["mood"]
    assert task_names(tmp_path) == ["flat", "half", "long", "mood", "torn", "twin", "wait"]
    for name, message in {
        "long": "expected 2 columns",
        "flat": "two different options",
        "torn": "not valid JSON",
        "half": "no dev file",
        "twin": "the same split",
        "wait": "no dev file",
    }.items():
        with pytest.raises(InputError, match=message):
            load_gym(tmp_path, tasks=["mood", name])
    write(tmp_path / "mood/mood_16_21_trian.tsv", "a\tx")
    with pytest.raises(InputError, match=r"mood_16_21_trian.tsv: not named like a few-shot file"):
        load_gym(tmp_path, tasks=["mood"])


def test_files_that_are_none_and_hidden_ones(tmp_path):
    write_task(tmp_path, "mood", "tsv", "a\tx", "b\ty")
    write(tmp_path / "mood/._mood_16_13_train.tsv", "what a file manager leaves")
    write(tmp_path / ".cache/old_16_13_train.tsv", "")
    assert list(load_gym(tmp_path)) == ["mood"]
    (tmp_path / "mood/mood_16_13_test.tsv").unlink()
    os.mkfifo(tmp_path / "mood/mood_16_13_test.tsv")
    with pytest.raises(InputError, match=r"mood_16_13_test.tsv: not a regular file"):
        load_gym(tmp_path)


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", "a\udcff", "a\\b"])
def test_task_names_that_cannot_be_part_of_a_path(tmp_path, name):
    for split in SPLITS:
        write(tmp_path / f"{name}_16_13_{split}.tsv", "a\tx", "b\ty")
    write_task(tmp_path, "mood", "tsv", "a\tx", "b\ty")
    with pytest.raises(InputError, match="cannot be part of a path|not named like") as caught:
        load_gym(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    assert list(load_gym(tmp_path, tasks=["mood"])) == ["mood"]


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("glue-cola", "matthews_correlation"),
        ("glue-mnli", "accuracy"),
        ("google_wellformed_query", "accuracy"),
        ("kilt_fever", "accuracy"),
        ("onestop_english", "macro_f1"),
        ("tweet_eval-stance_atheism", "macro_f1"),
        ("paws", "macro_f1"),
        ("my-own", "accuracy"),
    ],
)
def test_metrics_are_those_of_crossfit(name, metric):
    assert task_metric(name) == metric and metric in METRICS
    rows = (Row("x", ("a", "b"), 0), Row("x", ("b", "a"), 0))
    assert build_task(name, [Sample(1, rows, rows)]).metric == metric
    assert FewShotTask(name, None, ()).metric == "accuracy"  # indices of options are no classes there


def test_macro_f1_is_the_mean_over_the_classes():
    predictions, labels = np.random.default_rng(0).integers(0, 3, (2, 60))
    scores = []
    for name in range(3):
        hits = np.sum((predictions == name) & (labels == name))
        scores.append(2 * hits / (np.sum(predictions == name) + np.sum(labels == name)))
    assert compute_metrics(["macro_f1"], predictions, labels)["macro_f1"] == pytest.approx(np.mean(scores))
    # The same over the texts of the answers, as CrossFit has them.
    names = np.array(["no", "yes", "maybe"])
    assert np.mean(scores) == pytest.approx(f1_score(names[labels], names[predictions], average="macro"))


# --- the real gym -----------------------------------------------------------------------------------------------------

OWN_OPTIONS = (
    "ai2_arc codah commonsense_qa openbookqa quarel quartz-no_knowledge quartz-with_knowledge social_i_qa "
    "superglue-copa wino_grande"
).split()


@needs_shared
def test_the_real_gym_is_read_as_it_is():
    gym, partition = load_partitioned_gym(SHARED, "metaicl")  # the folder holds other tasks too
    assert len(gym) == 46 and list(gym) == sorted(partition.names)
    assert [name for name, task in gym.items() if task.kind == "multiple_choice"] == OWN_OPTIONS
    assert {task.kind for task in gym.values()} == set(KINDS) - {"text_to_text"}
    for name, task in gym.items():
        assert [sample.seed for sample in task.samples] == [13, 21, 42, 87, 100]
        assert all(len(sample.train) == len(sample.dev) == 16 for sample in task.samples)
        assert bool(task.samples[0].test) == (name != "glue-qqp")
        for sample in task.samples:
            assert sample.test == task.samples[0].test
    metrics = collections.Counter(task.metric for task in gym.values())
    assert metrics == {"accuracy": 30, "macro_f1": 15, "matthews_correlation": 1}


@needs_shared
@pytest.mark.parametrize("name", ["emotion", "quarel"])
def test_rows_of_the_real_gym_say_what_their_lines_say(name):
    task = load_gym(SHARED, tasks=[name])[name]
    lines = (SHARED / name / f"{name}_16_42_dev.jsonl").read_text(encoding="utf-8").strip().split("\n")
    for row, text in zip(task.sample(42).dev, lines, strict=True):
        record = json.loads(text)
        assert (row.input, row.output, set(row.options)) == (record["input"], record["output"], set(record["options"]))
