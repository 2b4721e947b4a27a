"""The Hugging Face hub: a finished run's model as a repository, by ``--push_to_hub``.

Only the files of the model, or of the adapter, and a card are uploaded: no checkpoints, no data, no settings that name
files, no predictions. The token is the one that `huggingface_hub` finds: of ``hf auth login``, or in ``HF_TOKEN``.
"""

import pathlib
from collections.abc import Callable

import rich.console

from pats_jax.errors import InputError, shown
from pats_jax.reporting.console import say
from pats_jax.run import model_card, run_folder
from pats_jax.run.settings import TrainingSettings

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a model's folder, as save_pretrained writes it
_NOT_THESE = ("text_estimator.json",)  # what an estimator keeps besides, which has paths


def check_ready(repo_id: str | None, source: str, token: str | None = None) -> None:
    """Checks what can be known before an upload; asks nothing of the network.

    Args:
      repo_id: the repository; None: not known yet.
      source: what to call the upload in messages.
      token: of the hub; None: the one that `huggingface_hub` finds.

    Raises:
      InputError: if there is no token, the repository cannot have this name, or the hub is switched off.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError(f"{source}: HF_HUB_OFFLINE is set; unset it to upload")
    if repo_id is not None:
        try:
            huggingface_hub.utils.validate_repo_id(repo_id)
        except HFValidationError:
            raise InputError(f"{source}: {shown(repo_id)} cannot name a repository; write USER/NAME") from None
    if (token or huggingface_hub.get_token()) is None:
        raise InputError(f"{source}: no token of the hub; run `hf auth login`, or set HF_TOKEN")


def publish(settings: TrainingSettings, folder: pathlib.Path, console: rich.console.Console) -> None:
    """Uploads the model of a finished run, if ``--push_to_hub`` asks for it.

    Args:
      settings: of the run.
      folder: the run's folder.
      console: where the repository's address goes.

    Raises:
      InputError: if the hub refuses it or cannot be reached; the run itself is complete.
    """
    if not settings.hub.push_to_hub:
        return
    results = run_folder.read_results(folder)
    parts = [folder / name for name in ("model", "adapter") if (folder / name).is_dir()]
    if results is None or not parts:
        raise InputError(f"--push_to_hub: {folder} has no model to upload")
    paths = [flag for flag, entry in settings.all_entries().items() if entry.about.is_path]
    name = settings.hub.hub_model_id or folder.absolute().name

    def card(repo_id: str) -> str:
        whole = parts[0].name == "model"
        return model_card.for_hub(repo_id, settings.to_dict(), results, settings.defaults(), whole=whole, paths=paths)

    try:
        address = push(parts[0], card, name, private=settings.hub.hub_private_repo)
    except InputError as error:
        raise InputError(f"--push_to_hub: {error}; the run is complete in {folder}: repeat it with --resume") from None
    say(console, f"uploaded to {address}")


def push(
    source: pathlib.Path,
    card: Callable[[str], str],
    name: str,
    *,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Uploads a model's folder with a card, in one commit; creates the repository if there is none.

    Args:
      source: the folder; of its files those of a model are uploaded.
      card: ``card(repo_id)``, the text of README.md.
      name: the repository, ``USER/NAME``, or ``NAME`` for the token's owner.
      private: whether a new repository is private; None: as the account says.
      token: of the hub; None: the one that `huggingface_hub` finds.

    Returns:
      The repository's address.

    Raises:
      InputError: if the hub refuses it, or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    files = sorted({path for pattern in _FILES for path in source.glob(pattern) if path.name not in _NOT_THESE})
    api = huggingface_hub.HfApi(library_name="pats-jax", token=token)
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        added = [huggingface_hub.CommitOperationAdd(path.name, path) for path in files]
        added.append(huggingface_hub.CommitOperationAdd("README.md", card(made.repo_id).encode()))
        api.create_commit(made.repo_id, added, commit_message="Upload model")
    except HfHubHTTPError as error:
        told = error.server_message or str(error).partition("\n")[0]
        raise InputError(f"the hub refused {shown(name)}: {shown(told, 200, quoted=False)}") from None
    except (HTTPError, OSError) as error:
        raise InputError(f"the hub cannot be reached: {shown(str(error), 200, quoted=False)}") from None
    return str(made)
