"""Child processes that make sets of runs, on this machine or on the workers of a dask cluster.

A program submits each set as a `Job` to an executor of `concurrent.futures`: threads here, or dask's. Its thread starts
the child process, waits for it, and passes signals on. A process killed by ``kill -9`` leaves its children running;
they hold a lock in the folder, so nobody repeats their work. A child on a dask worker ends with its worker instead, and
saves: dask gives the job to another worker, where it resumes.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

import pats_jax
from pats_jax.core import files
from pats_jax.errors import InputError
from pats_jax.run import folder_lock
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.machine import describe_machine
from pats_jax.run.worker_settings import WorkerSettings
from pats_jax.training import preemption

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_LOCK_OF_JOB = ".lock-job-"  # and the job's number
_SECONDS_TO_CONNECT = 10
_SECONDS_TO_SAVE = 600.0  # how long a retried job waits for the child of the lost worker


@dataclasses.dataclass(frozen=True)
class Job:
    """A child process that makes a set of runs."""

    name: str  # shown while it runs
    arguments: tuple[str, ...]  # after the name of this Python
    log: str  # file for its output, which is appended
    results: tuple[str, ...] = ()  # nothing is started if all of these files exist: the runs are finished
    stdin: str = ""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job ended: exit code (negative: killed by that signal; None: its workers died), and its seconds."""

    code: int | None
    seconds: float


# what a thread of an executor does: the functions down to `_kill` also run in the processes of dask's workers


@dataclasses.dataclass(frozen=True)
class Session:
    """What the jobs of one start of a program share."""

    name: str  # unique
    folder: str  # the program's, where each child holds a lock
    working_directory: str
    ends_with_worker: bool  # whether a child is told to end when the process that started it dies
    inherited: tuple[int, ...]  # descriptors of further locks that a child holds


def run_job(job: Job, number: int, session: Session) -> Ended:
    """Starts the child process of a job and waits for it.

    Args:
      job: the job.
      number: the job's number in its session.
      session: the session that the job belongs to.

    Raises:
      InputError: if the log cannot be written, or a child of an earlier worker still runs after ten minutes.
    """
    since = time.perf_counter()
    lock = FolderLock(pathlib.Path(session.folder), name=f"{_LOCK_OF_JOB}{number}")
    try:
        _wait_for(lock, session)
        if job.results and all(os.path.exists(path) for path in job.results):
            return Ended(0, 0.0)
        with _guard:
            if session.name in _stopped:
                return Ended(-signal.SIGTERM, 0.0)
            process = _start(job, lock, session)
            _children[session.name][number] = process
        code = process.wait()
        return Ended(code, time.perf_counter() - since)
    finally:
        lock.release()
        with _guard:
            _children[session.name].pop(number, None)


_guard = threading.Lock()
_children: dict[str, dict[int, subprocess.Popen]] = collections.defaultdict(dict)  # session -> number -> process
_stopped: set[str] = set()


def _wait_for(lock: FolderLock, session: Session) -> None:
    until = time.monotonic() + (_SECONDS_TO_SAVE if session.ends_with_worker else 0.0)
    while True:
        try:
            return lock.take()
        except InputError:
            if time.monotonic() >= until or session.name in _stopped:
                raise


