"""Mixtures by exact counts: no drift at any prefix, and any sample found without the samples before it."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacl.data.mixture import (
    MAX_LINE,
    MAX_PERIOD,
    Mixture,
    Pattern,
    first_to_run_out,
    integer_weights,
    renormalised,
)
from megacl.lineage import MixtureLine, MixturePiece

weights = st.lists(st.integers(1, 60), min_size=1, max_size=7).map(tuple)


@given(weights)
def test_each_source_has_its_floor_or_ceiling_at_every_prefix(weights: tuple[int, ...]) -> None:
    pattern, period = Pattern(weights), sum(weights)
    source, _ = pattern.locate(np.arange(2 * period + 3))
    counts = [0] * len(weights)
    for samples, taken in enumerate(source.tolist(), start=1):
        counts[taken] += 1
        for weight, count in zip(weights, counts, strict=True):
            exact = Fraction(samples * weight, period)
            assert exact.__floor__() <= count <= exact.__ceil__()


@given(weights, st.integers(0, 10**12))
def test_draws_count_up_one_by_one_and_agree_with_the_counts(weights: tuple[int, ...], start: int) -> None:
    pattern = Pattern(weights)
    source, draw = pattern.locate(np.arange(start, start + 200))
    expected = pattern.counts(start).tolist()
    for number, (taken, drawn) in enumerate(zip(source.tolist(), draw.tolist(), strict=True), start=start):
        assert drawn == expected[taken] == pattern.before(np.array([number]), np.array([taken]))[0]
        expected[taken] += 1
    assert pattern.counts(start + 200).tolist() == expected


@given(weights)
def test_at_each_place_stands_the_waiting_source_with_the_nearest_deadline(weights: tuple[int, ...]) -> None:
    period, taken, expected = sum(weights), [0] * len(weights), []
    for place in range(period):
        due = [
            (Fraction((k + 1) * period, weight).__ceil__(), source)
            for source, (weight, k) in enumerate(zip(weights, taken, strict=True))
            if k < weight and k * period // weight <= place
        ]
        expected.append(min(due)[1])
        taken[expected[-1]] += 1
    assert Pattern(weights).locate(np.arange(period))[0].tolist() == expected


def test_weights_that_are_decimals_count_as_the_fractions_they_spell() -> None:
    assert integer_weights({"a": 0.7, "b": 0.3}) == {"a": 7, "b": 3}
    assert integer_weights({"a": 2, "b": 2, "c": 4}) == {"a": 1, "b": 1, "c": 2}
    assert integer_weights({"a": 0.95, "b": 0.05}) == {"a": 19, "b": 1}
    assert integer_weights({"only": 0.3}) == {"only": 1}
    assert integer_weights({"a": Fraction(1, 3), "b": Fraction(2, 3)}) == {"a": 1, "b": 2}


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
    source, _ = Pattern((999, 1)).locate(np.arange(100_000))
    places = np.flatnonzero(source == 1)
    assert np.all(np.diff(places) == 1000)


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": 1, "b": -1}])
def test_weights_that_are_none_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        integer_weights(weights)


# ---------------------------------------------------------------------------------------------- pieces


@st.composite
def mixtures(draw: Any) -> tuple[tuple[MixturePiece, ...], int]:
    """(pieces, samples): up to four of them over up to four sources, some of which a piece may lack."""
    sources = draw(st.integers(1, 4))
    weights = st.lists(st.integers(0, 9), min_size=sources, max_size=sources).filter(any).map(tuple)
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 90), max_size=3)))]
    samples = firsts[-1] + draw(st.integers(1, 40))
    pieces = []
    for first, end in zip(firsts, [*firsts[1:], samples], strict=True):
        line = draw(st.none() | weights.map(lambda new, s=first, e=end: MixtureLine(weights=new, start=s, end=e)))
        pieces.append(MixturePiece(first=first, weights=draw(weights), line=line))
    if line is not None:
        pieces.append(MixturePiece(first=samples, weights=line.weights))
    return tuple(pieces), samples


def dealt(pieces: Sequence[MixturePiece], samples: int) -> list[int]:
    """The source of each sample, one by one, by the rules of the module's manual page."""
    sources = []
    for piece, end in zip(pieces, [*(piece.first for piece in pieces[1:]), samples], strict=True):
        sides = [[], []]
        for m in range(piece.first, min(end, samples)):
            new = 0
            if piece.line is not None:
                length = piece.line.end - piece.line.start
                grown = [(r * r) // (2 * length) for r in (m - piece.line.start, m + 1 - piece.line.start)]
                new = grown[1] - grown[0]
            assert new in (0, 1)
            weights = piece.line.weights if new else piece.weights
            sources.append(int(Pattern(weights).locate(np.array([len(sides[new])]))[0][0]))
            sides[new].append(m)
    return sources


@given(mixtures())
def test_a_source_draws_without_gaps_through_steps_and_lines(drawn: tuple[tuple[MixturePiece, ...], int]) -> None:
    pieces, samples = drawn
    mixture = Mixture(pieces)
    expected = dealt(pieces, samples)
    source, draw = mixture.locate(np.arange(samples))
    assert source.tolist() == expected
    taken = [0] * len(pieces[0].weights)
    for m in range(samples):
        assert mixture.counts(m).tolist() == taken
        assert draw[m] == taken[expected[m]]
        taken[expected[m]] += 1
    assert mixture.counts(samples).tolist() == taken


@given(mixtures(), st.data())
def test_any_sample_of_a_mixture_is_found_without_the_others(
    drawn: tuple[tuple[MixturePiece, ...], int], data: Any
) -> None:
    pieces, samples = drawn
    mixture = Mixture(pieces)
    some = np.array(data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=9)))
    for whole, part in zip(mixture.locate(np.arange(samples)), mixture.locate(some), strict=True):
        assert np.array_equal(whole[some], part)


