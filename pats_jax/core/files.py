"""Checked reading of files from outside, and atomic writing of our own.

The library reads every JSON file with `read_json` or `read_record`, and replaces every file with `write_bytes`,
`write_text` or `write_json`. For invalid content and for failures of the system, all of them raise a one-line
`InputError` that names the file.
"""

import contextlib
import errno
import functools
import io
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pats_jax.errors import InputError, shown

AnyRecord = TypeVar("AnyRecord")
JsonObject = dict[str, Any]  # what a JSON file holds; a record (`read_record`) says more where programs read it

_NEW = ".new"  # the ending of a file that is being written


# reading


class NoSuchFile(InputError):
    """The file does not exist, as opposed to a failure of the system."""


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader]:
    """Opens a regular file to read bytes; follows links, and never waits for pipes or devices.

    Raises:
      InputError: if the file does not exist (`NoSuchFile`), is not a regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would block
    except (FileNotFoundError, NotADirectoryError):
        raise NoSuchFile(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{shown(str(path))}: not a path: it contains a null byte") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        reason = f"cannot be read ({os.strerror(errno.EISDIR)})" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{path}: {reason}")
    with open(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Reads the bytes of a regular file.

    Raises:
      InputError: as from `opened`.
    """
    with opened(path) as file:
        return file.read()


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; use `read_record` for a known structure.

    Raises:
      InputError: as from `read_bytes`; or if the file is not UTF-8 or JSON, is nested too deeply, or contains a number
        with thousands of digits.
    """
    return parse_json(read_bytes(path), str(path))


def parse_json(text: str | bytes, source: str, object_pairs_hook: Callable[[list], Any] | None = None) -> Any:
    """Parses a JSON text; error messages call it ``source``, such as ``FILE`` or ``FILE:LINE``.

    The hook is that of `json.loads`.

    Raises:
      InputError: as from `read_json`.
    """
    try:
        return _decode(object_pairs_hook)(text) if object_pairs_hook else json.loads(text)
    except json.JSONDecodeError as error:
        place = f", line {error.lineno}" if error.lineno > 1 else ""
        raise InputError(f"{source}: not valid JSON ({error.msg}{place})") from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: not UTF-8 text") from None
    except ValueError:  # Python converts no more than some thousand digits
        raise InputError(f"{source}: not valid JSON (a number is too long)") from None
    except RecursionError:
        raise InputError(f"{source}: not valid JSON (nested too deeply)") from None


@functools.cache
def _decode(object_pairs_hook: Callable[[list], Any]) -> Callable[[Any], Any]:
    """Decodes texts; json.loads would build a decoder for each, which takes longer than most lines."""
    return json.JSONDecoder(object_pairs_hook=object_pairs_hook).decode


def read_record(path: str | os.PathLike[str], kind: type[AnyRecord]) -> AnyRecord:
    """Reads a JSON file as a record, and checks every field.

    Args:
      path: the file.
      kind: a dataclass, a ``typing_extensions.TypedDict``, or any other type that pydantic validates. Types are
        strict: a number is not a string, a boolean not a number. Unknown keys are ignored in both kinds of record, so
        that files of other versions load.

    Raises:
      InputError: as from `read_bytes`; or if the file does not contain such a record; the message names the field.

    Examples:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "steps.json")
      ...     path.write_text('{"a": 1}')
      ...     read_record(path, dict[str, int])
      8
      {'a': 1}
    """
    return parse_record(read_bytes(path), kind, str(path))


def parse_record(text: str | bytes, kind: type[AnyRecord], source: str) -> AnyRecord:
    """Parses a JSON text as a record; see `read_record`, and `parse_json` for ``source``.

    Raises:
      InputError: as from `read_record`.
    """
    import pydantic

    try:
        return _validator(kind).validate_json(text, strict=True)  # type: ignore[arg-type]
    except pydantic.ValidationError as failed:
        first = failed.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = " ".join(first["msg"].split())
        raise InputError(f"{source}: {shown(field, 200, quoted=False) + ': ' if field else ''}{reason}") from None


@functools.cache
def _validator(kind: Any) -> Any:
    import pydantic  # takes a while to import, and most commands read no record

    return pydantic.TypeAdapter(kind)


# names


def checked_name(name: Any, source: str) -> str:
    """Returns a name from a file after checking that it can be one part of a path.

    Args:
      name: the value in the file.
      source: the place, for error messages.

    Raises:
      InputError: if it is not a string, is empty or over 200 bytes, begins with a dot, or contains a slash or a control
        character.

    Examples:
      >>> checked_name("mrpc", "grid.json")
      'mrpc'
    """
    fits = (
        isinstance(name, str)
        and name.isprintable()  # neither control characters nor lone surrogates
        and not name.startswith(".")
        and not set(name) & {"/", "\\"}
        and 0 < len(name.encode()) <= 200
    )
    if not fits:
        raise InputError(f"{source}: {shown(name)} cannot be part of a path; use a name without slashes")
    return name


def checked_place(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Returns a path to write after checking that it is in the folder once links are followed.

    Raises:
      InputError: if a link in the path leads out of the folder.
    """
    try:
        outside = not path.parent.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        outside = True
    if outside:
        raise InputError(f"{path}: a link leads out of {folder}; remove the link")
    return path


# writing


def make_folder(folder: pathlib.Path) -> pathlib.Path:
    """Creates a folder and its parents, if they do not exist.

    Raises:
      InputError: if the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror})") from None
    return folder


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as indented JSON; see `write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text as UTF-8; see `write_bytes`.

    Raises:
      InputError: as from `write_bytes`; or if the text has a lone surrogate, which UTF-8 cannot hold.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: cannot be written (the text contains a lone surrogate, not a character)") from None
    write_bytes(path, data)


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file whole or not at all: first under a temporary name, then renamed to ``path``.

    A link is replaced, not followed. If the system refuses, no partial file is left.

    Raises:
      InputError: if the system refuses, for instance on a full or read-only disk.
    """
    made = path.with_name(path.name + _NEW)
    try:
        made.unlink(missing_ok=True)
        try:
            descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with open(descriptor, "wb") as file:
                file.write(data)
            made.replace(path)
        except OSError:
            made.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{shown(str(path))}: not a path: it contains a null byte") from None
