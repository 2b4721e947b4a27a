"""Runs readers on inputs, in processes that may die, and judges what comes out."""

import contextlib
import dataclasses
import importlib
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pats_jax
from pats_jax.errors import InputError

from .inputs import Input, Reader, Unfit, agree

_LIBRARY, _FUZZER = Path(pats_jax.__file__).parent, Path(__file__).parent
MODULE = f"{__package__}.readers"
ACCEPTED, REFUSED, FAILED = "accepted", "refused", "failed"
LONGEST_MESSAGE = 2000  # characters
_MEMORY = 4 << 30  # bytes that a process may take beyond what it has after its imports
_CHUNK = 20  # inputs that a process is given at a time


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of an input.

    Attributes:
      reader: its name.
      number: the input's.
      outcome: accepted, refused or failed.
      kind: how it failed, the same for failures that are alike; empty for others.
      told: more on how it failed, and what the input is.
      seconds: that reading took.
    """

    reader: str
    number: int
    outcome: str
    kind: str = ""
    told: str = ""
    seconds: float = 0.0


class Hang(BaseException):
    """The time is up; no `Exception`, so that nothing in a reader catches it."""


# one input


def draw_input(reader: Reader, name: str, seed: int, number: int) -> Input:
    """Input ``number`` of a reader."""
    return reader.draw(random.Random(f"{seed}/{name}/{number}"))


def judge(reader: Reader, name: str, seed: int, number: int, *, limit: float, keep: Path | None = None) -> Verdict:
    """Draws an input, reads it and says what became of it.

    Args:
      reader: what reads it.
      name: the reader's.
      seed: of all inputs.
      number: of this one.
      limit: seconds that reading may take.
      keep: where the files of an input that fails are kept.
    """
    given = draw_input(reader, name, seed, number)
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as home:
        folder = Path(home) / "input"
        given.write(folder)
        before, begin = _outside(home), time.perf_counter()
        kind, told = _read(reader, folder, given, limit)
        seconds = time.perf_counter() - begin
        strays = sorted(_outside(home) - before)
        if strays and kind in (ACCEPTED, REFUSED):
            kind, told = "wrote outside of its folder", strays[0]
        if kind in (ACCEPTED, REFUSED):
            return Verdict(name, number, kind, seconds=seconds)
        if keep is not None:
            place = keep / f"{name}-{number}"
            shutil.rmtree(place, ignore_errors=True)
            given.write(place)
        return Verdict(name, number, FAILED, kind, f"{told} [{given.told}]", seconds)


def _outside(home):
    return {path.name for path in Path(home).iterdir()}


def _read(reader: Reader, folder: Path, given: Input, limit: float) -> tuple[str, str]:
    """Accepted, refused or the kind of failure, and more on that."""
    try:
        with _alarm(limit), _log_read(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader.read(folder, given)
    except InputError as error:
        return _judge_refusal(str(error), folder, given)
    except Hang:
        return "took too long", f"more than {limit:g} seconds"
    except KeyboardInterrupt:
        raise
    except Unfit as error:
        return "accepted, but of no use", str(error)
    except BaseException as error:  # also what is no Exception: a panic in Rust, an exit
        return f"{type(error).__name__} at {_where(error)}", " ".join(str(error).split())[:160]
    if given.expected.accept is False:
        return "accepted, but it must be refused", _short(found)
    if not agree(found, given.expected.value):
        return "read otherwise than by the independent reader", _difference(found, given.expected.value)
    return ACCEPTED, ""


def _judge_refusal(message, folder, given):
    shown = message.replace(str(folder), "")[:200]
    if not message.isprintable():
        return "the message is not one printable line", ascii(shown)
    if len(message) > LONGEST_MESSAGE:
        return "the message is too long", f"{len(message)} characters: {shown[:100]}"
    names = (str(folder), *(Path(name).name for name in given.files), *given.options.get("names", ()))
    if not any(name in message for name in names):
        return "the message names no file", shown
    if given.expected.accept:
        return "refused, but it is sound", shown
    return REFUSED, ""


def _where(error):
    """The innermost line of the library that an exception passed, or else of the fuzzer."""
    found, place = {}, error.__traceback__
    while place is not None:
        file = Path(place.tb_frame.f_code.co_filename)
        found |= {home: f"{file.name}:{place.tb_lineno}" for home in (_LIBRARY, _FUZZER) if home in file.parents}
        place = place.tb_next
    return found.get(_LIBRARY) or found.get(_FUZZER)


def _difference(found: Any, expected: Any, at: str = "") -> str:
    """The first place in which two values differ."""
    pairs: list[tuple[Any, Any, str]] = []
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        pairs = [(found[key], expected[key], f"{at}.{key}") for key in found]
    if isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            return f"{at}: {len(found)} where {len(expected)} are right"
        pairs = [(one, other, f"{at}[{place}]") for place, (one, other) in enumerate(zip(found, expected, strict=True))]
    for one, other, where in pairs:
        if not agree(one, other):
            return _difference(one, other, where)
    return f"{at}: {_short(found)} where {_short(expected)} is right"


def _short(value):
    text = ascii(value)  # a terminal may have no other characters
    return text if len(text) <= 100 else f"{text[:100]}..."


@contextlib.contextmanager
def _alarm(limit: float) -> Iterator[None]:
    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Formatted(logging.Handler):
    """Puts every message together, so that one that cannot be is found, and writes none."""

    def emit(self, record):
        record.getMessage()


@contextlib.contextmanager
def _log_read() -> Iterator[None]:
    log, handler = logging.getLogger("pats_jax"), _Formatted()
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


# many inputs


def run(
    readers: Sequence[str],
    numbers: Sequence[int],
    *,
    seed: int,
    limit: float = 20.0,
    grace: float = 10.0,
    processes: int = 2,
    keep: Path | None = None,
    module: str = MODULE,
    each: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Gives inputs to readers, in processes of their own, and restarts those that die.

    Args:
      readers: their names.
      numbers: of the inputs, for each of the readers.
      seed: of all inputs.
      limit: seconds that one input may take.
      grace: seconds after that when a process that does not answer is killed.
      processes: how many work at a time.
      keep: where the files of inputs that fail are kept.
      module: the one whose ``READERS`` has the readers.
      each: is told every verdict as it comes.
    """
    work = deque((name, number) for number in numbers for name in readers)
    workers: list[_Worker] = []
    verdicts = []
    try:
        while work or any(worker.given for worker in workers):
            while len(workers) < min(processes, len(work) + len(workers)) or (work and not workers):
                workers.append(_Worker(seed, limit, grace, keep, module))
            for worker in workers:
                if not worker.given and work:
                    worker.give([work.popleft() for _ in range(min(_CHUNK, len(work)))])
            wait([worker.connection for worker in workers if worker.given], timeout=1.0)
            for worker in list(workers):
                for verdict in worker.verdicts():
                    verdicts.append(verdict)
                    each(verdict)
                if worker.dead:
                    workers.remove(worker)
                    work.extendleft(reversed(worker.given))
                    worker.end()
    finally:
        for worker in workers:
            worker.end()
    return verdicts


