"""CrossFit's 160 tasks: the table, the eight partitions, files as its scripts write them, its way to sample."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest

from pats_jax.data.crossfit import ANSWER_METRICS, crossfit_tasks
from pats_jax.data.few_shot import Row, Sample, build_task
from pats_jax.data.gym import load_gym
from pats_jax.data.partitions import CROSSFIT, FOLDER, load_partition, read_partition
from pats_jax.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gym"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real few-shot gym is not at {SHARED}")
SEEDS = (100, 13, 21, 42, 87)
SIZES = [(120, 20, 20), *[(45, 10, 10)] * 2, (42, 0, 9), (29, 0, 22), (56, 0, 8), (45, 10, 10), (61, 0, 4)]


def test_the_table_has_the_papers_numbers():
    """Counts of the paper's categories, of the metrics in its code, and of the two ways to sample."""
    tasks = crossfit_tasks().values()
    assert list(crossfit_tasks()) == sorted(crossfit_tasks(), key=str) and len(tasks) == 160
    categories = collections.Counter(task.category for task in tasks)
    assert categories == {"classification": 65, "qa": 51, "other": 31, "conditional generation": 13}
    metrics = collections.Counter(task.metric for task in tasks)
    assert [metrics[name] for name in ANSWER_METRICS] == [28, 51, 9, 51, 1, 3, 17, 0]
    assert collections.Counter(task.shots for task in tasks) == {16: 82, 32: 78}
    groups = collections.Counter(task.group for task in tasks)
    assert (groups["nli"], groups["multiple choice"], groups["closed-book"], groups["emotion"]) == (9, 23, 14, 13)
    assert all("{" in task.input for task in tasks)


def test_formats_are_those_of_the_real_files():
    """Texts of named parts begin and go on as the table says."""
    assert crossfit_tasks()["piqa"].input == "goal: {goal} [SEP] solution 1{solution 1} [SEP] solution 2{solution 2}"
    if not SHARED.is_dir():
        pytest.skip(f"the real few-shot gym is not at {SHARED}")
    checked = 0
    for name, task in load_gym(SHARED).items():
        row = task.samples[0].train[0]
        parts = [part.split("{")[0] for part in crossfit_tasks()[name].input.split(" [SEP] ")]
        if task.kind == "multiple_choice" or not all(parts):  # MetaICL writes multiple choice its own way
            continue
        found = row.input.split(" [SEP] ")
        assert all(text.startswith(part) for text, part in zip(found, parts, strict=False)), (name, row.input)
        checked += len(found) >= len(parts)
    assert checked > 25


@pytest.mark.parametrize(
    ("name", "sizes"),
    [*zip(CROSSFIT, SIZES, strict=True)],
)
def test_the_eight_partitions(name, sizes):
    partition = read_partition(FOLDER / f"{name}.json")
    assert tuple(map(len, (partition.train, partition.dev, partition.test))) == sizes
    assert set(partition.names) <= crossfit_tasks().keys() and len(set(partition.names)) == len(partition.names)
    assert partition.leaks == (("sick",) if name == "train_non_nli_test_nli" else ())
    groups = {crossfit_tasks()[task].group for task in partition.test}
    of_one_group = {"nli": "nli", "paraphrase": "paraphrase", "choice": "multiple choice"}
    for end, group in of_one_group.items():
        if name.endswith(end):
            assert groups == {group}


def test_the_three_for_classification_share_dev_and_test():
    three = [
        read_partition(FOLDER / f"train_{name}_test_classification.json")
        for name in ("classification", "halfhalf", "nonclassification")
    ]
    assert len({(one.dev, one.test) for one in three}) == 1
    shares = [np.mean([crossfit_tasks()[task].category == "classification" for task in one.train]) for one in three]
    assert shares[0] == 1 and 0.4 < shares[1] < 0.6 and shares[2] == 0
    assert sorted(read_partition(FOLDER / "random.json").names) == list(crossfit_tasks())


def test_a_leak_is_named_and_its_task_a_target_only(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"train": ["a", "b"], "dev": [], "test": ["b"], "leaks": ["b"]}))
    rows = (Row("x", ("yes", "no"), 0),)
    partition = load_partition(path, {name: build_task(name, [Sample(13, rows, rows, rows)]) for name in "ab"})
    assert (partition.train, partition.test, partition.leaks) == (("a",), ("b",), ("b",))
    path.write_text(json.dumps({"train": ["a"], "dev": [], "test": ["b"], "leaks": ["b"]}))
    with pytest.raises(InputError, match=r"own.json:1: the leak 'b' must be listed in 'train' and in 'test'$"):
        read_partition(path)


# files as CrossFit's scripts write them


