"""Shows progress: a bar on a terminal, a line every half minute in a pipe, a file or a notebook."""

import threading
import time
from collections.abc import Callable
from typing import Any

import rich.console
import rich.progress

from pats_jax.reporting.console import say, visible

SECONDS_BETWEEN_LINES = 30.0


class StepProgress:
    """Shows compilation, then steps, percentage, loss and time left; a context manager.

    Nothing is shown on a quiet console.
    """

    def __init__(
        self,
        console: rich.console.Console,
        total: int,
        first: int,
        compile_seconds: float,
        *,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Shows nothing yet.

        Args:
          console: where to show progress.
          total: number of steps of the training.
          first: number of steps made before this start.
          compile_seconds: the expected time of compilation.
          seconds_between_lines: time between lines if there is no bar.
          clock: a function that returns seconds.
        """
        self._console, self._total, self._first = console, total, first
        self._wait, self._clock = seconds_between_lines, clock
        self._completed, self._status = first, f"compiling (about {about(compile_seconds)})"
        self._first_made: tuple[int, float] | None = None  # the first step that was seen done, and when
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: rich.progress.Progress | None = None
        self._task: Any = None

    def __enter__(self) -> "StepProgress":
        if self._console.is_terminal and not self._console.is_jupyter:
            self._bar = progress_bar(self._console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._total, completed=self._first, status=self._status)
        elif not self._console.quiet:
            self._thread = threading.Thread(target=self._write_lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        if self._thread is not None:
            self._thread.join()

    def show(self, *, completed: int | None = None, status: str | None = None) -> None:
        """Updates the number of steps made, or the status."""
        if status is not None:
            self._status = status
        if completed is not None:
            self._completed = completed
            if self._first_made is None:
                self._first_made = completed, self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._completed, status=self._status)

    def line(self) -> str:
        """How far it is, in one line."""
        share = f"step {self._completed} of {self._total} ({self._completed / max(self._total, 1):.0%})"
        left = self._seconds_left()
        parts = [share, self._status, "" if left is None else f"{duration(left)} left"]
        return ", ".join(filter(None, parts))

    def _seconds_left(self):
        if self._first_made is None or self._completed <= self._first_made[0]:
            return None
        step, since = self._first_made
        return (self._clock() - since) / (self._completed - step) * (self._total - self._completed)

    def _write_lines(self):
        while not self._ended.wait(self._wait):
            say(self._console, self.line())


class CountProgress:
    """Shows how many runs have ended, the time left, and what runs now; a context manager.

    On a terminal it is a bar, elsewhere a line every half minute; nothing on a quiet console. The time left is known
    once a run has ended, or a part of one is done: the speed is that of all of them.
    """

    def __init__(
        self,
        console: rich.console.Console,
        total: int,
        things: str,
        *,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Shows nothing yet.

        Args:
          console: where to show progress.
          total: number of runs.
          things: what to call them, in the plural.
          seconds_between_lines: time between lines if there is no bar.
          clock: a function that returns seconds.
        """
        self._console, self._total, self._things = console, total, things
        self._wait, self._clock, self._started = seconds_between_lines, clock, clock()
        self._ended, self._running, self._said, self._under_way = 0, "", clock(), 0.0
        self._bar: rich.progress.Progress | None = None
        self._task: Any = None

    def __enter__(self) -> "CountProgress":
        self._started = self._said = self._clock()
        if self._console.is_terminal and not self._console.is_jupyter:
            columns = (
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[status]}", markup=False),
            )
            self._bar = rich.progress.Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._things, total=self._total, status="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, running: str = "", ended: int = 0, under_way: float = 0.0) -> None:
        """Takes what runs now.

        Args:
          running: its names.
          ended: how many more have ended.
          under_way: how much of those that run now is done: the sum of their shares, each in [0, 1].
        """
        self._running, self._ended, self._under_way = running, self._ended + ended, under_way
        if self._bar is not None:
            left = ", ".join(filter(None, (self._left(), visible(running))))
            self._bar.update(self._task, advance=ended, status=left)
        elif self._clock() - self._said >= self._wait and not self._console.quiet:
            self._said = self._clock()
            say(self._console, self.line())

    def line(self) -> str:
        """How far it is, in one line."""
        parts = filter(None, (f"{self._ended} of {self._total} {self._things}", self._left()))
        return ", ".join(parts) + (f"; now {self._running}" if self._running else "")

    def _left(self):
        done = self._ended + self._under_way
        if not self._ended and done < _ENOUGH:
            return ""
        return f"{duration((self._clock() - self._started) / done * (self._total - done))} left"


_ENOUGH = 0.5  # of a run, to tell how long all take: its first steps come after a compilation


def progress_bar(console: rich.console.Console) -> rich.progress.Progress:
    """A bar with steps, percentage, a status, and time left."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[status]}"),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


def about(seconds: float) -> str:
    """A rough number of seconds.

    Examples:
      >>> about(7.4), about(23), about(84)
      ('10 s', '25 s', '85 s')
    """
    return f"{max(5, 5 * round(seconds / 5 + 0.4)):.0f} s"


def duration(seconds: float) -> str:
    """A number of seconds as text.

    Examples:
      >>> duration(9), duration(95), duration(7300)
      ('9 s', '1 min 35 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
