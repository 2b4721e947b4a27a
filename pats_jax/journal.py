"""The lines that a run logs: to metrics.jsonl, and to TensorBoard for those who want it."""

import json
import pathlib
from typing import Any

from pats_jax import run_folder
from pats_jax.errors import InputError

Record = dict[str, Any]


class Journal:
    """Writes lines as they come; a context manager."""

    def __init__(self, folder: pathlib.Path, records: list[Record], *, tensorboard: bool = False):
        """Opens a run's journal.

        Args:
          folder: the run's folder.
          records: the lines of a resumed run up to its checkpoint; whatever else was logged is taken out.
          tensorboard: whether to write event files to ``tensorboard/`` too.

        Raises:
          InputError: if the package tensorboardX is missing.
        """
        run_folder.write_metrics(folder, records)
        self._path = folder / run_folder.METRICS
        self._events = None
        if tensorboard:
            first = records[-1]["step"] + 1 if records else 0
            # what a resumed run had written after its checkpoint is not shown
            self._events = _writer_class()(str(folder / "tensorboard"), purge_step=first)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error) -> None:
        if self._events is not None:
            self._events.close()

    def write(self, record: Record) -> None:
        """Adds one line; what depends on the clock stands in the record's ``timing``."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._events is not None:
            for tag, value in _scalars(record):
                self._events.add_scalar(tag, value, record["step"])


def check_tensorboard() -> None:
    """Raises InputError, saying what to install, if event files cannot be written."""
    _writer_class()


def _writer_class():
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError(
            "--report_to tensorboard: needs tensorboardX; run: pip install 'pats-jax[tensorboard]'"
        ) from None
    return SummaryWriter


def _scalars(record):
    """Tags as TensorBoard groups them: train/loss, eval/accuracy, timing/seconds."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in value.items())
        elif name != "step":
            yield f"train/{name}", value
