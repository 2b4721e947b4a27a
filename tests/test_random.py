"""The fast kind of key: its numbers against a NumPy computation, its manners inside JAX, seeds, storage, errors."""

import copy
import os
import pickle
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from pats_jax import random

KEY_DATA = (0xDEADBEEF, 0x01234567)
BITS, BITS_HIGH, SPLIT, FOLD_IN = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344


# The generator as the docstring of pats_jax.random defines it, in NumPy, on uint64 arrays cut to 32 bits.


def mix(x):
    x = np.asarray(x, np.uint64)
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
    x = ((x ^ (x >> 15)) * 0xD35A2D97) % 2**32
    return x ^ (x >> 15)


def feistel(left, right, c):
    for i in (1, 2, 3, 4):
        left, right = right, left ^ mix((right + (c + i) * 0x9E3779B9) % 2**32)
    return left, right


def derive(key, block):
    key, block = np.asarray(key, np.uint64), [np.asarray(word, np.uint64) for word in block]
    left, right = feistel(key[0] ^ block[0], key[1] ^ block[1], 0)
    return np.stack(feistel(left ^ key[0], right ^ key[1], 4), -1)


def reference_words(key, block, offset, domain=BITS):
    key = np.asarray(key, np.uint64)
    a, b = feistel(key[0] ^ np.asarray(block, np.uint64), key[1] ^ np.uint64(domain), 0)
    u = mix(np.asarray(offset, np.uint64) ^ a)
    return (mix(u ^ b) + u) % 2**32


def wrapped(data=KEY_DATA):
    return jax.random.wrap_key_data(jnp.array(data, jnp.uint32), impl=random.KIND)


def data_of(key):
    return np.asarray(jax.random.key_data(key))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, -(2**31), 2**40 + 3, -(2**63), 2**63 - 1])
def test_seed_equals_numpy(seed):
    words = (seed >> 32) % 2**32, seed % 2**32
    np.testing.assert_array_equal(data_of(random.fast_key(seed)), derive((0xA4093822, 0x299F31D0), words))


def test_split_and_fold_in_equal_numpy():
    numbers = np.arange(6)
    np.testing.assert_array_equal(data_of(jax.random.split(wrapped(), 6)), derive(KEY_DATA, (numbers, SPLIT)))
    np.testing.assert_array_equal(
        data_of(jax.random.split(wrapped(), (2, 3))), derive(KEY_DATA, (numbers, SPLIT)).reshape(2, 3, 2)
    )
    for data in (0, 1, 2**32 - 1):
        np.testing.assert_array_equal(data_of(jax.random.fold_in(wrapped(), data)), derive(KEY_DATA, (data, FOLD_IN)))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 3)])
def test_bits_equal_numpy(shape):
    offset = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    words = reference_words(KEY_DATA, 0, offset)
    for width in (8, 16, 32):
        bits = jax.random.bits(wrapped(), shape, f"uint{width}")
        assert bits.dtype == f"uint{width}"
        np.testing.assert_array_equal(bits, words >> (32 - width))


def test_64_bits_equal_numpy():
    with jax.enable_x64(True):
        bits = np.asarray(jax.random.bits(wrapped(), (5,), "uint64"))
    low, high = (reference_words(KEY_DATA, 0, np.arange(5), domain) for domain in (BITS, BITS_HIGH))
    np.testing.assert_array_equal(bits, high << 32 | low)


def test_arrays_beyond_32_bits_of_index_do_not_repeat():
    """Shape (3, 2, 2**31): XLA computes only the eight words that are asked for, on both sides of the 2**32-th."""
    draw = jax.jit(lambda key: jax.random.bits(key, (3, 2, 2**31))[:2, :, :2])
    assert draw.lower(wrapped()).compile().memory_analysis().temp_size_in_bytes < 2**20
    block = np.arange(2)[:, None, None]
    offset = np.arange(2)[:, None] * 2**31 + np.arange(2)
    words = np.asarray(draw(wrapped()))
    np.testing.assert_array_equal(words, reference_words(KEY_DATA, block, offset))
    assert len(np.unique(words)) == 8


@pytest.mark.parametrize("shape", [(2**32 + 1,), (2**17, 2**32, 2**17)])
def test_shapes_without_enough_blocks_are_refused(shape):
    with pytest.raises(ValueError, match="cannot fill shape"):
        jax.jit(lambda key: jax.random.bits(key, shape)).lower(wrapped())


