"""Partitions: the two that come with the project, CrossFit's layout, and all that can be wrong with one."""

import json
import os
from pathlib import Path

import pytest

from pats_jax.data.few_shot import Row, Sample, build_task
from pats_jax.data.gym import load_gym
from pats_jax.data.partitions import (
    FOLDER,
    Partition,
    load_partition,
    load_partitioned_gym,
    read_partition,
    source_set,
)
from pats_jax.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gym"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real few-shot gym is not at {SHARED}")
ROWS = (Row("x", ("yes", "no"), 0),)


def gym(*names: str, without_test: tuple[str, ...] = ()):
    return {name: build_task(name, [Sample(13, ROWS, ROWS, () if name in without_test else ROWS)]) for name in names}


def write(path: Path, text: str | dict) -> Path:
    path.write_text(text if isinstance(text, str) else json.dumps(text, indent=1), encoding="utf-8")
    return path


def test_crossfits_layout_is_read(tmp_path):
    lists = {"train": ["a", "b"], "dev": [], "test": ["c"], "all": ["a", "b", "c"]}
    path = write(tmp_path / "own.json", lists)
    partition = load_partition(path, gym("a", "b", "c", "d"))
    assert partition == Partition(("a", "b"), (), ("c",)) and partition.names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"own.json: the file is empty"),
        ('{"train": ["a"],\n "dev" []}', r"own.json: not valid JSON \(Expecting ':' delimiter, line 2\)"),
        ('{"train": ' + "[" * 100_000, r"own.json: not valid JSON \(nested too deeply\)"),
        ('{"train": ' + "9" * 5000 + "}", r"own.json: not valid JSON \(a number is too long\)"),
        ('{"train": ["a\x00"]}', r"own.json: not valid JSON \(Invalid control character"),
        ("null", r"own.json:1: expected a JSON object with the lists"),
        ('{"train": ["a"], "dev": [],\n "test": ["b"], "test": ["q"]}', r"own.json:1: two keys are named 'test'"),
        ('{"train": ["a"], "dev": [],\n "test": ["../b"]}', r"own.json:2: '../b' cannot be part of a path"),
        ('{"train": ["a"], "dev": [],\n "test": [""]}', r"own.json:2: '' cannot be part of a path"),
        ('{"train": ["a"], "dev": [],\n "test": ["b\\u0000"]}', r"'b\\x00' cannot be part of a path"),
        ('{"train": ["a"], "dev": [],\n "test": ["b\\ud800"]}', r"'b\\ud800' cannot be part of a path"),
        ('{"train": ["a"], "dev": [],\n "test": ["' + "b" * 100_000 + '"]}', r"own.json:2: 'b+'\.\.\. \(100000 char"),
        (
            '{"train": ["a"], "dev": [], "' + "k" * 100_000 + '": []}',
            r"own.json:1: unknown list 'k+'\.\.\. \(100000 ch",
        ),
        ('["a"]', r"own.json:1: expected a JSON object with the lists 'train', 'dev', 'test'"),
        ('{"train": ["a"],\n "test": ["b"]}', r"own.json:1: no list 'dev'; add it, as \[\] if it has no tasks"),
        ('{"train": ["a"], "dev": [],\n "test": []}', r"own.json:2: the list 'test' is empty"),
        ('{"train": [\n],\n "dev": [], "test": ["a"]}', r"own.json:1: the list 'train' is empty"),
        ('{"train": ["a"], "dev": [],\n "test": "b"}', r"own.json:2: 'test' is not a list of task names"),
        ('{"train": ["a"], "dev": [],\n "test": [["b"]]}', r"own.json:2: 'test' is not a list of task names"),
        ('{"train": ["a"], "dev": [], "test": ["b"],\n "tset": []}', r"own.json:2: unknown list 'tset'; the lists are"),
        (
            '{"train": ["a"], "dev": [],\n "test": ["b",\n "a"]}',
            r"own.json:3: the task a is listed in 'train' and in 'test'; remove one",
        ),
        ('{"train": ["a",\n "a"], "dev": [], "test": ["b"]}', r"own.json:2: the task a is listed twice in 'train'"),
        ('{"train": ["a",\n "z",\n "y"], "dev": [], "test": ["b"]}', r"own.json:2: the gym has no task 'z', 'y'$"),
        (
            '{"train": ["a"],\n "dev": ["q"], "test": ["b"]}',
            r"own.json:2: q has no test rows, so it can only be a train task",
        ),
        (
            '{"train": ["glue-rte", "n-1"], "dev": [],\n "test": ["superglue-rte",\n "n-2"]}',
            r"own.json:2: .* \(rte: glue-rte \(train\), superglue-rte \(test\); n: n-1 \(train\), n-2 \(test\)\); put",
        ),
    ],
)
def test_a_wrong_partition_is_one_line_with_file_and_line(tmp_path, text, message):
    tasks = gym("a", "b", "q", "glue-rte", "superglue-rte", "n-1", "n-2", without_test=("q",))
    with pytest.raises(InputError, match=message) as caught:
        load_partition(write(tmp_path / "own.json", text), tasks)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


