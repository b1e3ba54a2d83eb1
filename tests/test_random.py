"""Threefry-2x32-20 and the uniforms made of it."""

import numpy as np
import pytest

from gemma_hub.generation.random import threefry2x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(key, counter, expected):
    assert tuple(int(word) for word in threefry2x32(key, counter)) == expected


def test_arrays_give_the_same_words_as_single_counters():
    rows, steps = np.arange(3)[:, None], np.arange(5)[None, :]
    first, second = threefry2x32((7, 9), (rows, steps))
    assert first.shape == second.shape == (3, 5)
    assert first.dtype == second.dtype == np.uint32
    for row in range(3):
        for step in range(5):
            words = threefry2x32((7, 9), (row, step))
            assert (first[row, step], second[row, step]) == tuple(words)


def test_the_same_words_as_jax():
    jax = pytest.importorskip("jax")
    threefry_2x32 = pytest.importorskip("jax.extend.random").threefry_2x32
    for seed in (0, 1, 12345, 2**32 - 1):
        key = jax.random.PRNGKey(seed)
        counters = np.arange(10, dtype=np.uint32)
        theirs = np.asarray(threefry_2x32(key, counters))  # first half, second half
        ours = np.concatenate(threefry2x32((0, seed), (counters[:5], counters[5:])))
        np.testing.assert_array_equal(ours, theirs)


def test_uniform_is_the_middle_of_a_23_bit_interval_and_exact_in_float32():
    numbers = uniform(3, np.arange(50)[:, None], np.arange(200)[None, :])
    assert numbers.dtype == np.float64
    np.testing.assert_array_equal(numbers.astype(np.float32).astype(np.float64), numbers)
    np.testing.assert_array_equal(numbers * 2**23 % 1, 0.5)
    assert numbers.min() > 0
    assert numbers.max() < 1


def test_the_key_is_the_seeds_two_words_and_the_counter_row_and_step():
    first, _ = threefry2x32((0x89ABCDEF, 0x01234567), (49, 199))
    assert uniform(0x89ABCDEF01234567, 49, 199) == ((int(first) >> 9) + 0.5) / 2**23


def test_uniform_uses_all_64_bits_of_the_seed_and_both_words_of_the_counter():
    low, high = 5, 1 << 32
    draws = [
        float(uniform(seed, row, step))
        for seed, row, step in [(low, 0, 0), (low + high, 0, 0), (low, 1, 0), (low, 0, 1)]
    ]
    assert len(set(draws)) == 4
    assert float(uniform(low, 1, 2)) != float(uniform(low, 2, 1))


def test_uniform_is_uniform():
    counts, _ = np.histogram(uniform(11, np.arange(100)[:, None], np.arange(1000)), 64, (0, 1))
    expected = 100_000 / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 103.4  # the 0.999 quantile for 63 degrees of freedom
