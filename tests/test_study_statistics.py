"""Means, noise and significance over seeds, against the integral of Student's density and numbers by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacl.study_statistics import Spread, paired, two_sided_p, verdict


def tail_by_integral(t: float, freedom: int) -> float:
    """1 - the integral of Student's density over [-t, t], by Gauss and Legendre on 200 points."""
    points, weights = np.polynomial.legendre.leggauss(200)
    density = (1 + (t * points) ** 2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    return 1 - scale * abs(t) * float(weights @ density)


@given(t=st.floats(-8, 8), freedom=st.integers(1, 40))
def test_p_is_what_lies_outside_under_students_density(t, freedom):
    assert two_sided_p(t, freedom) == pytest.approx(tail_by_integral(t, freedom), abs=1e-9)


@pytest.mark.parametrize(("t", "freedom"), [(12.706205, 1), (4.302653, 2), (3.182446, 3), (2.776445, 4)])
def test_the_tabled_quantiles_have_p_of_five_percent(t, freedom):
    assert two_sided_p(t, freedom) == pytest.approx(0.05, abs=1e-7)


def test_the_paired_test_by_hand():
    # differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) = 3.4641 with 2 degrees; p = 1 - t / sqrt(t^2 + 2)
    difference = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert difference.values == (1.0, 2.0, 3.0)
    assert (difference.mean, difference.deviation) == (2.0, 1.0)
    assert difference.noise == pytest.approx(2 / math.sqrt(3))
    assert difference.p == pytest.approx(1 - math.sqrt(12 / 14))


def test_what_arms_have_in_common_cancels_in_their_difference():
    common = np.array([5.0, 9.0, 1.0])
    difference = paired((common + 0.25).tolist(), common.tolist())
    assert (difference.mean, difference.noise, difference.p) == (0.25, 0.0, 0.0)


@pytest.mark.parametrize(
    ("margins", "state"),
    [
        ((-0.03, -0.04, -0.05), "held"),
        ((0.03, 0.04, 0.05), "not held"),
        ((-0.03, 0.02, -0.01), "within noise"),
        ((0.03, -0.02, 0.01), "within noise"),
        ((0.0, 0.0, 0.0), "held"),
        ((-0.5,), "held"),
        ((0.5,), "not held"),
        ((-1.0, math.nan), None),
        ((-1.0, -math.inf), None),
        ((), None),
    ],
)
def test_a_bar_is_held_where_its_margin_lies_below_zero_by_its_noise(margins, state):
    assert verdict(Spread(margins)) == state


def test_one_seed_has_a_mean_and_no_noise():
    one = Spread((1.5,))
    assert (one.mean, one.deviation, one.noise, one.p) == (1.5, None, None, None)
