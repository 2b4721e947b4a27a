"""Writes random 32-bit words to standard output, for the batteries that test generators.

Each stream is one way in which a program comes by its numbers: one long array, or the first few words of many keys made
one after the other. Words of neighbouring keys lie side by side in the output, so that a battery sees any correlation
between them as a correlation within the stream. With dieharder (in Debian) and its raw input, generator 200::

    python benchmarks/randomness.py fold_in | dieharder -a -g 200

``--kind threefry2x32`` writes the same streams from one of JAX's own kinds of key, for comparison; ``long_array`` is
for the fast kind only, as XLA would make the whole array of any other. The script stops when its reader closes the
pipe, and says on standard error how many words it wrote. ``docs/random.md`` has the results.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax import random

CHUNK = 2**22  # words written at a time


def long_array(key: jax.Array, chunk: jax.Array, words_per_key: int) -> jax.Array:
    """One array of 2**40 words, a chunk after the other; XLA computes no more than the chunk asked for."""
    return jax.random.bits(key, (2**8, 2**10, CHUNK))[chunk // 2**10, chunk % 2**10]


def seeds(key: jax.Array, chunk: jax.Array, words_per_key: int) -> jax.Array:
    """Seeds 0, 1, 2, ...: the keys of runs that are to be averaged."""
    return _first_words(jax.vmap(lambda seed: _key_of_kind(seed, key))(_numbers(chunk, words_per_key)), words_per_key)


def split(key: jax.Array, chunk: jax.Array, words_per_key: int) -> jax.Array:
    """Children of one split after the other."""
    return _first_words(jax.random.split(jax.random.fold_in(key, chunk), CHUNK // words_per_key), words_per_key)


def fold_in(key: jax.Array, chunk: jax.Array, words_per_key: int) -> jax.Array:
    """fold_in of 0, 1, 2, ...: the keys of the steps of one run."""
    return _first_words(
        jax.vmap(lambda step: jax.random.fold_in(key, step))(_numbers(chunk, words_per_key)), words_per_key
    )


def nested(key: jax.Array, chunk: jax.Array, words_per_key: int) -> jax.Array:
    """fold_in of the step, then of each of 64 leaves: the keys that an optimizer uses."""
    number = _numbers(chunk, words_per_key)
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n // 64), n % 64))(number)
    return _first_words(keys, words_per_key)


def chain(key: jax.Array, chunk: jax.Array, words_per_key: int) -> jax.Array:
    """``key, subkey = split(key)`` again and again, 1024 such chains side by side."""

    def step(keys, _):
        pairs = jax.vmap(jax.random.split)(keys)
        return pairs[:, 0], _first_words(pairs[:, 1], words_per_key)

    starts = jax.random.split(jax.random.fold_in(key, chunk), 2**10)
    return jax.lax.scan(step, starts, length=CHUNK // words_per_key // 2**10)[1]


def key_bits(key: jax.Array, chunk: jax.Array, words_per_key: int) -> jax.Array:
    """Keys whose data, unmixed, are consecutive Gray codes: neighbours differ in one bit."""
    number = _numbers(chunk, words_per_key)
    data = jnp.stack([jnp.zeros_like(number), number ^ (number >> 1)], axis=-1)
    return _first_words(jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)), words_per_key)


def interleaved(key: jax.Array, chunk: jax.Array, words_per_key: int) -> jax.Array:
    """Word 0 of 1024 keys, then word 1 of them all, and so on: equal-shaped leaves of one step side by side."""
    keys = jax.random.split(jax.random.fold_in(key, chunk), 2**10)
    return jax.vmap(lambda k: jax.random.bits(k, (CHUNK // 2**10,)))(keys).T


STREAMS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
    function.__name__: function
    for function in (long_array, seeds, split, fold_in, nested, chain, key_bits, interleaved)
}


def words(stream: str, kind: str, seed: int, words_per_key: int) -> Iterator[np.ndarray]:
    """The stream's chunks, uint32, shape (CHUNK,), until its keys are used up."""
    start = random.fast_key(seed) if kind == random.NAME else jax.random.key(seed, impl=kind)
    draw = jax.jit(lambda chunk: STREAMS[stream](start, chunk, words_per_key))
    last = 2**18 if stream == "long_array" else 2**32 * words_per_key // CHUNK
    for chunk in range(last):
        yield np.asarray(draw(jnp.uint32(chunk))).reshape(-1)


def _numbers(chunk: jax.Array, words_per_key: int) -> jax.Array:
    count = CHUNK // words_per_key
    return chunk * np.uint32(count) + jnp.arange(count, dtype=jnp.uint32)


def _first_words(keys: jax.Array, count: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.bits(key, (count,)))(keys)


def _key_of_kind(seed: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.key(seed, impl=jax.random.key_impl(like))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", choices=STREAMS)
    parser.add_argument("--kind", default=random.NAME, help="kind of key: %(default)s or one of JAX's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words_per_key", type=int, default=4, help="a power of two; no effect on long_array")
    parser.add_argument("--max_chunks", type=int, help="stop after so many chunks of 16 MiB")
    flags = parser.parse_args()
    if flags.stream == "long_array" and flags.kind != random.NAME:
        parser.error(f"long_array needs --kind {random.NAME}: of any other kind the whole array would be made")

    written = 0
    try:
        chunks = words(flags.stream, flags.kind, flags.seed, flags.words_per_key)
        for chunk in itertools.islice(chunks, flags.max_chunks):
            sys.stdout.buffer.write(chunk.tobytes())
            written += chunk.size
    except BrokenPipeError:
        # Python would complain again when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"{flags.stream}: {written} words of {flags.kind} written", file=sys.stderr)


if __name__ == "__main__":
    main()
