"""The orders are as random as numpy's permutations: the statistics of tools/bench/order.py, over fixed keys."""

import itertools

import numpy as np
import pytest

from megacl.data.order import permuted
from tools.bench.order import SHARDS, STATISTICS, feistel, measure, positions, true, windowed

KEYS = 60


def test_there_is_one_permutation_of_one_item() -> None:
    assert permuted(np.arange(50), 1, 7).tolist() == [0] * 50


@pytest.mark.parametrize("n", [2, 3, 4])
def test_of_a_few_items_every_permutation_comes_equally_often(n: int) -> None:
    keys = 2400
    found = [tuple(permuted(np.arange(n) + key % 3 * n, n, key * 0x9E3779B97F4A7C15 % 2**64)) for key in range(keys)]
    every = list(itertools.permutations(range(n)))
    expected = keys / len(every)
    chi_square = sum((found.count(each) - expected) ** 2 / expected for each in every)
    # len(every) - 1 degrees of freedom: four standard deviations above the mean.
    assert chi_square < len(every) - 1 + 4 * np.sqrt(2 * (len(every) - 1)) + 4


@pytest.mark.parametrize("n", [97, 1009, 1024, 4096, 9973, 10**12])
def test_positions_neighbours_and_rank_slices_are_those_of_true_permutations(n: int) -> None:
    ours, theirs = measure(feistel, n, KEYS), measure(true, n, KEYS)
    errors = np.sqrt((ours.var(0, ddof=1) + theirs.var(0, ddof=1)) / KEYS)
    # The difference of two means, in its standard errors: 4 is one in 16,000.
    assert (np.abs(ours.mean(0) - theirs.mean(0)) / errors < 4).all()
    assert (ours.max(0) < 2 * theirs.max(0)).all()


def test_two_epochs_have_no_more_in_common_than_two_true_permutations() -> None:
    n = 4096
    agreeing = [(permuted(np.arange(n), n, key) == permuted(np.arange(n) + n, n, key)).sum() for key in range(200)]
    # The number of agreements of two random permutations has mean 1 and variance 1.
    assert abs(np.mean(agreeing) - 1) < 4 / np.sqrt(200)


def test_an_order_whose_one_window_holds_all_shards_is_as_random() -> None:
    n = 4096
    ours = np.array([[s(windowed(n, seed, window=SHARDS), n) for s in STATISTICS] for seed in range(KEYS)])
    theirs = measure(true, n, KEYS)
    errors = np.sqrt((ours.var(0, ddof=1) + theirs.var(0, ddof=1)) / KEYS)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) / errors < 4).all()


def test_smaller_windows_keep_shards_together_and_only_that() -> None:
    n = 4096
    within = [positions(windowed(n, seed), n) for seed in range(KEYS)]
    assert np.mean(within) > 3 * np.mean([positions(true(n, seed), n) for seed in range(KEYS)])
    # Over many keys, every eighth of the source gives as many of its eight shards to every window of the epoch.
    items = np.stack([windowed(n, seed) for seed in range(400)])
    eighths = [items[:, first : first + n // 8].ravel() * 8 // n for first in range(0, n, n // 8)]
    shards = np.array([np.bincount(each, minlength=8) for each in eighths]) / (n // SHARDS)
    # Of 64 shards, 8 of a kind, 8 are drawn: mean 1, variance 7/8 x 56/63, 400 times.
    assert np.abs(shards - 400).max() < 5 * np.sqrt(400 * 7 / 8 * 56 / 63)
