"""Profiles a few training steps with JAX's profiler, for TensorBoard or Perfetto; measures the age of the process."""

import logging
import os
import pathlib
import shutil
import time
from typing import Any

import jax

logger = logging.getLogger(__name__)

STEPS = 10


class Profiler:
    """Traces ten steps: steps 11 to 20 of this start, or the last ten of a shorter one. A context manager."""

    def __init__(self, folder: pathlib.Path, first_step: int, total_steps: int):
        """Chooses the steps.

        Args:
          folder: where to write the trace.
          first_step: number of steps made before this start.
          total_steps: number of steps of the training.
        """
        self._folder, self._running, self._earlier = folder, False, set[pathlib.Path]()
        self._last = min(first_step + 2 * STEPS, total_steps)
        self._first = max(self._last - STEPS, first_step)
        self._at_start = first_step

    def __enter__(self) -> "Profiler":
        self.after(self._at_start, None)
        return self

    def __exit__(self, *error) -> None:
        self._stop(None)

    def after(self, step: int, state: Any) -> None:
        """Starts the trace before its first step, and stops it after its last (steps count from 1)."""
        if step == self._first < self._last:
            self._earlier = set(self._traces())
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._last:
            self._stop(state)

    def _stop(self, state):
        if self._running:
            jax.block_until_ready(state)  # the device may still be at the last of them
            self._running = False
            try:
                jax.profiler.stop_trace()
            except (RuntimeError, OSError) as error:  # a full disk, for instance, which the training need not notice
                logger.warning("%s: cannot write the profile (%s)", self._folder, str(error).splitlines()[0])
                for half_written in set(self._traces()) - self._earlier:
                    shutil.rmtree(half_written, ignore_errors=True)

    def _traces(self):
        return self._folder.glob("plugins/profile/*")


def seconds_since_process_start() -> float | None:
    """The age of this process in seconds, to a hundredth, including imports; None except on Linux."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot: field 22 in proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
