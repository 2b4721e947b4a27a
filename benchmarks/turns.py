"""Measuring in turns: one call of each variant after the other, round after round, in one process.

Whatever else the machine does falls on all variants alike; the order within a round is drawn anew, so that none of them
always comes after the same other one. A ratio is the median of the ratios within the rounds, so a
machine that becomes slower or faster on the way does not change it.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from pats_jax.errors import InputError

PIPELINED = 20  # calls timed together on an accelerator


@dataclasses.dataclass(frozen=True)
class Turns:
    """What was measured.

    Attributes:
      seconds: variant -> seconds of its call in each round.
    """

    seconds: dict[str, list[float]]

    def median(self, name: str, rounds: Iterable[int] | None = None) -> float:
        """Median seconds of a variant, over some rounds (counted from 0) or all."""
        return statistics.median(self._of(name, rounds))

    def ratio(self, name: str, base: str, rounds: Iterable[int] | None = None) -> float:
        """Median over the rounds of one variant's seconds over another's."""
        rounds = None if rounds is None else list(rounds)
        pairs = zip(self._of(name, rounds), self._of(base, rounds), strict=True)
        return statistics.median(seconds / base_seconds for seconds, base_seconds in pairs)

    def difference(self, name: str, base: str) -> float:
        """Median over the rounds of one variant's seconds less another's."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(seconds - base_seconds for seconds, base_seconds in pairs)

    def _of(self, name, rounds):
        return self.seconds[name] if rounds is None else [self.seconds[name][number] for number in rounds]


def calls_together(asked: int | None) -> int:
    """Calls that are timed together: as many as ``--pipelined`` says; without it one on CPU, else `PIPELINED`.

    Raises:
      InputError: if they are fewer than 1.
    """
    if asked is not None and asked < 1:
        raise InputError(f"--pipelined {asked}: must be at least 1")
    return asked or (1 if jax.default_backend() == "cpu" else PIPELINED)


def take_turns(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    untimed: int = 0,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Times each variant once a round, waiting for what it returns.

    Args:
      variants: name -> a function; what it returns may hold arrays that the device is still at work on.
      rounds: rounds that count.
      warm_up: rounds before them, in which things compile.
      untimed: calls of a variant right before its timed one, so that what another did to memory does not count.
      calls: calls that are timed together, waiting for the last one only, as a training loop does on an accelerator.
      clock: seconds.

    Returns:
      The seconds of every call, or of one call on average where several are timed together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, generator = list(variants), random.Random(0)
    for number in range(-warm_up, rounds):
        generator.shuffle(order)
        for name in order:
            for _ in range(untimed):
                jax.block_until_ready(variants[name]())
            started = clock()
            for _ in range(calls):
                result = variants[name]()
            jax.block_until_ready(result)
            if number >= 0:
                seconds[name].append((clock() - started) / calls)
            del result
    return Turns(seconds)


def take_turns_in_set_ups(
    starts: Mapping[str, Callable[[], Callable[[], Any]]],
    set_ups: int,
    rounds: int,
    *,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Times each variant once a round, with its arrays put into memory anew several times.

    Where arrays lie in memory changes how long work that is bound by memory takes, and the order of allocations decides
    it; so that is drawn anew too, and no ratio rests on one of them.

    Args:
      starts: name -> a function that allocates what the variant works on and returns what `take_turns` calls. What one
        set-up holds is free before the next one.
      set_ups: how many times all variants are started, in an order drawn anew.
      rounds: rounds that count in each of them, after one that does not.
      calls: see `take_turns`.
      clock: seconds.

    Returns:
      The seconds of every call, set-up after set-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    order, generator = list(starts), random.Random(1)
    for _ in range(set_ups):
        generator.shuffle(order)
        turns = take_turns({name: starts[name]() for name in order}, rounds, calls=calls, clock=clock)
        for name in starts:
            seconds[name] += turns.seconds[name]
    return Turns(seconds)
