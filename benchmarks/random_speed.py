"""Time to add 11 million uniforms to an array under jit: the fast kind of key, threefry, and no randomness at all.

The variants take turns, so that whatever else the machine does falls on all of them alike; medians are printed. Run it
with ``python benchmarks/random_speed.py``.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from pats_jax import random

SHAPE = (11_000, 1_000)
ROUNDS = 15


def main() -> dict[str, float]:
    """Prints and returns the median milliseconds of each variant."""

    def noisy(x, key):
        return x + jax.random.uniform(key, x.shape, minval=-1.0, maxval=1.0)

    threefry, fast = jax.random.key(0, impl="threefry2x32"), random.fast_key(0)
    variants = {"x + 1": (lambda x, key: x + 1.0, fast), "fast kind": (noisy, fast), "threefry": (noisy, threefry)}
    compiled = {name: (jax.jit(function, donate_argnums=0), key) for name, (function, key) in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(ROUNDS + 1):
        for name, (function, key) in compiled.items():
            x = jax.block_until_ready(jnp.ones(SHAPE))
            started = time.perf_counter()
            jax.block_until_ready(function(x, key))
            times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first call compiles
    for name, milliseconds in medians.items():
        print(f"{name:10s} {milliseconds:7.1f} ms")
    return medians


if __name__ == "__main__":
    main()