class _Worker:
    """A process, the inputs that it has been given and not answered, and since when it is at the first of them."""

    def __init__(self, seed: int, limit: float, grace: float, keep: Path | None, module: str):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, seed, limit, keep, module), daemon=True)
        self._process.start()
        other.close()
        self._limit, self._patience, self._since = limit, limit + grace, None
        self.given: deque[tuple[str, int]] = deque()
        self.dead = False

    def give(self, inputs: list[tuple[str, int]]) -> None:
        self.given.extend(inputs)
        self._since = self._since and time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(inputs)

    def verdicts(self) -> Iterator[Verdict]:
        """What it has found since it was last asked, its own death included."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                self._since = time.monotonic()
                if message is not None:  # None: it is ready
                    self.given.popleft()
                    yield message
        except (EOFError, OSError):
            self.dead = True
            self._process.join(5)
            yield self._failure("the process died", f"exit code {self._process.exitcode}")
            return
        if self.given and self._since and time.monotonic() - self._since > self._patience:
            self.dead = True
            yield self._failure("took too long", f"more than {self._limit:g} seconds, and it could not be interrupted")

    def _failure(self, kind, told):
        if not self.given or self._since is None:
            raise RuntimeError(f"a process of the fuzzer failed: {kind}, {told}")
        name, number = self.given.popleft()
        return Verdict(name, number, FAILED, kind, told, time.monotonic() - self._since)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(connection: Connection, seed: int, limit: float, keep: Path | None, module: str) -> None:
    """The life of a process: answers one verdict an input until nobody asks any more."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
    }
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    readers = importlib.import_module(module).READERS
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    _limit_memory()
    connection.send(None)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            for name, number in connection.recv():
                connection.send(judge(readers[name], name, seed, number, limit=limit, keep=keep))


def _limit_memory() -> None:
    """An allocation beyond the limit is a MemoryError, or the end of the process; either is a failure of the input."""
    if not sys.platform.startswith("linux"):
        return
    if jax := sys.modules.get("jax"):
        jax.device_get(jax.numpy.zeros(1))  # its threads have their memory now
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
