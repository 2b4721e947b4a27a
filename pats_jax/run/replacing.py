"""``--overwrite``: what it may replace, and how the previous run is kept until the new one is finished.

Only a run of this library is replaced: the folder's config.json identifies it, and every file has a name that runs
write. It is renamed to ``FOLDER.previous``, and removed when the new run has written its results.json.
"""

import contextlib
import logging
import os
import pathlib
import re
import shutil
import stat
from collections.abc import Iterable, Iterator

from pats_jax.core import files
from pats_jax.core.settings import Composed
from pats_jax.data.tasks import TASKS
from pats_jax.errors import InputError
from pats_jax.run import folder_lock

logger = logging.getLogger(__name__)

_MARK = ".replaced"  # in a FOLDER.previous that --overwrite made
_CONFIG, _RESULTS, _CARD = "config.json", "results.json", "README.md"
_OF_EVERY_CONFIG = {"model_name_or_path", "method", "seed"}  # of ours, in all versions
_FIRST_OF_CARDS = "Trained by `pats-jax "

_TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt "
    "sentencepiece.bpe.model spiece.model chat_template.jinja"
)
_PREDICTIONS = [file for task in TASKS.values() for file in task.prediction_files.values()]


def _any_of(names: Iterable[str]) -> str:
    return "(" + "|".join(map(re.escape, names)) + ")"


# Paths in a run's folder; any may end in .new, half-written. What Orbax writes in a checkpoint depends on its version,
# so names there are held to its manner only.
_FILES = [
    _any_of((_CONFIG, _RESULTS, _CARD, "metrics.jsonl", folder_lock.LOCK, _MARK)),
    rf"(model|\.model-[^/]+)/{_any_of((_CONFIG, 'model.safetensors', 'generation_config.json', *_TOKENIZER.split()))}",
    r"(adapter|\.adapter-[^/]+)/"
    + _any_of((_CONFIG, "adapter_config.json", "adapter_model.safetensors", *_TOKENIZER.split())),
    rf"predictions/(probabilities/)?{_any_of((*_PREDICTIONS, 'validation.tsv', 'test.tsv'))}",
    r"diagnosis/(classes|confusion|reliability|largest_losses|largest_residuals|validation)\.tsv",
    r"plots/(loss|score|sensitivity|confusion|reliability|residuals)\.png",
    r"checkpoints/([\w.-]+/)+(_\w+|metadata|metrics|record\.json|descriptor\.pbtxt|commit_success\.txt|manifest\.ocdbt|process_\d+"
    r"|d/[0-9a-f]+)(\.__lock)?",
    r"tensorboard/events\.out\.tfevents\.[^/]+",
    r"profile/plugins/profile/[^/]+/[^/]+\.(pb|json|gz)",
]
_FOLDERS = [
    r"model|\.model-[^/]+|adapter|\.adapter-[^/]+|predictions(/probabilities)?|diagnosis|plots|tensorboard",
    r"checkpoints(/[\w.-]*\d[\w.-]*(/.+)?)?",
    r"profile(/plugins(/profile(/[^/]+)?)?)?",
]
_IS_FILE, _IS_FOLDER = re.compile(f"({'|'.join(_FILES)})(\\.new)?"), re.compile("|".join(_FOLDERS))


# what may be replaced


def contents(folder: pathlib.Path) -> list[str]:
    """The names in a folder, except those that a run may leave before it begins; empty if there is no folder."""
    passing = (folder_lock.LOCK, f"{_CONFIG}.new")
    return sorted(path.name for path in folder.iterdir() if path.name not in passing) if folder.exists() else []


def foreign(folder: pathlib.Path, entries: Iterable[str] | None = None) -> str | None:
    """The first path in a folder that no run wrote, judged by its name (a model card by its text); else None.

    Args:
      folder: the folder.
      entries: check only these entries.

    Raises:
      OSError: if a folder in it cannot be read.
    """
    for path in map(folder.joinpath, sorted(os.listdir(folder) if entries is None else entries)):
        for each in (path, *_below(path)):
            name, mode = each.relative_to(folder).as_posix(), each.lstat().st_mode  # a link is neither file nor folder
            known = _IS_FOLDER if stat.S_ISDIR(mode) else _IS_FILE
            regular = stat.S_ISDIR(mode) or stat.S_ISREG(mode)
            if not (regular and known.fullmatch(name)) or (name == _CARD and not _is_card(each)):
                return name
    return None


def check(folder: pathlib.Path) -> None:
    """Raises InputError unless the folder contains a run of this library and nothing else, and can be replaced."""
    where, previous = f"--output_dir {folder}: --overwrite", _previous(folder)
    if pathlib.Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{where} cannot replace the current folder; run it from elsewhere")
    if folder.is_symlink():
        raise InputError(f"{where} cannot replace a link; use its target, {os.path.realpath(folder)}")
    try:
        if not _is_run(folder):
            raise InputError(
                f"{where} would delete {contents(folder)[0]}, which no run wrote: the folder has no {_CONFIG} of a run"
            )
        name = foreign(folder)
        if name is not None:
            raise InputError(f"{where} would delete {name}, which no run wrote; move it elsewhere")
        if os.path.lexists(previous) and (kept(folder) is None or foreign(previous) is not None):
            raise InputError(f"{where} needs the name {previous}, which is already in use; move that elsewhere")
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if not os.access(previous.parent, os.W_OK | os.X_OK):
        raise InputError(f"{where} renames the run, but there is no permission to write to {previous.parent}")


