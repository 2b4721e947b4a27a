"""Random numbers at the cost of memory traffic: the project's own kind of JAX key.

PATS draws a number for every parameter at every step, so the generator must be cheap. This kind of key makes its
numbers from a few 32-bit integer operations on (key, index of the element), which XLA fuses into the update that uses
them. A draw depends only on the key and on the element's index in the whole array: any sharding of the array over
devices gives the same numbers. ``jax.random.uniform``, ``split``, ``fold_in`` and the rest of ``jax.random``, and
Flax's ``rngs``, accept such a key like any other.

NOT FOR SECRETS: the construction is fast and statistically tested (``docs/random.md``), not cryptographic.

The generator, in full (all words are uint32, all arithmetic is modulo 2**32, ``^`` is exclusive or, of pairs word by
word). The mixing function is published; its composition into keys and words is ours::

    mix(x):                 x ^= x >> 16;  x *= 0x21f0aaad;  x ^= x >> 15;  x *= 0xd35a2d97;  x ^= x >> 15
    feistel(l, r; c):       four rounds i = 1..4 of  (l, r) <- (r, l ^ mix(r + (c + i) * 0x9e3779b9))
    derive(key, block):     feistel(feistel(key ^ block; 0) ^ key; 4)

    seed s (64 bits)        key  = derive((0xa4093822, 0x299f31d0), (s >> 32, s mod 2**32))
    split, child i          key_i = derive(key, (i, 0x13198a2e))
    fold_in of d            key' = derive(key, (d, 0x03707344))
    32 bits of element e    (a, b) = feistel(key ^ (e_block, 0x243f6a88); 0)
                            u = mix(e_offset ^ a);   word = mix(u ^ b) + u
    8 or 16 bits            the top bits of that word
    64 bits                 low half: that word; high half: one made with 0x85a308d3 instead of 0x243f6a88

An array of at most 2**32 elements is one block: e_block is 0 and e_offset the element's row-major index. A larger array
is divided along its leading dimensions: e_offset is the row-major index over the longest run of trailing dimensions
whose product is at most 2**32, and e_block the row-major index over the dimensions before it.

Why this construction: for a given key, ``derive`` is one-to-one in the block, so all children of a key by ``split`` and
``fold_in`` differ, and no two seeds share a key. (a, b) is one-to-one in the key, so no two keys share their (a, b).
The final ``+ u`` makes the words of a stream repeat as often as random words do; without it the first 2**32 words would
all differ. Whatever depends on the key alone is computed once, not for each element. The domain words are the first
hexadecimal digits of the fraction of pi, and 0x9e3779b9 those of the golden ratio.

References:
  The mixing function: C. Wellons, "Prospecting for Hash Functions" (2018), https://nullprogram.com/blog/2018/07/31/,
  with the constants listed at https://github.com/skeeto/hash-prospector/issues/19 (found by the user TheIronBorn).
  The network: M. Luby and C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions",
  SIAM J. Comput. 17 (1988); the key added before and after: S. Even and Y. Mansour, J. Cryptology 10 (1997).
  Counters in place of states: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import define_prng_impl

NAME = "pats_fast"

_GOLDEN = 0x9E3779B9
_SEED_KEY = (0xA4093822, 0x299F31D0)
_BITS, _BITS_HIGH, _SPLIT, _FOLD_IN = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344

_Pair = tuple[jax.Array, jax.Array]


def fast_key(seed: Any) -> jax.Array:
    """Makes a key of the fast kind from an integer seed.

    Args:
      seed: a Python, NumPy or JAX integer, traced or not, of at most 64 bits. Negative seeds are taken modulo 2**64, so
        every seed from -2**63 to 2**63 - 1 has its own key, even without JAX's 64-bit mode.

    Returns:
      A typed key, an array of shape ().

    Raises:
      TypeError: if the seed is not an integer.
      ValueError: if the seed is an array, or does not fit in 64 bits.

    Examples:
      >>> key = fast_key(0)
      >>> jax.random.bits(key, (2,))
      Array([965448177, 842631996], dtype=uint32)
    """
    if not _is_integer(seed):
        raise TypeError(f"a seed must be an integer, got {_describe(seed)}")
    if np.ndim(seed):
        raise ValueError(f"a seed must be one integer, got {_describe(seed)}: use jax.vmap(fast_key) for many")
    if isinstance(seed, jax.Array):
        return jax.random.key(seed, impl=KIND)
    # jax.random.key would cut a host integer to 32 bits where 64-bit mode is off.
    value = operator.index(seed)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"a seed must fit 64 bits, got {value}")
    high, low = divmod(value % 2**64, 2**32)
    return jax.random.wrap_key_data(_key_of_seed(np.uint32(high), np.uint32(low)), impl=KIND)


def as_key(key: Any) -> jax.Array:
    """Converts an argument named ``key`` to a typed key.

    Args:
      key: an integer seed, which becomes a key of the fast kind, or a typed key of any kind, which is returned as it
        is.

    Returns:
      A typed key of shape ().

    Raises:
      TypeError: if it is neither an integer nor a key.
      ValueError: if it is a legacy uint32 key, or an array of several keys or seeds.
    """
    if _is_typed_key(key):
        if key.ndim:
            raise ValueError(f"key must be a single key, got {_describe(key)}: use jax.vmap for many")
        return key
    if not _is_integer(key):
        raise TypeError(f"key must be an integer seed or a typed key of jax.random.key, got {_describe(key)}")
    if np.ndim(key) and key.dtype == np.uint32:
        raise ValueError(
            f"key is a legacy uint32 key, {_describe(key)}: pass an integer seed or a typed key"
            " (jax.random.key(seed), or jax.random.wrap_key_data(key))"
        )
    return fast_key(key)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class StoredKey:
    """A key as training states hold it: a pytree node with one leaf, an array of plain integers.

    JAX identifies the fast kind only by its object, so Orbax, for example, could save a typed key of it but not restore
    it. The words are an ordinary array.

    Attributes:
      words: uint32, of the shape of the keys, followed by that of one key's data ((2,) for the fast kind).
      kind: static; the kind's name, or the result of ``jax.random.key_impl`` for a kind without a registered name.

    Examples:
      >>> stored = StoredKey.of(fast_key(0))
      >>> stored.kind, stored.words.shape, stored.key == fast_key(0)
      ('pats_fast', (2,), Array(True, dtype=bool))
    """

    words: jax.Array
    kind: Hashable

    @classmethod
    def of(cls, key: jax.Array) -> "StoredKey":
        """Stores a typed key in its own buffer, so donating the state does not invalidate the key."""
        kind = jax.random.key_impl(key)
        return cls(jnp.copy(jax.random.key_data(key)), NAME if kind == KIND else kind)

    @property
    def key(self) -> jax.Array:
        """The typed key; in a state from `jax.eval_shape`, its shape and dtype."""
        wrap = functools.partial(jax.random.wrap_key_data, impl=KIND if self.kind == NAME else self.kind)
        return jax.eval_shape(wrap, self.words) if isinstance(self.words, jax.ShapeDtypeStruct) else wrap(self.words)


def is_stored_key(x: Any) -> bool:
    """Whether a node of a tree is a `StoredKey`, for ``is_leaf``."""
    return isinstance(x, StoredKey)


def key_to_data(key: jax.Array) -> tuple[jax.Array, str]:
    """Splits a typed key into its words and the name of its kind, to store it in a file.

    JAX identifies kinds made by ``define_prng_impl`` only by their object, so a file cannot hold the key itself.

    Args:
      key: a typed key, or an array of them, of the fast kind or one of JAX's own ("threefry2x32", "rbg", ...).

    Returns:
      The words, uint32 as in `StoredKey`, and the kind's name.

    Raises:
      TypeError: if it is not a typed key.
      ValueError: if the kind has no registered name by which it could be restored.
    """
    if not _is_typed_key(key):
        raise TypeError(f"only a typed key has a kind to store, got {_describe(key)}")
    kind = jax.random.key_impl(key)
    if kind == KIND:
        kind = NAME
    if not isinstance(kind, str):
        raise ValueError(f"keys of the unregistered kind {kind} cannot be stored: the kind could not be restored")
    return jax.random.key_data(key), kind


def key_from_data(data: Any, kind: str) -> jax.Array:
    """Makes the typed key again from what `key_to_data` returned.

    Args:
      data: the words, a NumPy or JAX array of uint32.
      kind: the kind's name.

    Returns:
      The key, or the array of keys.

    Raises:
      ValueError: if JAX has no kind of that name.
    """
    return jax.random.wrap_key_data(jnp.asarray(data), impl=KIND if kind == NAME else kind)


# In terms of lax, whose operations JAX traces faster than operators between arrays.
def mix(x: jax.Array) -> jax.Array:
    """The published mixing function, see the module's docstring: one-to-one on uint32 words."""
    x = lax.mul(_xor_shift(x, 16), np.uint32(0x21F0AAAD))
    x = lax.mul(_xor_shift(x, 15), np.uint32(0xD35A2D97))
    return _xor_shift(x, 15)


