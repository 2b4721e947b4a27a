"""SIGTERM and Ctrl-C: noticed between steps, so that a run is saved before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator

import jax
from jax.experimental import multihost_utils

from pats_jax.errors import Preempted


class Preemption:
    """Whether this run was asked to end.

    Attributes:
      signal_number: the signal that has come, or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def arrived(self, step: int) -> bool:
        """Whether to end after this step; the same answer in all processes, which must all ask at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal_number = self.signal_number or signal.SIGTERM
            return True
        return jax.process_count() == 1 and self.signal_number is not None

    def check(self) -> None:
        """Raises `Preempted` if a signal has come to this process; where no other process waits for this one."""
        if jax.process_count() == 1 and self.signal_number is not None:
            raise Preempted("interrupted", self.signal_number)


@contextlib.contextmanager
def watch() -> Iterator[Preemption]:
    """Takes note of SIGTERM and Ctrl-C instead of dying of them; a second signal has its usual effect.

    With many processes the signals are left alone: JAX's own preemption service takes SIGTERM and tells all of them.
    Outside the main thread, where Python takes no signals, nothing is watched.
    """
    preemption = Preemption()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield preemption
        return

    with noting(preemption, (signal.SIGINT, signal.SIGTERM)):
        yield preemption


@contextlib.contextmanager
def noting(preemption: Preemption, numbers: Iterable[int]) -> Iterator[None]:
    """Notes the first of these signals in ``preemption.signal_number``; a second one has its usual effect."""

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