def test_sources_may_be_shared_where_that_is_asked_for_or_within_a_list(tmp_path):
    tasks = gym("ethos-race", "ethos-gender", "imdb", "q", without_test=("q",))
    across = write(tmp_path / "across.json", {"train": ["ethos-race"], "dev": [], "test": ["ethos-gender"]})
    with pytest.raises(InputError, match=r"ethos: ethos-race \(train\), ethos-gender \(test\)"):
        load_partition(across, tasks)
    assert load_partition(across, tasks, share_sources=True).test == ("ethos-gender",)
    within = write(tmp_path / "in.json", {"train": ["ethos-race", "ethos-gender", "q"], "dev": [], "test": ["imdb"]})
    assert load_partition(within, tasks).train == ("ethos-race", "ethos-gender", "q")


def test_a_name_that_is_neither_a_file_nor_one_of_ours(tmp_path):
    with pytest.raises(InputError, match=r"^crossfit: no such file"):
        load_partition("crossfit", gym("a"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("glue-rte", "superglue-rte", True),
        ("quartz-no_knowledge", "quartz-with_knowledge", True),
        ("blimp-ellipsis_n_bar_1", "blimp-wh_questions_object_gap", True),
        ("tweet_eval-irony", "tweet_eval-emoji", True),
        ("glue-wnli", "superglue-wsc", True),
        ("glue-sst2", "rotten_tomatoes", True),
        ("yelp_polarity", "yelp_review_full", True),
        ("glue-mrpc", "glue-qqp", False),
        ("glue-mrpc", "paws", False),
        ("glue-cola", "superglue-copa", False),
        ("kilt_fever", "climate_fever", False),
    ],
)
def test_source_sets(one, other, same):
    assert (source_set(one) == source_set(other)) == same


def test_the_partition_of_the_built_in_gym_holds_all_of_its_tasks():
    gym = load_gym("builtin")
    partition = load_partition("builtin", gym)
    assert sorted(partition.names) == list(gym)
    assert len(partition.train) >= 16 and len(partition.test) >= 8
    for lists in (partition.train, partition.test):
        assert {gym[name].kind for name in lists} == {"classification", "multiple_choice"}


def test_the_partition_of_the_real_gym_is_wide_enough():
    partition = read_partition(FOLDER / "metaicl.json")
    assert len(partition.names) == 46 and len(partition.train) >= 24 and len(partition.test) >= 8 and partition.dev


def test_only_the_tasks_that_a_partition_names_are_read(tmp_path):
    for name in ("a", "b", "c"):
        for split in ("train", "dev", "test"):
            (tmp_path / f"{name}_16_13_{split}.tsv").write_text(
                "x\tyes\ny\tno\n" if name != "c" else "no few-shot file\n"
            )
    path = write(tmp_path / "own.json", {"train": ["a"], "dev": [], "test": ["b"], "all": ["a", "b", "c"]})
    gym, partition = load_partitioned_gym(tmp_path, path)
    assert list(gym) == ["a", "b"] and partition == Partition(("a",), (), ("b",))
    assert gym == load_gym(tmp_path, tasks=["a", "b"])
    write(path, {"train": ["a"], "dev": [], "test": ["b", "d"]})
    with pytest.raises(InputError, match=r"own.json:\d: the gym has no task 'd'"):
        load_partitioned_gym(tmp_path, path)
    write(path, {"train": ["a"], "dev": [], "test": ["c"]})
    with pytest.raises(InputError, match=r"c_16_13_train.tsv:1: expected 2 columns"):
        load_partitioned_gym(tmp_path, path)
    with pytest.raises(InputError, match=r"no few-shot task: no file <task>_32"):
        load_partitioned_gym(tmp_path, path, shots=32)


def test_the_built_in_gym_with_a_partition_of_some_of_its_tasks(tmp_path):
    names = FOLDER / "builtin.json"
    lists = json.loads(names.read_text())
    path = write(tmp_path / "own.json", {"train": lists["train"][:1], "dev": [], "test": lists["test"][:1]})
    gym, partition = load_partitioned_gym("builtin", path)
    assert sorted(gym) == sorted(partition.names)
    assert gym == load_gym("builtin", tasks=partition.names)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="pipe.json: not a regular file"):
        load_partitioned_gym("builtin", tmp_path / "pipe.json")


@needs_shared
def test_the_partition_of_the_real_gym_fits_it():
    gym, partition = load_partitioned_gym(SHARED, "metaicl")
    assert sorted(partition.names) == list(gym)
