"""SIGTERM and Ctrl-C: handled between steps, so that a run is saved before it stops.

While a run reads its data and loads its model there is nothing to save, so a signal ends it immediately.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import jax
from jax.experimental import multihost_utils

from pats_jax.errors import Preempted


class Preemption:
    """Whether this run was asked to stop.

    Attributes:
      signal_number: the signal received, or None.
      begin: a function to call as soon as there is something to save; after it, or after the first question, signals
        are noted.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.begin: Callable[[], None] = lambda: None

    def arrived(self, step: int) -> bool:
        """Whether to stop after this step: the same answer in all processes, which must all ask at every step."""
        self.begin()
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal_number = self.signal_number or signal.SIGTERM
            return True
        return jax.process_count() == 1 and self.signal_number is not None

    def check(self) -> None:
        """Raises `Preempted` if this process has received a signal; for use where no other process waits for it."""
        self.begin()
        if jax.process_count() == 1 and self.signal_number is not None:
            raise Preempted("interrupted", self.signal_number)


@contextlib.contextmanager
def watch() -> Iterator[Preemption]:
    """Notes SIGTERM and Ctrl-C instead of stopping, once ``begin`` is called; a second signal has its usual effect.

    With several processes, signals are left to JAX's own preemption service, which receives SIGTERM and tells all
    processes. Outside the main thread, where Python handles no signals, nothing is watched.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield Preemption()
        return

    with contextlib.ExitStack() as stack:
        preemption = Preemption()

        def begin():
            preemption.begin = lambda: None
            stack.enter_context(noting(preemption, (signal.SIGINT, signal.SIGTERM)))

        preemption.begin = begin
        yield preemption


@contextlib.contextmanager
def noting(preemption: Preemption, numbers: Iterable[int]) -> Iterator[None]:
    """Notes the first of these signals in ``preemption.signal_number``; a second signal has its usual effect."""

    def note(number, frame):
        preemption.signal_number = number
        restore()

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        restore()