def test_on_a_line_the_new_mixtures_part_grows_evenly() -> None:
    line = MixtureLine(weights=(0, 1), start=0, end=10_000)
    mixture = Mixture((MixturePiece(first=0, weights=(1, 0), line=line), MixturePiece(first=10_000, weights=(0, 1))))
    source, _ = mixture.locate(np.arange(12_000))
    tenths = source[:10_000].reshape(10, 1000).sum(axis=1)
    assert tenths.tolist() == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    assert source[10_000:].all()


def test_the_longest_line_is_exact_to_its_last_sample() -> None:
    length = MAX_LINE - 1
    line = MixtureLine(weights=(0, 1), start=0, end=length)
    mixture = Mixture((MixturePiece(first=0, weights=(1, 0), line=line), MixturePiece(first=length, weights=(0, 1))))
    last = np.arange(length - 1000, length)
    source, draw = mixture.locate(last)
    for m, taken, drawn in zip(last.tolist(), source.tolist(), draw.tolist(), strict=True):
        new, after = m * m // (2 * length), (m + 1) ** 2 // (2 * length)
        assert (taken, drawn) == ((1, new) if after > new else (0, m - new))
    assert mixture.counts(length).tolist() == [length - length // 2, length // 2]


# ---------------------------------------------------------------------------------------------- sources that run out


@given(mixtures(), st.data())
def test_the_first_source_to_run_out_is_the_one_that_counting_finds(
    drawn: tuple[tuple[MixturePiece, ...], int], data: Any
) -> None:
    pieces, samples = drawn
    left = [data.draw(st.integers(0, 60)) for _ in pieces[0].weights]
    taken = [0] * len(left)
    expected = None
    for m, source in enumerate(dealt(pieces, samples)):
        taken[source] += 1
        if taken[source] > left[source]:
            expected = (m, source)
            break
    assert first_to_run_out(Mixture(pieces), left, samples) == expected


@given(mixtures(), st.data())
def test_the_others_share_the_places_of_a_source_that_ran_out(
    drawn: tuple[tuple[MixturePiece, ...], int], data: Any
) -> None:
    pieces, samples = drawn
    left = [data.draw(st.integers(0, 60)) for _ in pieces[0].weights]
    changed, end, out = renormalised(pieces, left, samples)
    sources = dealt(changed, end) if end else []
    before = dealt(pieces, samples)
    first = min(out.values(), default=samples)
    assert sources[:first] == before[:first], "nothing changes before the first one runs out"
    counts = [sources.count(source) for source in range(len(left))]
    assert all(count <= limit for count, limit in zip(counts, left, strict=True))
    for source, sample in out.items():
        assert counts[source] == left[source], "a source that runs out was read to its end"
        assert source not in sources[sample:]
    if end < samples:
        here = [piece for piece in pieces if piece.first <= end][-1]
        named = {s for side in (here.weights, here.line.weights if here.line else ()) for s, w in enumerate(side) if w}
        assert named <= set(out), "the samples end where all that is mixed there has run out"


def test_places_are_shared_by_weight_and_a_line_goes_on_without_the_source() -> None:
    pieces, end, out = renormalised((MixturePiece(first=0, weights=(6, 2, 4)),), [30, 10**9, 10**9], 600)
    assert (end, out) == (600, {0: 60})
    assert pieces == (MixturePiece(first=0, weights=(6, 2, 4)), MixturePiece(first=60, weights=(0, 1, 2)))
    line = MixtureLine(weights=(0, 1, 1), start=0, end=100)
    closing = MixturePiece(first=100, weights=line.weights)
    pieces, end, out = renormalised((MixturePiece(first=0, weights=(1, 0, 0), line=line), closing), [9, 100, 100], 100)
    (sample,) = out.values()
    assert pieces[1:] == (MixturePiece(first=sample, weights=(0, 1, 1)), closing), "only the other side is left"
    line = MixtureLine(weights=(1, 1, 2), start=0, end=100)
    closing = MixturePiece(first=100, weights=line.weights)
    pieces, end, out = renormalised((MixturePiece(first=0, weights=(3, 0, 1), line=line), closing), [9, 100, 100], 100)
    expected = MixtureLine(weights=(0, 1, 2), start=0, end=100)
    rest = (MixturePiece(first=out[0], weights=(0, 0, 1), line=expected), replace(closing, weights=(0, 1, 2)))
    assert pieces[1:] == rest


def test_a_line_that_no_piece_follows_is_refused() -> None:
    line = MixtureLine(weights=(0, 1), start=0, end=100)
    with pytest.raises(ValueError, match="a piece must follow where that ends"):
        Mixture((MixturePiece(first=0, weights=(1, 0), line=line),))
