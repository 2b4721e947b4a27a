"""The fast kind of key as a generator: uniformity, independence within a stream and between streams.

Seeds are fixed, so a test passes always or never. P_BOUND is low because there are some hundreds of p-values here, of
which a perfect generator, too, would have a few below 1e-2. ``docs/random.md`` has the large batteries.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pats_jax import random
from pats_jax.transforms import DISTRIBUTIONS

P_BOUND = 1e-5
KEYS, WORDS = 512, 2048


def successive_seeds():
    return jax.vmap(random.fast_key)(jnp.arange(KEYS))


def successive_splits():
    return jax.random.split(random.fast_key(0), KEYS)


def successive_fold_ins():
    return jax.vmap(lambda step: jax.random.fold_in(random.fast_key(0), step))(jnp.arange(KEYS))


def leaves_of_successive_steps():
    def leaf(number):
        return jax.random.fold_in(jax.random.fold_in(random.fast_key(0), number // 32), number % 32)

    return jax.vmap(leaf)(jnp.arange(KEYS))


def one_bit_apart():
    """Raw key data in Gray code, each word in its turn: neighbours differ in one bit."""
    number = jnp.arange(KEYS, dtype=jnp.uint32)
    gray = number ^ (number >> 1)
    data = jnp.stack([gray >> 4 << 27 | gray & 1, gray >> 1 & 7], axis=-1)
    return jax.random.wrap_key_data(data, impl=random.KIND)


# Of the leaves' keys comes the noise; one bit apart is the hardest of all.
FAMILIES = [leaves_of_successive_steps, one_bit_apart]
FAMILIES += [
    pytest.param(family, marks=pytest.mark.slow)
    for family in (successive_seeds, successive_splits, successive_fold_ins)
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def streams(request):
    """(KEYS, WORDS) uint32: the first words of every key of one family."""
    return np.asarray(jax.jit(jax.vmap(lambda key: jax.random.bits(key, (WORDS,))))(request.param()))


@pytest.fixture(scope="module")
def long_stream():
    return np.asarray(jax.random.bits(random.fast_key(0), (2**20,)))


def chi_square_p(counts, expected=None):
    return stats.chisquare(np.ravel(counts), expected).pvalue


def bit_counts(words):
    """How many of the words along the first axis have each bit set, shape (..., 32)."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    return np.unpackbits(octets, axis=-1).sum(axis=0, dtype=np.int64)


def bits_p(words):
    """The p-value of all bits being balanced, over the words along the first axis."""
    deviations = (bit_counts(words) - len(words) / 2) / np.sqrt(len(words) / 4)
    return stats.chi2.sf(np.sum(deviations**2), deviations.size)


def assert_uncorrelated(x, y):
    """Pearson's correlation of two arrays of independent words is 0 with standard deviation 1/sqrt(n)."""
    x, y = (np.ravel(words).astype(np.float64) for words in (x, y))
    assert abs(np.corrcoef(x, y)[0, 1]) * np.sqrt(x.size) < stats.norm.isf(P_BOUND / 2)


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_of_a_long_stream_are_uniform(long_stream, shift):
    assert chi_square_p(np.bincount(long_stream >> shift & 255)) > P_BOUND
    pairs = (long_stream[:-1] >> shift & 255) << 8 | long_stream[1:] >> shift & 255
    assert chi_square_p(np.bincount(pairs[::2])) > P_BOUND


def test_bits_of_a_long_stream_are_balanced_and_independent(long_stream):
    assert bits_p(long_stream) > P_BOUND
    for lag in (1, 2, 3, 16, 256, 1000, 1024, 2**16):
        assert bits_p(long_stream[lag:] ^ long_stream[:-lag]) > P_BOUND
        assert_uncorrelated(long_stream[lag:], long_stream[:-lag])


def test_bits_of_a_word_are_independent_of_each_other(long_stream):
    bits = np.unpackbits(long_stream.view(np.uint8)).reshape(-1, 32)
    signs = 1 - 2 * bits.astype(np.float32)
    correlations = (signs.T @ signs)[np.triu_indices(32, 1)] / np.sqrt(len(signs))
    assert stats.chi2.sf(np.sum(correlations**2), correlations.size) > P_BOUND


def test_words_repeat_as_often_as_random_words(long_stream):
    """n random words hold about n**2 / 2**33 repetitions; a one-to-one function of the index would have none."""
    repetitions = len(long_stream) - len(np.unique(long_stream))
    expected = len(long_stream) ** 2 / 2**33
    assert stats.poisson.sf(repetitions - 1, expected) > P_BOUND and stats.poisson.cdf(repetitions, expected) > P_BOUND


def test_runs_and_gaps_are_those_of_coin_flips(long_stream):
    """The lengths of runs of equal bits, for each bit of the word, are geometric with mean 2."""
    for bit in range(32):
        flips = np.flatnonzero(np.diff(long_stream >> bit & 1))
        lengths = np.bincount(np.minimum(np.diff(flips), 12), minlength=13)[1:]
        shares = np.append(0.5 ** np.arange(1, 12), 0.5**11)
        assert chi_square_p(lengths, shares * lengths.sum()) > P_BOUND


