"""Subject `random`: time to add random numbers to a large array under jit, by kind of key."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.turns import take_turns
from pats_jax import random

BASE = "x + 1"
DRAWS: dict[str, Callable[[jax.Array, tuple[int, ...]], jax.Array]] = {
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0),
    "normal": jax.random.normal,
    "bernoulli": lambda key, shape: jax.random.bernoulli(key, 0.1, shape).astype(jnp.float32),
}


@dataclasses.dataclass(frozen=True)
class Random(report.Subject):
    """Time to add random numbers to an array in place, against adding 1, which is memory traffic alone."""

    kinds: tuple[str, ...] = ("fast", "threefry2x32", "rbg", "philox4x32")  # fast, or a name that jax.random.key takes
    draws: tuple[str, ...] = ("uniform", "normal", "bernoulli")  # what is drawn
    entries: int = 11_000_000  # float32, about MiniLM's encoder
    rounds: int = 15  # timed calls of each

    def run(self) -> report.Results:
        sides = {BASE: self._start(lambda key, shape: jnp.float32(1), random.fast_key(0))}
        for kind in self.kinds:
            key = random.fast_key(0) if kind == "fast" else jax.random.key(0, impl=kind)
            sides |= {f"{kind} {name}": self._start(DRAWS[name], key) for name in self.draws}
        turns = take_turns(sides, self.rounds)
        results = report.Results()
        title = f"{self.entries / 1e6:.1f}M numbers added to an array, {self.rounds} rounds"
        table = report.table(title, "numbers", "median, ms", f"to {BASE}")
        for name in sides:
            ratio = turns.ratio(name, BASE)
            median = turns.median(name)
            results.measured[name] = {"median_seconds": median, "ratio": ratio, "seconds": turns.seconds[name]}
            if name != BASE:
                results.ratios[name] = ratio
            table.add_row(name, f"{1e3 * median:.2f}", f"{ratio:.2f}")
        results.tables.append(table)
        return results

    def _start(self, draw: Callable, key: jax.Array) -> Callable[[], Any]:
        add = jax.jit(lambda x, key: x + draw(key, x.shape), donate_argnums=0)
        held = [jnp.zeros(self.entries)]

        def run():
            held[0] = add(held[0], key)
            return held[0]

        return run
