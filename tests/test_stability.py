"""The rule: what a spike is, what is skipped, and when that is too much."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacl.config import StabilityConfig
from megacl.stability import Watch, after_step, given_up, gone_back, skip_above

SPIKES = StabilityConfig(spike=6.0, window=20, skip=2)


def watching(losses: list[float], stability: StabilityConfig = SPIKES) -> Watch:
    watch = Watch()
    for loss in losses:
        watch, trouble = after_step(watch, stability, loss, applied=True, fp16=False)
        assert trouble == ""
    return watch


@given(st.lists(st.floats(0.1, 12), min_size=10, max_size=60), st.floats(0.5, 8))
def test_a_spike_lies_so_many_deviations_above_the_mean_of_the_last_window(losses: list[float], spike: float) -> None:
    last = losses[-20:]
    mean, deviation = statistics.fmean(last), statistics.pstdev(last)
    threshold = skip_above(watching(losses), StabilityConfig(spike=spike, window=20))
    assert threshold == pytest.approx(mean + spike * max(deviation, mean / 100), rel=1e-9)


def test_nothing_is_a_spike_before_half_a_window_was_seen_or_where_none_is_asked_for() -> None:
    assert skip_above(watching([3.0] * 9), SPIKES) == math.inf
    assert skip_above(watching([3.0] * 10), SPIKES) < 3.2
    assert skip_above(watching([3.0] * 10), StabilityConfig(window=20)) == math.inf


@pytest.mark.parametrize("flat", [0.0, 1e-6, 2.5])
def test_the_noise_of_a_flat_loss_is_no_spike(flat: float) -> None:
    watch = watching([flat] * 20)
    assert flat * 1.05 <= skip_above(watch, SPIKES)
    assert watch.losses == (flat,) * 20


def test_a_skipped_loss_does_not_move_the_threshold_and_an_applied_one_ends_the_row() -> None:
    watch = watching([3.0] * 20)
    before = skip_above(watch, SPIKES)
    for number in (1, 2, 3):
        watch, trouble = after_step(watch, SPIKES, 5.0, applied=False, fp16=False)
        assert trouble == "the loss, 5.0000, is a spike above 3.1800"
        assert (watch.skipped, skip_above(watch, SPIKES)) == (number, before)
        assert given_up(watch, SPIKES) == (number == 3)
    watch, trouble = after_step(watch, SPIKES, 3.0, applied=True, fp16=False)
    assert (watch.skipped, trouble) == (0, "")


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_at_once_in_every_precision(loss: float, fp16: bool) -> None:
    watch, trouble = after_step(Watch(), StabilityConfig(), loss, applied=False, fp16=fp16)
    assert trouble == "the loss is not finite"
    assert given_up(watch, StabilityConfig())


def test_overflows_are_the_loss_scales_business_until_too_many_come_in_a_row() -> None:
    watch = Watch()
    for _ in range(20):
        watch, trouble = after_step(watch, StabilityConfig(), 3.0, applied=False, fp16=True)
        assert (trouble, given_up(watch, StabilityConfig())) == ("", False)
    calm, _ = after_step(watch, StabilityConfig(), 3.0, applied=True, fp16=True)
    assert after_step(calm, StabilityConfig(), 3.0, applied=False, fp16=True)[1] == ""
    watch, trouble = after_step(watch, StabilityConfig(), 3.0, applied=False, fp16=True)
    assert trouble.startswith("the gradient is not finite in fp16, even at lower loss scales")
    assert given_up(watch, StabilityConfig())
    assert after_step(Watch(), StabilityConfig(), 3.0, applied=False, fp16=False)[1] == "the gradient is not finite"


def test_after_going_back_the_row_is_over_and_the_losses_are_those_of_the_checkpoint() -> None:
    watch = Watch(losses=(4.0, 5.0), skipped=3, overflows=1, went_back=1)
    assert gone_back(watch, (3.0,)) == Watch(losses=(3.0,), went_back=2)