def test_same_numbers_under_every_transformation():
    key = random.fast_key(3)
    keys = jax.random.split(key, 4)
    one_by_one = np.stack([jax.random.uniform(k, (5, 3)) for k in keys])

    def draw(k):
        return jax.random.uniform(k, (5, 3))

    def scanned(k):
        return jax.lax.scan(lambda carry, _: (jax.random.split(carry)[0], draw(carry)), k, length=4)

    np.testing.assert_array_equal(jax.jit(draw)(keys[0]), one_by_one[0])
    np.testing.assert_array_equal(jax.vmap(draw)(keys), one_by_one)
    np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), one_by_one)
    chain, draws = [key], jax.jit(scanned)(key)[1]
    for _ in range(3):
        chain.append(jax.random.split(chain[-1])[0])
    np.testing.assert_array_equal(draws, np.stack([draw(k) for k in chain]))
    assert jax.eval_shape(draw, key) == jax.ShapeDtypeStruct((5, 3), jnp.float32)
    assert jax.eval_shape(random.fast_key, 0).dtype == key.dtype


def test_donated_key_is_reused():
    key = random.fast_key(0)
    expected = data_of(jax.random.split(key)[0])
    next_key = jax.jit(lambda k: jax.random.split(k)[0], donate_argnums=0)(key)
    assert key.is_deleted()
    np.testing.assert_array_equal(data_of(next_key), expected)


@pytest.mark.devices(8)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(), P("x"), P("x", "y"), P(None, ("x", "y"))])
def test_sharding_does_not_change_the_numbers(axis_type, spec):
    def add_noise(key, x):
        return x + jax.random.uniform(jax.random.fold_in(key, 3), x.shape)

    key, zeros = random.fast_key(1), jnp.zeros((16, 24))
    expected = np.asarray(jax.jit(add_noise)(key, zeros))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(zeros, NamedSharding(mesh, spec))
        compiled = jax.jit(add_noise).lower(key, sharded).compile()
        noisy = compiled(key, sharded)
    assert noisy.sharding.is_equivalent_to(sharded.sharding, 2)
    np.testing.assert_array_equal(noisy, expected)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "collective", "all-to-all"))


