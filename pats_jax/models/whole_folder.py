"""Folders that are written completely or not at all, such as a model with its tokenizer, or generated data."""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from pats_jax.core import files
from pats_jax.errors import InputError


@contextlib.contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """Yields an empty folder to write files to; these then replace the files of another folder in one step.

    Files there with other names are kept. If anything fails, the folder stays unchanged. A process that is killed
    meanwhile leaves a complete folder, old or new, under its name or as ``.NAME-...`` next to it.

    Args:
      directory: the folder to write; created if missing. A link is followed.

    Raises:
      InputError: if the folder cannot be written, for instance on a full or read-only disk.
    """
    target = Path(os.path.realpath(directory))
    files.make_folder(target.parent)
    made = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        made.mkdir()
        yield made
        _take_place(made, target)
    except InputError as error:
        raise InputError(str(error).replace(str(made), str(directory))) from None
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise InputError(f"{directory}: cannot be written ({reason})") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _take_place(made: Path, target: Path) -> None:
    if not target.exists():
        made.rename(target)
        return
    if not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    here = Path.cwd()
    shutil.copymode(target, made)
    old = made.with_name(f"{made.name}-old")
    target.rename(old)
    try:
        made.rename(target)
    except OSError:
        old.rename(target)
        raise
    for path in old.iterdir():
        if not os.path.lexists(target / path.name):
            path.rename(target / path.name)
    shutil.rmtree(old)
    if here.is_relative_to(target):
        os.chdir(here)


def _reason(error: Exception) -> str | None:
    """The system's message, which safetensors and tokenizers wrap in their own errors; None if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else None