def _start(job: Job, lock: FolderLock, session: Session) -> subprocess.Popen:
    """Starts a child in its own process group: Ctrl-C then reaches only its program, which passes it on once."""
    arguments = [sys.executable, *job.arguments]
    if session.ends_with_worker and sys.platform == "linux":
        arguments = [sys.executable, "-S", "-c", _ENDS_WITH_PARENT, str(os.getpid()), *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # so that the log ends with the last line written
    with open_log(pathlib.Path(job.log)) as output, tempfile.TemporaryFile() as stdin:
        stdin.write(job.stdin.encode())
        stdin.seek(0)
        return subprocess.Popen(
            arguments,
            stdin=stdin,
            stdout=output,
            stderr=output,
            env=environment | folder_lock.handed_on(lock),
            cwd=session.working_directory,
            process_group=0,
            pass_fds=(*lock.descriptors, *session.inherited),
        )


# The system's own means: SIGTERM for this process when its parent dies, whatever program it becomes.
_ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the worker has died")
os.execv(sys.argv[2], sys.argv[2:])
"""


def _stop(session: str) -> list[int]:
    """Sends SIGTERM to the children of a session, prevents others from starting, and returns their jobs' numbers."""
    with _guard:
        _stopped.add(session)
        running = dict(_children[session])
    for process in running.values():
        process.terminate()
    return list(running)


def _kill(session: str) -> None:
    """Kills the children of a session."""
    with _guard:
        running = list(_children[session].values())
    for process in running:
        process.kill()


def open_log(path: pathlib.Path) -> BinaryIO:
    """Opens a file for the output of processes, which is appended; creates its folder, and follows no link.

    Raises:
      InputError: if the system refuses.
    """
    files.make_folder(path.parent)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return open(os.open(path, flags, 0o666), "wb")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


# executors


class Workers(Protocol):
    """An executor, with access to the children that its threads have started."""

    @property
    def executor(self) -> concurrent.futures.Executor: ...

    ends_with_worker: bool
    inherited: tuple[int, ...]  # descriptors of locks for the children

    def everywhere(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls a function in every process whose threads start children, and returns the results."""

    def machines(self) -> list[dict[str, str]]:
        """Describes the machines of these processes; machines that are alike are listed once."""


class LocalWorkers:
    """Threads of this process, each of which pins its children to a share of the cores."""

    ends_with_worker = False

    def __init__(self, jobs: int, lock: FolderLock) -> None:
        """Makes a thread for each job that may run at a time; children hold the lock of the program's folder too."""
        shares = collections.deque(shares_of_cores(jobs))
        self.inherited = lock.descriptors
        self.executor = concurrent.futures.ThreadPoolExecutor(jobs, initializer=lambda: _pin(shares.popleft()))

    def everywhere(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        return [call(*args)]

    def machines(self) -> list[dict[str, str]]:
        return [describe_machine()]


def _pin(cores: set[int] | None) -> None:
    """Pins this thread, and so the processes that it starts later."""
    if cores is not None:
        os.sched_setaffinity(0, cores)


def shares_of_cores(jobs: int) -> list[set[int] | None]:
    """A set of cores for each job; None if there are fewer cores than jobs, or the system cannot pin processes."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if jobs == 1 or len(cores) < jobs:
        return [None] * jobs
    return [{int(core) for core in share} for share in np.array_split(cores, jobs)]


class DaskWorkers:
    """The workers of a dask cluster, each of one thread; they may come and go."""

    ends_with_worker = True
    inherited: tuple[int, ...] = ()

    def __init__(self, client: Any, address: str) -> None:
        """Checks the workers of a connected client.

        Raises:
          InputError: if a worker has several threads, or another version of this package.
        """
        self._client, self._address = client, address
        for worker, threads in client.nthreads().items():
            if threads != 1:
                raise InputError(f"--scheduler {address}: {worker} has {threads} threads; start it with --nthreads 1")
        try:
            versions = client.run(_version)
        except ImportError as error:
            raise InputError(f"--scheduler {address}: a worker cannot import pats_jax: {error}") from None
        for worker, version in versions.items():
            if version != pats_jax.__version__:
                raise InputError(f"--scheduler {address}: {worker} has pats-jax {version}, not {pats_jax.__version__}")
        if not versions:
            logger.info("waiting for workers of %s", address)
        self.executor = client.get_executor(pure=False)

    def everywhere(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        return list(self._client.run(call, *args, on_error="ignore").values())

    def machines(self) -> list[dict[str, str]]:
        found = self.everywhere(describe_machine)
        return [one for number, one in enumerate(found) if one not in found[:number]]


def _version() -> str:
    return pats_jax.__version__


@contextlib.contextmanager
def connect(settings: WorkerSettings, lock: FolderLock) -> Iterator[Workers]:
    """The workers of the settings.

    Args:
      settings: the settings, checked.
      lock: the lock of the program's folder, which local children hold too.

    Raises:
      InputError: if dask is not installed, no scheduler answers, or a worker is not suitable.
    """
    if settings.executor == "local":
        local = LocalWorkers(settings.jobs, lock)
        with local.executor:
            yield local
        return
    try:
        distributed = importlib.import_module("distributed")
    except ImportError:
        raise InputError("--executor dask: needs the package distributed: pip install 'pats-jax[dask]'") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # tracebacks of what is said here in a line
    try:
        client = distributed.Client(settings.scheduler, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--scheduler {settings.scheduler}: no dask scheduler answers there ({reason})") from None
    with client:
        yield DaskWorkers(client, str(settings.scheduler))


# what a program does


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[FolderLock]:
    """Locks a program's folder against other programs and the children of a killed one; yields the lock.

    Raises:
      InputError: if one of them is using the folder.
    """
    with FolderLock(folder) as lock:
        if any(folder_lock.is_taken(path) for path in folder.glob(f"{_LOCK_OF_JOB}*")):
            raise folder_lock.in_use(folder)
        yield lock


def run_jobs(
    jobs: Sequence[Job],
    workers: Workers,
    folder: pathlib.Path,
    asked: preemption.Preemption,
    show: Callable[[Sequence[Job]], None] = lambda running: None,
) -> Generator[tuple[Job, Ended], None, None]:
    """Runs jobs in order, and yields each when it has ended.

    It ends early if this process has noted a signal, or when it is closed. It then asks children to stop, waits until
    they have saved, and kills them if the wait is interrupted.

    Args:
      jobs: the jobs.
      workers: where to run them.
      folder: the program's folder.
      asked: notes the signals of this process.
      show: called regularly with the jobs that run here.

    Raises:
      InputError: if a child cannot be started, or the connection to dask is lost.
    """
    more = workers.ends_with_worker, workers.inherited
    session = Session(uuid.uuid4().hex, str(folder.absolute()), os.getcwd(), *more)
    futures = [workers.executor.submit(run_job, job, number, session) for number, job in enumerate(jobs)]
    job_of, waiting = dict(zip(futures, jobs, strict=True)), set(futures)
    try:
        while waiting and asked.signal_number is None:
            done, waiting = concurrent.futures.wait(waiting, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            for future in sorted(done, key=futures.index):
                yield job_of[future], _result(future)
            show([job_of[future] for future in futures if future in waiting and future.running()])
    finally:
        _end(session.name, workers, futures)


def _result(future: concurrent.futures.Future) -> Ended:
    """How a job ended.

    Raises:
      InputError: if the child could not be started, or the connection to dask is lost.
    """
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise InputError("the dask scheduler has ended or is not reachable; repeat the command to resume") from None
    except Exception as error:
        if type(error).__name__ == "KilledWorker":  # of dask, which is imported only where it is used
            return Ended(None, 0.0)
        raise


def _end(session: str, workers: Workers, futures: Sequence[concurrent.futures.Future]) -> None:
    """Asks the children of a session to stop and waits until they have saved; kills them if the wait is interrupted."""
    if all(future.done() for future in futures):
        return
    running = {number for numbers in workers.everywhere(_stop, session) for number in numbers}
    for number, future in enumerate(futures):
        if number not in running:
            future.cancel()
    try:
        concurrent.futures.wait([futures[number] for number in running])
    except BaseException:
        workers.everywhere(_kill, session)
        raise


def reason(job: Job, ended: Ended) -> str | None:
    """Why a job failed, from the last line of its log; None if it succeeded."""
    if ended.code == 0:
        return None
    if ended.code is None:
        return "its dask workers died, one after the other"
    return (f"killed by signal {-ended.code}: " if ended.code < 0 else "") + last_line(pathlib.Path(job.log))


def how_far(job: Job) -> str:
    """A job's name, and the last step in its log, if any."""
    steps = _steps_told(job)
    return f"{job.name} {steps[-1][0]}" if steps else job.name


def share_done(job: Job) -> float:
    """The share of its steps that a job has made, as far as its log tells."""
    steps = _steps_told(job)
    return int(steps[-1][1]) / 100 if steps else 0.0


def _steps_told(job: Job) -> list[tuple[str, str]]:
    """What the end of a log tells of steps: the words, and the percentage."""
    log = pathlib.Path(job.log)
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _END_OF_LOG))
            text = file.read().decode(errors="replace")
    except OSError:  # not begun, or on another machine
        return []
    return re.findall(r"^(step \d+ of \d+ \((\d+)%\))", text, re.MULTILINE)


_END_OF_LOG = 4096  # bytes


def last_line(log: pathlib.Path) -> str:
    """The last line of a child's output, without the prefix of our errors."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return last.removeprefix("pats-jax: error: ")


@contextlib.contextmanager
def note_signals() -> Iterator[preemption.Preemption]:
    """Notes Ctrl-C, SIGTERM and a closed terminal (unless `nohup` ignores it)."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    asked = preemption.Preemption()
    with preemption.noting(asked, numbers):
        yield asked