@pytest.mark.devices(8)
def test_pmap_and_shard_map_draw_as_one_device():
    key, zeros = random.fast_key(1), jnp.zeros((8, 3, 5))
    expected = np.broadcast_to(jax.random.uniform(key, (3, 5)), (8, 3, 5))

    def draw(k, x):
        return x + jax.random.uniform(k, (3, 5))

    np.testing.assert_array_equal(jax.pmap(draw, in_axes=(None, 0))(key, zeros), expected)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    for check in (True, False):
        mapped = jax.shard_map(draw, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"), check_vma=check)
        np.testing.assert_array_equal(jax.jit(mapped)(key, zeros), expected)
    keys = jax.random.split(key, 8)
    each_its_own = jax.pmap(lambda k: jax.random.bits(k, (2,)))(keys)
    np.testing.assert_array_equal(each_its_own, np.stack([jax.random.bits(k, (2,)) for k in keys]))


def test_the_rest_of_jax_random_takes_the_key():
    key = random.fast_key(0)
    np.testing.assert_array_equal(np.sort(jax.random.permutation(key, 1000)), np.arange(1000))
    integers = jax.random.randint(key, (1000,), -3, 4)
    np.testing.assert_array_equal(np.unique(integers), np.arange(-3, 4))
    assert abs(np.mean(jax.random.bernoulli(key, 0.3, (10_000,))) - 0.3) < 0.02
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        uniform = jax.random.uniform(key, (1000,), dtype)
        assert uniform.dtype == dtype and 0 <= uniform.min() < 0.02 and 0.98 < uniform.max() < 1


def test_flax_dropout_takes_the_key():
    x = jnp.ones((100, 100))
    linen = nn.Dropout(0.25, deterministic=False)
    first, again = (linen.apply({}, x, rngs={"dropout": random.fast_key(0)}) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert abs(np.mean(first == 0) - 0.25) < 0.02
    assert np.any(first != linen.apply({}, x, rngs={"dropout": random.fast_key(1)}))
    dropped = nnx.Dropout(0.25, rngs=nnx.Rngs(dropout=random.fast_key(0)))(x)
    assert abs(np.mean(dropped == 0) - 0.25) < 0.02


@pytest.mark.parametrize("seed", [0, 7, -7, 2**31 - 1, -(2**31)])
def test_seed_may_be_python_numpy_jax_or_traced(seed):
    expected = data_of(random.fast_key(seed))
    variants = [np.int64(seed), np.int32(seed), np.array(seed), jnp.int32(seed)]
    variants += [np.int8(seed), jnp.int8(seed)] if abs(seed) < 100 else []
    for variant in variants:
        np.testing.assert_array_equal(data_of(random.fast_key(variant)), expected)
    np.testing.assert_array_equal(data_of(jax.jit(random.fast_key)(seed)), expected)
    np.testing.assert_array_equal(data_of(jax.vmap(random.fast_key)(jnp.array([seed])))[0], expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(data_of(jax.jit(random.fast_key)(seed)), expected)


def test_distinct_seeds_have_distinct_keys():
    seeds = [*range(-50, 50), *(2**power + offset for power in range(31, 63) for offset in (-60, 60))]
    seeds += [-(2**63), 2**63 - 1]
    assert len({data_of(random.fast_key(seed)).tobytes() for seed in seeds}) == len(seeds)
    np.testing.assert_array_equal(data_of(random.fast_key(np.uint64(2**64 - 1))), data_of(random.fast_key(-1)))


def test_as_key_makes_ints_fast_and_keeps_typed_keys():
    assert random.as_key(5) == random.fast_key(5)
    for kind in ("threefry2x32", "rbg", random.KIND):
        key = jax.random.key(5, impl=kind)
        assert random.as_key(key) is key
    traced = jax.jit(lambda seed: jax.random.key_data(random.as_key(seed)))(5)
    np.testing.assert_array_equal(traced, data_of(random.fast_key(5)))


@pytest.mark.parametrize("wrong", [True, np.bool_(True), 1.0, np.float32(1), "1", None, [1], jnp.array(True)])
def test_as_key_refuses_what_is_no_integer(wrong):
    with pytest.raises(TypeError, match="^key must be an integer seed or a typed key[^\n]*$"):
        random.as_key(wrong)


def test_as_key_refuses_legacy_keys_and_arrays():
    for legacy in (jax.random.PRNGKey(0), np.zeros(2, np.uint32), jax.random.PRNGKey(0, impl="rbg")):
        with pytest.raises(ValueError, match="^key is a legacy uint32 key[^\n]*$"):
            random.as_key(legacy)
    with pytest.raises(ValueError, match="^key must be a single key[^\n]*vmap"):
        random.as_key(jax.random.split(random.fast_key(0)))
    with pytest.raises(ValueError, match="^a seed must be one integer[^\n]*vmap"):
        random.as_key(jnp.arange(3))


@pytest.mark.parametrize("wrong, error", [(True, TypeError), (0.5, TypeError), (2**64, ValueError)])
def test_fast_key_refuses_what_is_no_seed(wrong, error):
    with pytest.raises(error, match="^a seed must"):
        random.fast_key(wrong)


@pytest.mark.parametrize("kind", [random.KIND, "threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_key_survives_storage(kind, shape):
    keys = jax.random.split(jax.random.key(1, impl=kind), shape)
    data, name = random.key_to_data(keys)
    assert isinstance(name, str) and data.dtype == jnp.uint32
    restored = random.key_from_data(np.array(data), name)
    assert restored.dtype == keys.dtype and restored.shape == shape
    assert np.all(restored == keys)
    assert np.all(pickle.loads(pickle.dumps(keys)) == keys)
    assert np.all(copy.deepcopy(keys) == keys)


def test_storage_refuses_what_it_cannot_restore():
    with pytest.raises(TypeError, match="only a typed key"):
        random.key_to_data(jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="unrecognized PRNG implementation"):
        random.key_from_data(np.zeros(2, np.uint32), "no such kind")


def test_import_starts_no_backend():
    """Starting one would fail here, for the platform does not exist."""
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    subprocess.run([sys.executable, "-c", "import pats_jax.random"], env=environment, check=True)
