"""The order of data is arithmetic: a permutation of any size, found at any place without the places before it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacl.data.order import order_key, permuted

GOLDEN_KEY = 1113841310316876232
GOLDEN_10 = [8, 1, 0, 6, 3, 5, 9, 4]
GOLDEN_1E12 = [
    87914062418,
    12720658261,
    649682519963,
    250576020725,
    630858727758,
    935096738979,
    724638312519,
    961007977528,
]


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
def test_each_epoch_holds_every_item_exactly_once(n: int, key: int, epoch: int) -> None:
    draws = np.arange(n, dtype=np.int64) + epoch * n
    assert np.array_equal(np.sort(permuted(draws, n, key)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 97, 101, 1024, 4096, 10_007, 65_536])
def test_sizes_at_the_corners_are_permutations_too(n: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(n), n, 1)), np.arange(n))


@given(
    n=st.integers(1, 2**62 - 1),
    key=st.integers(0, 2**64 - 1),
    draws=st.lists(st.integers(0, 2**62), min_size=1, max_size=20),
)
def test_a_draw_does_not_depend_on_what_is_asked_beside_it(n: int, key: int, draws: list[int]) -> None:
    together = permuted(np.array(draws, dtype=np.int64), n, key)
    alone = [int(permuted(np.array([draw], dtype=np.int64), n, key)[0]) for draw in draws]
    assert together.tolist() == alone
    assert together.dtype == np.int64
    assert all(0 <= item < n for item in alone)


def test_at_1e12_items_a_million_draws_do_not_collide() -> None:
    items = permuted(np.arange(10**6) + 123_456_789, 10**12, 7)
    assert len(np.unique(items)) == 10**6


def test_epochs_seeds_sources_and_lengths_each_give_another_order() -> None:
    n = 1000
    first = permuted(np.arange(n), n, order_key(seed=0, fingerprint="a", seq_length=8))
    others = [
        permuted(np.arange(n, 2 * n), n, order_key(seed=0, fingerprint="a", seq_length=8)),
        permuted(np.arange(n), n, order_key(seed=1, fingerprint="a", seq_length=8)),
        permuted(np.arange(n), n, order_key(seed=0, fingerprint="b", seq_length=8)),
        permuted(np.arange(n), n, order_key(seed=0, fingerprint="a", seq_length=9)),
    ]
    for other in others:
        # Two random permutations agree in one place on average; 10 is beyond any luck.
        assert int((first == other).sum()) < 10


def test_order_v1_is_the_same_for_ever() -> None:
    """These numbers are v1. A change that breaks this test is order v2, beside v1, never instead of it."""
    key = order_key(seed=42, fingerprint="f" * 64, seq_length=2048)
    assert key == GOLDEN_KEY
    assert permuted(np.arange(8), 10, key).tolist() == GOLDEN_10
    assert permuted(np.arange(8) + 10**11, 10**12, key).tolist() == GOLDEN_1E12


def test_places_are_evenly_spread() -> None:
    """Chi-square of where the first tenth of an epoch falls, over ten equal parts, against a uniform draw."""
    n, keys = 10_000, 50
    cells = np.zeros(10)
    for key in range(keys):
        cells += np.bincount(permuted(np.arange(n // 10), n, key) * 10 // n, minlength=10)
    expected = keys * n / 100
    chi_square = float(((cells - expected) ** 2 / expected).sum())
    # 9 degrees of freedom: 27.9 is the 0.1 % quantile. Drawing without replacement spreads a little more evenly.
    assert chi_square < 27.9


def test_neighbouring_draws_land_far_apart_as_random_ones_do() -> None:
    n = 100_000
    items = permuted(np.arange(n), n, 3)
    distances = np.abs(np.diff(items))
    # The mean distance of two random places is n / 3, its spread n / sqrt(18): within five errors of the mean.
    assert abs(distances.mean() - n / 3) < 5 * n / np.sqrt(18) / np.sqrt(n)


@pytest.mark.parametrize("n", [0, -1, 2**62])
def test_a_size_out_of_range_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        permuted(np.arange(3), n, 0)


def test_a_negative_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        permuted(np.array([-1]), 10, 0)