def check_inputs(folder: pathlib.Path, settings: Composed) -> None:
    """Raises InputError if a run reads files in the folder that it replaces, following links."""
    homes = [path.resolve() for path in (folder, kept(folder)) if path is not None]
    for flag, path in _inputs(settings):
        home = next((home for home in homes if any(place.is_relative_to(home) for place in _places(path))), None)
        if home:
            raise InputError(f"--{flag} {path}: is in {home}, which --overwrite replaces; choose another --output_dir")


def _inputs(settings):
    """Flag and path of everything that a run reads; names that are not paths do no harm."""
    known = settings.all_entries()
    for name, value in settings.flat().items():
        if value and known[name].about.is_path and not known[name].about.free_on_resume:
            path = pathlib.Path(value)
            with contextlib.suppress(RuntimeError):  # there is no such user
                path = path.expanduser()
            yield name, path
            base = _base_of_adapter(path) if name == "model_name_or_path" else None
            if base:
                yield f"{name} {path}: its base model", pathlib.Path(base)


def _base_of_adapter(folder):
    try:
        values = files.read_json(folder / "adapter_config.json")
    except InputError:
        return None
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    return base if isinstance(base, str) and "\0" not in base else None


def _places(path):
    """The real places of an input: its own, and the targets of links in it, as deep as data and models go."""
    links = (found for pattern in ("*", "*/*") for found in path.glob(pattern) if found.is_symlink())
    with contextlib.suppress(OSError, ValueError):
        for each in (path, *(links if path.is_dir() else ())):
            with contextlib.suppress(RuntimeError):  # a circle of links
                yield each.resolve()


def _is_run(folder):
    """Whether config.json is a run's rather than a model's."""
    try:
        values = files.read_json(folder / _CONFIG)
    except InputError:
        return False
    return isinstance(values, dict) and values.keys() >= _OF_EVERY_CONFIG


def _is_card(path):
    try:
        text = files.read_bytes(path).decode("utf-8", "replace")
    except InputError:
        return False
    return any(line.startswith(_FIRST_OF_CARDS) for line in text.splitlines()) and "\n## Repeat\n" in text


def _below(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Everything below a folder, links not followed."""

    def fail(error):
        raise error

    if path.is_dir() and not path.is_symlink():
        for home, folders, names in os.walk(path, onerror=fail):
            yield from (pathlib.Path(home, name) for name in (*folders, *names))


# how it is replaced


def set_aside(folder: pathlib.Path) -> pathlib.Path | None:
    """Moves the run out of a folder that `check` has approved; the folder is then missing or empty.

    If an earlier ``FOLDER.previous`` is finished and this run is not, the former stays and this run is removed.

    Returns:
      The new place of this run; None if it was removed.

    Raises:
      InputError: if the system refuses; everything is then unchanged.
    """
    previous = _previous(folder)
    if is_finished(previous) and not is_finished(folder):
        _empty(folder)
        return None
    try:
        if previous.exists():
            _remove(previous)
        (folder / _MARK).touch()
        folder.rename(previous)
    except OSError as error:
        with contextlib.suppress(OSError):
            (folder / _MARK).unlink()
        raise InputError(f"--output_dir {folder}: --overwrite cannot rename it ({error.strerror})") from None
    return previous


def put_back(folder: pathlib.Path, previous: pathlib.Path | None) -> None:
    """Undoes `set_aside` if the new run could not begin."""
    if previous is None:
        return
    try:
        for name in (f"{_CONFIG}.new", _CONFIG, folder_lock.LOCK):
            (folder / name).unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()
        previous.rename(folder)
        for name in (_MARK, folder_lock.LOCK):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the run from %s is now in %s (%s)", folder, previous, error.strerror)


def kept(folder: pathlib.Path) -> pathlib.Path | None:
    """The run that this one replaces, if it still exists."""
    previous = _previous(folder)
    return previous if (previous / _MARK).is_file() and not previous.is_symlink() else None


def discard(folder: pathlib.Path) -> None:
    """Removes the run that a finished one has replaced; warns of files that cannot be removed."""
    previous = kept(folder)
    if previous is None:
        return
    try:
        name = foreign(previous)
        if name is not None:
            raise InputError(f"no run wrote {name}")
        _remove(previous)
    except (InputError, OSError) as error:
        logger.warning("the previous run is kept in %s: %s", previous, error)


def keep_for_good(folder: pathlib.Path) -> None:
    """Marks a run that ``--overwrite`` has set aside as one to keep."""
    with contextlib.suppress(OSError):
        (folder / _MARK).unlink()


def is_finished(folder: pathlib.Path) -> bool:
    """Whether the run in a folder has written its results.json."""
    return (folder / _RESULTS).is_file()


def _previous(folder):
    folder = folder.absolute()
    if not folder.name or folder.name == "..":
        folder = folder.resolve()
    return folder.with_name(f"{folder.name}.previous")


def _remove(folder):
    """Removes a run and its folder."""
    with folder_lock.FolderLock(folder):
        _empty(folder)
        shutil.rmtree(folder)


def _empty(folder):
    """Removes a run: results.json first, config.json last, so a kill leaves a recognisable unfinished run."""
    last = [_CONFIG, _MARK, folder_lock.LOCK]
    (folder / _RESULTS).unlink(missing_ok=True)
    names = [path.name for path in folder.iterdir() if path.name not in last]
    for path in map(folder.joinpath, (*names, _CONFIG)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