def write_crossfits_way(folder, task, rows, shots, test):
    """Its rules: rows shuffled by NumPy's generator of the seed; by output or all together, the first for training."""
    for seed in SEEDS:
        np.random.seed(seed)
        shuffled = list(rows)
        np.random.shuffle(shuffled)
        groups = collections.defaultdict(list)
        for row in shuffled:
            groups[row[1] if shots == 16 else None].append(row)
        parts = {
            "train": [row for group in groups.values() for row in group[:shots]],
            "dev": [row for group in groups.values() for row in group[shots : 2 * shots]],
            "test": test,
        }
        for split, own in parts.items():
            path = folder / task / f"{task}_{shots}_{seed}_{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join("\t".join(row) + "\n" for row in own), encoding="utf-8")


def test_crossfits_files(tmp_path):
    """A task of each kind; those of 32 shots are read with those of 16."""
    labels = ("negative", "neutral", "positive")
    classes = [(f'say "{number}"', labels[number % 3]) for number in range(150)]
    write_crossfits_way(tmp_path, "financial_phrasebank", classes, 16, classes[:9])
    several = [(f"question {number}", f"one {number}", *[f"two {number}"] * (number % 2)) for number in range(90)]
    write_crossfits_way(tmp_path, "web_questions", several, 32, several[:7])
    choices = [
        (f"Why {number}? (A) a{number} (B) b [SEP] As {number} (x).", f"a{number}" if number % 2 else "b")
        for number in range(80)
    ]
    write_crossfits_way(tmp_path, "social_i_qa", choices, 32, choices[:5])
    close = [(f"Why {number}?(A)a{number}(B)b [SEP] As.", "b") for number in range(70)]
    write_crossfits_way(tmp_path, "quail", close, 32, close[:5])
    gym = load_gym(tmp_path)
    kinds = {name: task.kind for name, task in gym.items()}
    assert kinds == {
        "financial_phrasebank": "classification",
        "quail": "multiple_choice",
        "social_i_qa": "multiple_choice",
        "web_questions": "text_to_text",
    }
    assert all(task.is_crossfits_sampling for task in gym.values())
    assert [len(sample.train) for sample in gym["financial_phrasebank"].samples] == [48] * 5
    assert [len(sample.dev) for sample in gym["web_questions"].samples] == [32] * 5
    for name, rows in (("web_questions", several), ("financial_phrasebank", classes)):
        answers = {row[0]: row[1:] for row in rows}
        for sample in gym[name].samples:
            assert all(row.right_answers == answers[row.input] for row in (*sample.train, *sample.dev, *sample.test))
    row = gym["social_i_qa"].samples[0].test[1]
    assert row == Row("Why 1? [SEP] As 1 (x).", ("a1", "b"), 0, whole="Why 1? (A) a1 (B) b [SEP] As 1 (x).")
    assert gym["quail"].samples[0].test[2].options == ("a2", "b")


def test_a_class_too_small_is_still_crossfits_sampling(tmp_path):
    """Ten rows of a class are all in train; with some of them in dev it is not how CrossFit draws."""
    rows = [(f"text {number}", "rare" if number < 10 else "common") for number in range(60)]
    write_crossfits_way(tmp_path, "emo", rows, 16, rows[:3])
    task = load_gym(tmp_path)["emo"]
    assert task.is_crossfits_sampling and [len(sample.dev) for sample in task.samples] == [16] * 5
    path = next(tmp_path.glob("emo/*_13_dev.tsv"))
    path.write_text(path.read_text() + "text 1\trare\n")
    assert load_gym(tmp_path)["emo"].is_crossfits_sampling is False


def test_of_a_task_with_one_answer_two_are_refused(tmp_path):
    rows = [(f"text {number}", "yes" if number % 2 else "no") for number in range(80)]
    write_crossfits_way(tmp_path, "boolq", [*rows[:-1], ("text", "yes", "no")], 16, rows[:3])
    with pytest.raises(InputError, match=r"boolq_16_\d+_\w+.tsv:\d+: 2 answers, but boolq has one in a row"):
        load_gym(tmp_path)


def test_texts_that_crossfit_scores_as_texts_have_no_options(tmp_path):
    """However few there are, and whatever ends the input."""
    rows = [(f"Why {number}? (A) a (B) b", "because") for number in range(70)]
    write_crossfits_way(tmp_path, "cos_e", [*rows, ("Why? (A) a (B) b", "so")], 32, rows[:3])
    task = load_gym(tmp_path)["cos_e"]
    assert (task.kind, task.answer_metric) == ("text_to_text", "rouge_l")
    assert task.samples[0].test[0] == Row("Why 0? (A) a (B) b", (), 0, ("because",))


@needs_shared
def test_the_real_gym_is_not_crossfits_sampling():
    gym = load_gym(SHARED, tasks=["ag_news", "xsum", "wikisql", "superglue-copa"])
    assert {name: (task.kind, task.answer_metric) for name, task in gym.items()} == {
        "ag_news": ("classification", "macro_f1"),
        "superglue-copa": ("multiple_choice", "accuracy"),
        "wikisql": ("text_to_text", "exact_match"),
        "xsum": ("text_to_text", "rouge_l"),
    }
    assert not any(task.is_crossfits_sampling for task in gym.values())
    assert load_gym("builtin", tasks=["film_opinion"])["film_opinion"].is_crossfits_sampling is None