def _xor_shift(x, distance):
    return lax.bitwise_xor(x, lax.shift_right_logical(x, np.uint32(distance)))


def _feistel(left: jax.Array, right: jax.Array, start: int = 0) -> _Pair:
    """Four rounds numbered from ``start + 1``: one-to-one on pairs of words."""
    for number in range(start + 1, start + 5):
        added = lax.add(right, np.uint32(number * _GOLDEN % 2**32))
        left, right = right, lax.bitwise_xor(left, mix(added))
    return left, right


# The functions handed to define_prng_impl stay plain, for only so can keys be pickled; their work is jitted below them.
@jax.jit(inline=True)
def _derive(key: _Pair, block: _Pair) -> jax.Array:
    """``derive`` of the module's docstring: the words of a key, (..., 2), one-to-one in the block."""
    left, right = _feistel(key[0] ^ block[0], key[1] ^ block[1])
    return jnp.stack(_feistel(left ^ key[0], right ^ key[1], start=4), axis=-1)


def _key_of_seed(high: Any, low: Any) -> jax.Array:
    # NumPy's scalars: JAX's would each be a program of its own
    return _derive((np.uint32(_SEED_KEY[0]), np.uint32(_SEED_KEY[1])), (high, low))


def _seed(seed: jax.Array) -> jax.Array:
    """The key's words, shape (2,), for an integer array of shape (); narrow types are sign-extended."""
    if not jnp.issubdtype(seed.dtype, jnp.integer):
        raise TypeError(f"a seed must be an integer, got {seed.dtype}")
    high = seed >> 32 if seed.dtype.itemsize == 8 else jnp.where(seed < 0, np.uint32(0xFFFFFFFF), np.uint32(0))
    return _key_of_seed(high.astype(jnp.uint32), seed.astype(jnp.uint32))


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if math.prod(shape) > 2**32:
        raise ValueError(f"split makes at most 2**32 keys, got shape {shape}")
    return _derive((key[0], key[1]), (row_major_index(shape), jnp.uint32(_SPLIT)))


