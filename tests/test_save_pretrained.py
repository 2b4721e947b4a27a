"""`save_pretrained`: a saved folder is the checkpoint again, whole or not at all."""

import json
from pathlib import Path

import pytest
from test_pretrained import FIXTURES, KINDS, assert_same_tensors, stored, write

from pats_jax.models import from_pretrained, save_pretrained


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_is_the_checkpoint_again(kind, tmp_path):
    tensors, config = stored(kind)
    unknown = {"my_own_key": {"a": [1, 2]}, "position_embedding_type": "absolute", "num_labels": 3, "dtype": "float16"}
    labels = {"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
    folder = write(tmp_path / "in", tensors, config | unknown | labels)
    model, params, config = from_pretrained(folder, num_labels=3, hidden_dropout=0.3)
    save_pretrained(tmp_path / "deep" / "out", params=params, config=config)
    saved = json.loads((tmp_path / "deep" / "out" / "config.json").read_text())
    assert saved["my_own_key"] == {"a": [1, 2]}
    assert saved["hidden_dropout_prob"] == 0.3
    assert saved["dtype"] == "float32"
    assert saved["id2label"] == labels["id2label"] and saved["label2id"] == labels["label2id"]
    again, params, same_config = from_pretrained(tmp_path / "deep" / "out", num_labels=None)
    assert_same_tensors(params, tensors)
    assert again.config.id2label == model.config.id2label
    assert same_config.to_dict() == config.to_dict()


def test_saving_into_an_existing_folder_replaces_its_files(tmp_path):
    tensors, config = stored("bert")
    (write(tmp_path, tensors, config) / "notes.txt").write_text("keep")
    _, params, config = from_pretrained(tmp_path, num_labels=3)
    params["classifier"]["bias"] = params["classifier"]["bias"] + 1
    save_pretrained(tmp_path, params=params, config=config)
    _, params, _ = from_pretrained(tmp_path, num_labels=3)
    assert_same_tensors(params, tensors | {"classifier.bias": tensors["classifier.bias"] + 1})
    assert (tmp_path / "notes.txt").read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


class BrokenTokenizer:
    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("half")
        raise OSError("disk full")


def test_nothing_half_written_remains(tmp_path):
    _, params, config = from_pretrained(FIXTURES / "bert", num_labels=3)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tmp_path / "out", params=params, config=config, tokenizer=BrokenTokenizer())
    assert not list(tmp_path.iterdir())


def test_parameters_that_do_not_fit_the_config(tmp_path):
    _, params, config = from_pretrained(FIXTURES / "bert", num_labels=3)
    params["classifier"]["kernel"] = params["classifier"]["kernel"][:, :2]
    with pytest.raises(ValueError, match="classifier/kernel"):
        save_pretrained(tmp_path / "out", params=params, config=config)
    del params["classifier"]
    with pytest.raises(ValueError, match="classifier/bias"):
        save_pretrained(tmp_path / "out", params=params, config=config)
    assert not list(tmp_path.iterdir())
