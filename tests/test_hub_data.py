"""GLUE and other data sets of the hub: local data sets stand in for it, or the network is gone."""

import datasets
import numpy as np
import pytest

from pats_jax.data import readers
from pats_jax.data.readers import load_task, read_hub
from pats_jax.data.tasks import TASKS
from pats_jax.errors import InputError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for ``nyu-mll/glue``: real datasets of parquet files in local folders, one a configuration."""
    load_dataset = datasets.load_dataset

    def add(task, **splits):
        for split, columns in splits.items():
            names = TASKS[task].labels
            label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
            features = {name: datasets.Value("string") for name in TASKS[task].hub_texts}
            features |= {"label": label, "idx": datasets.Value("int32")}
            data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            data.to_parquet(tmp_path / task / f"{split}-00000-of-00001.parquet")

    def local(path, name):
        assert path == "nyu-mll/glue"
        files = {file.name.split("-")[0]: str(file) for file in (tmp_path / name).iterdir()}
        return load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(readers, "reaches_hub", lambda path: True)
    return add


def test_the_hub_gives_the_same_shape_and_hides_test_labels_as_minus_one(hub):
    columns = {"question1": ["a", "b"], "question2": ["c", "d"], "label": [1, 0], "idx": [0, 1]}
    hub("qqp", train=columns, validation=columns, test={**columns, "label": [-1, -1], "idx": [10, 11]})
    splits = load_task("qqp", splits=["train", "test"])
    assert splits.keys() == {"train", "test"}
    assert (splits["train"].sentence1, splits["train"].sentence2) == (["a", "b"], ["c", "d"])
    assert splits["train"].labels.tolist() == [1, 0] and splits["train"].labels.dtype == np.int32
    assert splits["test"].labels is None and splits["test"].ids == ["10", "11"]


def test_the_hub_calls_the_texts_and_splits_of_mnli_otherwise(hub):
    columns = {"premise": ["p"], "hypothesis": ["h"], "label": [2], "idx": [0]}
    hub("mnli", train=columns, validation_matched=columns, validation_mismatched={**columns, "premise": ["mm"]})
    splits = read_hub("mnli")
    assert {name: split.sentence1 for name, split in splits.items()} == {
        "train": ["p"],
        "validation": ["p"],
        "validation_mismatched": ["mm"],
    }
    assert splits["train"].sentence2 == ["h"] and splits["train"].labels.tolist() == [2]


def test_scores_and_single_texts_from_the_hub(hub):
    hub("stsb", train={"sentence1": ["a"], "sentence2": ["b"], "label": [2.5], "idx": [0]})
    hub("sst2", train={"sentence": ["a"], "label": [1], "idx": [0]})
    assert read_hub("stsb", splits=["train"])["train"].labels.tolist() == [2.5]
    assert read_hub("sst2", splits=["train"])["train"].sentence2 is None


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub\nand more"),
        ValueError("Couldn't find cache for nyu-mll/glue for config 'rte'"),
        RuntimeError(),
    ],
)
def test_without_a_network_the_ways_to_work_offline_are_named(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(readers, "reaches_hub", lambda path: True)
    with pytest.raises(InputError, match=r"data_dir to builtin .*TSV files, or set HF_HUB_OFFLINE=1") as caught:
        load_task("rte")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_hub_is_asked_once_and_the_cache_is_looked_in(monkeypatch, tmp_path):
    """By the real libraries: no name is found, and neither waits to ask again."""
    import socket
    import time

    def nowhere(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    before, started = datasets.config.HF_HUB_OFFLINE, time.perf_counter()
    with pytest.raises(InputError, match=r"nyu-mll/glue could not be .* \(it does not answer, and the cache"):
        load_task("rte")
    assert time.perf_counter() - started < 10
    assert datasets.config.HF_HUB_OFFLINE == before


def test_a_hub_set_with_some_labels_hidden_is_refused(hub):
    hub("sst2", train={"sentence": ["a", "b"], "label": [1, -1], "idx": [0, 1]})
    with pytest.raises(InputError, match=r"nyu-mll/glue, sst2: row 1 has no label .-1., but others do"):
        read_hub("sst2", splits=["train"])
