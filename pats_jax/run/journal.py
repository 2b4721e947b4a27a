"""The log of a run: metrics.jsonl, and optionally TensorBoard event files."""

import contextlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterator

from pats_jax.core import files
from pats_jax.errors import InputError
from pats_jax.run import run_folder
from pats_jax.training.loop import Record

logger = logging.getLogger(__name__)


_FLUSH_SECONDS = 10.0  # between writes of event files to the disk, which cost time


class Journal:
    """Writes records as they come; a context manager."""

    def __init__(self, folder: pathlib.Path, records: list[Record], *, tensorboard: bool = False):
        """Opens a run's journal.

        Args:
          folder: the run's folder.
          records: the records of a resumed run up to its checkpoint; later lines are removed from the file.
          tensorboard: whether to also write event files to ``tensorboard/``.

        Raises:
          InputError: if the package tensorboardX is missing, or a file cannot be written.
        """
        run_folder.write_metrics(folder, records)
        self._path = folder / run_folder.METRICS
        self._events = Events(folder / "tensorboard", records) if tensorboard else None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._events is None:
            return
        try:
            self._events.close()
        except InputError as failure:
            if error is None:
                raise
            logger.warning("%s", failure)  # the exception on its way says more

    def write(self, record: Record) -> None:
        """Adds one line; everything that depends on the clock is in the record's ``timing``.

        Raises:
          InputError: if it cannot be written, for instance on a full disk; the file then ends with the previous line.
        """
        with _refusing(self._path):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            with open(descriptor, "ab", buffering=0) as file:
                size, line = os.fstat(descriptor).st_size, memoryview(json.dumps(record).encode() + b"\n")
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError:
                    file.truncate(size)
                    raise
        if self._events is not None:
            self._events.write(record)


class Events:
    """TensorBoard event files, written directly: on a full disk tensorboardX's thread dies, and the run hangs."""

    def __init__(self, folder: pathlib.Path, records: list[Record]):
        """Starts a file; TensorBoard then hides what a resumed run had written after its last record.

        Raises:
          InputError: if the package tensorboardX is missing, or the system refuses.
        """
        writer, event, _ = _tensorboard()
        self._folder = files.make_folder(folder)
        with _refusing(folder):
            self._writer = writer(str(folder / "events"))
            first = records[-1]["step"] + 1 if records else 0
            for start in ({"file_version": "brain.Event:2"}, {"session_log": {"status": "START"}}):
                self._writer.write_event(event(step=first, wall_time=time.time(), **start))
            self._writer.flush()
        self._flushed = time.monotonic()

    def write(self, record: Record) -> None:
        """Adds the numbers of a record; raises InputError if they cannot be written."""
        _, event, scalar = _tensorboard()
        with _refusing(self._folder):
            for tag, value in _scalars(record):
                now, step = time.time(), record["step"]
                self._writer.write_event(event(step=step, wall_time=now, summary=scalar(tag, value)))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file; raises InputError if it cannot be written."""
        with _refusing(self._folder):
            self._writer.close()


@contextlib.contextmanager
def _refusing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def check_tensorboard() -> None:
    """Raises InputError, with what to install, if event files cannot be written."""
    _tensorboard()


def _tensorboard():
    """The classes of files and events, and the function that makes a scalar's summary.

    Raises:
      InputError: if the package tensorboardX is missing.
    """
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar
    except ImportError:
        raise InputError(
            "--report_to tensorboard: needs tensorboardX; run: pip install 'pats-jax[tensorboard]'"
        ) from None
    return EventsWriter, Event, scalar


def _scalars(record):
    """Tags as TensorBoard groups them: train/loss, eval/accuracy, timing/seconds."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in value.items())
        elif name != "step":
            yield f"train/{name}", value