def test_every_bit_of_the_index_turns_over_half_the_word(long_stream):
    index = np.arange(len(long_stream))
    for bit in range(20):
        clear = index[index >> bit & 1 == 0]
        assert bits_p(long_stream[clear] ^ long_stream[clear + 2**bit]) > P_BOUND


def test_streams_of_a_family_are_uniform_along_and_across(streams):
    for shift in (0, 24):
        values = streams >> shift & 255
        assert chi_square_p(np.bincount(values.ravel())) > P_BOUND
        table = np.array([np.bincount(stream >> 4, minlength=16) for stream in values])
        assert chi_square_p(table) > P_BOUND
        table = np.array([np.bincount(column >> 4, minlength=16) for column in values.T])
        assert chi_square_p(table) > P_BOUND
    assert bits_p(streams) > P_BOUND
    assert bits_p(streams.T) > P_BOUND


def test_neighbouring_streams_are_independent(streams):
    for distance in (1, 2, 3, 4, 8, 16, 32):
        near, far = streams[distance:], streams[:-distance]
        assert bits_p((near ^ far).reshape(-1)) > P_BOUND
        assert bits_p(near ^ far) > P_BOUND
        for lag in range(4):
            assert_uncorrelated(near[:, lag:], far[:, : WORDS - lag])


def test_streams_share_no_more_words_than_chance(streams):
    """Neither the same words in another order nor a shifted copy, anywhere in the family."""
    repetitions = streams.size - len(np.unique(streams))
    expected = streams.size**2 / 2**33
    assert stats.poisson.sf(repetitions - 1, expected) > P_BOUND


@pytest.mark.parametrize("word", [0, 1])
@pytest.mark.parametrize("derive", ["bits", "split", "fold_in"])
def test_one_bit_of_the_key_changes_half_of_everything(word, derive):
    """Avalanche: over many keys, each bit of the result flips with probability one half for each bit of the key."""
    data = jax.random.bits(random.fast_key(5), (2**12, 2))

    def result(key_data):
        key = jax.random.wrap_key_data(key_data, impl=random.KIND)
        if derive == "bits":
            return jax.random.bits(key, (2,))
        return jax.random.key_data(jax.random.split(key)[1] if derive == "split" else jax.random.fold_in(key, 1))

    results = jax.jit(jax.vmap(result))
    plain = np.asarray(results(data))
    for bit in range(32):
        flipped = np.asarray(results(data.at[:, word].set(data[:, word] ^ np.uint32(1 << bit))))
        assert bits_p(flipped ^ plain) > P_BOUND


def test_split_fold_in_and_bits_never_coincide():
    """Two generations of keys, made in every way, and the parent's own words read as keys."""
    parent = random.fast_key(0)
    numbers = jnp.arange(200)

    def folds(key):
        return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)

    first = [parent[None], jax.random.split(parent, 200), folds(parent), jax.vmap(random.fast_key)(numbers[1:])]
    second = [jax.vmap(lambda key: jax.random.split(key, 200))(keys) for keys in first]
    second += [jax.vmap(folds)(keys) for keys in first[1:]]
    data = [np.asarray(jax.random.key_data(keys)).reshape(-1, 2) for keys in first + second[1:]]
    data += [np.asarray(jax.random.bits(parent, (400,))).reshape(-1, 2)]
    data = np.concatenate(data)
    assert len(np.unique(data, axis=0)) == len(data) > 200_000


def test_equal_shaped_leaves_get_different_noise():
    leaves = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))}
    keys = jax.random.split(random.fast_key(0), 2)
    noise = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves.values(), strict=True)]
    assert abs(np.corrcoef(np.ravel(noise[0]), np.ravel(noise[1]))[0, 1]) < 4 / 64


EXACT = {
    "uniform": (jax.random.uniform, stats.uniform()),
    "normal": (jax.random.normal, stats.norm()),
    "uniform of pats_noise": (DISTRIBUTIONS["uniform"], stats.uniform(-np.sqrt(3), 2 * np.sqrt(3))),
    "normal of pats_noise": (DISTRIBUTIONS["normal"], stats.norm()),
}


@pytest.mark.parametrize("name", EXACT)
def test_floats_follow_their_distribution(name):
    draw, exact = EXACT[name]
    draws = np.asarray(draw(random.fast_key(11), (2**20,)), np.float64)
    assert stats.kstest(draws, exact.cdf).pvalue > P_BOUND
    for order in (1, 2, 3, 4):
        error = np.sqrt((exact.moment(2 * order) - exact.moment(order) ** 2) / draws.size)
        assert abs(np.mean(draws**order) - exact.moment(order)) < stats.norm.isf(P_BOUND / 2) * error
