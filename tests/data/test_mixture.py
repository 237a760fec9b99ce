"""Mixtures by exact counts: no drift at any prefix, and any sample found without the samples before it."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacl.data.mixture import MAX_PERIOD, Mixture, integer_weights

weights = st.lists(st.integers(1, 60), min_size=1, max_size=7).map(tuple)


@given(weights)
def test_each_source_has_its_floor_or_ceiling_at_every_prefix(weights: tuple[int, ...]) -> None:
    mixture, period = Mixture(weights), sum(weights)
    source, _ = mixture.locate(np.arange(2 * period + 3))
    counts = [0] * len(weights)
    for samples, taken in enumerate(source.tolist(), start=1):
        counts[taken] += 1
        for weight, count in zip(weights, counts, strict=True):
            exact = Fraction(samples * weight, period)
            assert exact.__floor__() <= count <= exact.__ceil__()


@given(weights, st.integers(0, 10**12))
def test_draws_count_up_one_by_one_and_agree_with_the_counts(weights: tuple[int, ...], start: int) -> None:
    mixture = Mixture(weights)
    source, draw = mixture.locate(np.arange(start, start + 200))
    expected = mixture.counts(start).tolist()
    for taken, number in zip(source.tolist(), draw.tolist(), strict=True):
        assert number == expected[taken]
        expected[taken] += 1
    assert mixture.counts(start + 200).tolist() == expected


def test_weights_that_are_decimals_count_as_the_fractions_they_spell() -> None:
    assert integer_weights({"a": 0.7, "b": 0.3}) == {"a": 7, "b": 3}
    assert integer_weights({"a": 2, "b": 2, "c": 4}) == {"a": 1, "b": 1, "c": 2}
    assert integer_weights({"a": 0.95, "b": 0.05}) == {"a": 19, "b": 1}
    assert integer_weights({"only": 0.3}) == {"only": 1}


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(1e-9, 1e9), min_size=1, max_size=9))
def test_any_weights_become_integers_near_them_within_the_largest_period(weights: dict[str, float]) -> None:
    whole = integer_weights(weights)
    period, total = sum(whole.values()), sum(Fraction(repr(weight)) for weight in weights.values())
    assert period <= MAX_PERIOD
    assert min(whole.values()) >= 1
    for name, weight in weights.items():
        # One place of rounding, and up to one more for each source that was raised to its single place.
        assert abs(whole[name] / period - Fraction(repr(weight)) / total) <= Fraction(len(weights) + 1, MAX_PERIOD)


def test_a_rare_source_comes_regularly() -> None:
    source, _ = Mixture((999, 1)).locate(np.arange(100_000))
    places = np.flatnonzero(source == 1)
    assert np.all(np.diff(places) == 1000)


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": 1, "b": -1}])
def test_weights_that_are_none_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        integer_weights(weights)