def _fold_in(key: jax.Array, data: Any) -> jax.Array:
    return _derive((key[0], key[1]), (data.astype(jnp.uint32), jnp.uint32(_FOLD_IN)))


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    words = _words(key, _BITS, shape)
    if bit_width == 64:
        return (_words(key, _BITS_HIGH, shape).astype(jnp.uint64) << 32) | words.astype(jnp.uint64)
    return (words >> (32 - bit_width)).astype(f"uint{bit_width}")


@jax.jit(static_argnums=(1, 2))  # not inline: arrays of one shape share their program
def _words(key: jax.Array, domain: int, shape: tuple[int, ...]) -> jax.Array:
    """One random uint32 for each element of an array of ``shape``."""
    # The block of an array within 2**32 elements is the scalar 0, so its (a, b) are scalars and out of XLA's loop.
    leading = _leading_dimensions(shape)
    block = row_major_index(shape[:leading]).reshape(shape[:leading] + (1,) * (len(shape) - leading))
    a, b = _feistel(key[0] ^ block, key[1] ^ np.uint32(domain))
    u = mix(row_major_index(shape[leading:]) ^ a)
    return mix(u ^ b) + u


def _leading_dimensions(shape: tuple[int, ...]) -> int:
    """The number of leading dimensions that count blocks: the smallest that leaves blocks of at most 2**32 elements."""
    leading = 0
    while math.prod(shape[leading:]) > 2**32:
        leading += 1
    if math.prod(shape[:leading]) > 2**32:
        raise ValueError(f"keys of the fast kind cannot fill shape {shape}: over 2**32 blocks of 2**32 elements")
    return leading


def row_major_index(shape: tuple[int, ...]) -> jax.Array:
    """Each element's index in C order, uint32, from one iota per dimension, which XLA can shard and fuse."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for dimension in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, dimension) * np.uint32(stride % 2**32)
        stride *= shape[dimension]
    return index


def _is_typed_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_integer(x: Any) -> bool:
    """Whether x is an integer or an array of integers; neither bools nor typed keys count."""
    if isinstance(x, int):
        return not isinstance(x, bool)
    return isinstance(x, np.integer | np.ndarray | jax.Array) and jnp.issubdtype(x.dtype, jnp.integer)


def _describe(x: Any) -> str:
    """A short description for an error message."""
    if isinstance(x, np.ndarray | jax.Array):
        return f"an array of {x.dtype} of shape {x.shape}"
    return f"{x!r:.60} of type {type(x).__name__}"


KIND = define_prng_impl(
    key_shape=(2,), seed=_seed, split=_split, random_bits=_random_bits, fold_in=_fold_in, name=NAME, tag=NAME
)
