"""Readers with a fault each, which the tests of the fuzzer must see reported."""

import random
import signal
import time
from pathlib import Path
from typing import Any

from pats_jax.errors import InputError

from . import own_data
from .inputs import Expected, Input, Reader


def _draw(rng: random.Random) -> Input:
    return Input({"data.txt": b"text"}, "a file", Expected("text", True))


def _draw_wrong(rng: random.Random) -> Input:
    return Input({"data.txt": b"text"}, "a file", Expected(accept=False))


def _fails(folder: Path, given: Input) -> Any:
    return {}["label"]


def _hangs(folder: Path, given: Input) -> Any:
    while True:
        try:
            time.sleep(1)
        except Exception:  # as a library may have it
            pass


def _hangs_deaf(folder: Path, given: Input) -> Any:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as code in C is while it computes
    time.sleep(1000)


def _dies(folder: Path, given: Input) -> Any:
    signal.raise_signal(signal.SIGSEGV)


def _takes_memory(folder: Path, given: Input) -> Any:
    return bytearray(6 << 30)


def _writes_elsewhere(folder: Path, given: Input) -> Any:
    (folder / "../stray").write_text("x")
    return "text"


def _refuses(folder: Path, given: Input) -> Any:
    raise InputError(f"{folder}/data.txt: no")


def _says_two_lines(folder: Path, given: Input) -> Any:
    raise InputError(f"{folder}/data.txt: no\nand no")


def _names_nothing(folder: Path, given: Input) -> Any:
    raise InputError("a file is wrong")


def _says_much(folder: Path, given: Input) -> Any:
    raise InputError(f"{folder}/data.txt: {'x' * 100_000}")


def _exits(folder: Path, given: Input) -> Any:
    raise SystemExit(2)


def _loses_a_row(folder: Path, given: Input) -> Any:
    values = own_data.read_own(folder, given)
    return {**values, "texts": [texts[:-1] for texts in values["texts"]]}


def _takes_labels_for_others(folder: Path, given: Input) -> Any:
    values = own_data.read_own(folder, given)
    return {**values, "labels": values["labels"] and values["labels"][::-1]}


READERS = {
    "sound": Reader(_draw, lambda folder, given: (folder / "data.txt").read_text()),
    "fails": Reader(_draw, _fails),
    "hangs": Reader(_draw, _hangs),
    "hangs-deaf": Reader(_draw, _hangs_deaf),
    "dies": Reader(_draw, _dies),
    "takes-memory": Reader(_draw, _takes_memory),
    "writes-elsewhere": Reader(_draw, _writes_elsewhere),
    "refuses-all": Reader(_draw, _refuses),
    "accepts-all": Reader(_draw_wrong, lambda folder, given: "text"),
    "two-lines": Reader(_draw_wrong, _says_two_lines),
    "no-name": Reader(_draw_wrong, _names_nothing),
    "much": Reader(_draw_wrong, _says_much),
    "exits": Reader(_draw, _exits),
    "loses-a-row": Reader(own_data.READERS["csv"].draw, _loses_a_row),
    "other-labels": Reader(own_data.READERS["csv"].draw, _takes_labels_for_others),
}
