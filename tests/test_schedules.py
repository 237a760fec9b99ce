"""Schedules: exact values at the corners, against the equations worked by hand."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from megacl.config_phase import ScheduleConfig
from megacl.errors import ConfigError
from megacl.schedules import (
    Schedule,
    build_schedule,
    cosine,
    exponential,
    inverse_sqrt,
    linear,
    one_minus_sqrt,
    peak,
    rex,
)

MAX, MIN = 3e-4, 3e-5


def schedule(steps: int, last_lr: float = 0.0, **settings: Any) -> Schedule:
    config = TypeAdapter(ScheduleConfig).validate_python({"max_lr": MAX, **settings})
    return build_schedule(config, steps=steps, tokens_per_step=1000, last_lr=last_lr)


decays = st.sampled_from(
    [
        {"kind": "cosine", "min_lr": MIN},
        {"kind": "linear", "min_lr": MIN},
        {"kind": "rex", "min_lr": MIN},
        {"kind": "rex", "min_lr": MIN, "d": 0.9},
        {"kind": "wsd", "min_lr": MIN, "decay": "30%"},
        {"kind": "wsd", "min_lr": MIN, "decay": "7 steps", "shape": "1-sqrt"},
        {"kind": "infinite", "constant_lr": 1.65e-4, "min_lr": MIN, "cooldown": "40%", "anneal": "20%"},
        {"kind": "infinite", "constant_lr": 1.65e-4, "min_lr": MIN, "shape": "inverse_sqrt", "anneal": "20%"},
    ]
)


@given(decay=decays, steps=st.integers(50, 5000), warmup=st.integers(0, 10), last_lr=st.sampled_from([0.0, MIN, MAX]))
def test_every_decay_ends_exactly_at_min_lr_and_peaks_exactly_at_max_lr(
    decay: dict[str, Any], steps: int, warmup: int, last_lr: float
) -> None:
    lr = schedule(steps, last_lr, warmup=f"{warmup} steps", **decay)
    rates = [lr(k) for k in range(1, steps + 1)]
    assert rates[-1] == MIN
    if warmup:
        assert rates[warmup - 1] == MAX
        assert rates[0] > last_lr or last_lr == MAX
        assert rates[: warmup - 1] == sorted(rates[: warmup - 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) <= MAX == peak(TypeAdapter(ScheduleConfig).validate_python({"max_lr": MAX, **decay}), last_lr=0.0)


def test_warmup_rises_in_a_straight_line_from_where_the_last_phase_ended() -> None:
    lr = schedule(100, last_lr=MIN, kind="cosine", warmup="4 steps")
    assert [lr(k) for k in range(1, 5)] == pytest.approx([MIN + (MAX - MIN) * k / 4 for k in range(1, 5)], rel=1e-15)


def test_cosine_at_its_corners() -> None:
    lr = schedule(110, kind="cosine", warmup="10 steps", min_lr=MIN)
    assert lr(10) == MAX
    assert lr(60) == pytest.approx((MAX + MIN) / 2, rel=1e-12)
    assert lr(35) == pytest.approx(MIN + (MAX - MIN) / 2 * (1 + math.cos(math.pi / 4)), rel=1e-12)
    assert lr(110) == MIN


def test_linear_at_its_corners() -> None:
    lr = schedule(100, kind="linear", warmup="0 steps", min_lr=0.0)
    assert lr(1) == pytest.approx(MAX * 0.99)
    assert lr(75) == pytest.approx(MAX * 0.25)
    assert lr(100) == 0.0


def test_the_default_floor_is_a_tenth_of_the_peak_and_the_default_warmup_one_percent() -> None:
    lr = schedule(1000, kind="cosine")
    assert lr(10) == MAX
    assert lr(9) == pytest.approx(0.9 * MAX)
    assert lr(1000) == pytest.approx(0.1 * MAX, rel=1e-15)


def test_warmup_stable_decay_holds_then_falls() -> None:
    lr = schedule(100, kind="wsd", warmup="10 steps", decay="20 steps", min_lr=0.0)
    assert {lr(k) for k in range(10, 81)} == {MAX}
    assert lr(90) == pytest.approx(MAX / 2)
    lr = schedule(100, kind="wsd", warmup="10 steps", decay="20 steps", min_lr=0.0, shape="1-sqrt")
    assert lr(85) == pytest.approx(MAX * (1 - math.sqrt(0.25)))


def test_inverse_square_root_halves_when_time_is_fourfold() -> None:
    lr = schedule(1000, kind="inverse_sqrt", warmup="100 steps")
    assert lr(50) == MAX / 2
    assert lr(100) == MAX
    assert lr(400) == MAX / 2
    assert lr(900) == pytest.approx(MAX / 3)


def test_rex_at_its_corners() -> None:
    lr = schedule(100, kind="rex", warmup="0 steps", min_lr=0.0)
    assert lr(50) == pytest.approx(MAX * 0.5 / (0.5 + 0.25))
    assert lr(100) == 0.0
    lr = schedule(100, kind="rex", warmup="0 steps", min_lr=0.0, d=0.9)
    assert lr(50) == pytest.approx(MAX * 0.5 / (0.1 + 0.45))


def test_infinite_cools_down_stays_and_anneals() -> None:
    constant = 1.65e-4
    lr = schedule(
        1000,
        kind="infinite",
        warmup="10 steps",
        cooldown="100 steps",
        constant_lr=constant,
        anneal="50 steps",
        min_lr=MIN,
    )
    assert lr(60) == pytest.approx((MAX + constant) / 2)
    assert {lr(k) for k in range(110, 951)} == {constant}
    assert lr(975) == pytest.approx(math.sqrt(constant * MIN))
    assert lr(951) == pytest.approx(constant * (MIN / constant) ** (1 / 50))
    assert lr(1000) == MIN


def test_infinite_with_the_inverse_square_root_cooldown_arrives_at_the_constant_rate() -> None:
    constant = 1.65e-4
    settings = {"kind": "infinite", "warmup": "0 steps", "cooldown": "100 steps", "constant_lr": constant}
    lr = schedule(200, shape="inverse_sqrt", **settings)

    def h(p: float) -> float:
        return 1 / math.sqrt(1 + 10 * p) - 1

    assert lr(30) == pytest.approx(MAX + (constant - MAX) * h(0.3) / h(1))
    assert lr(100) == constant
    assert lr(200) == constant


def test_a_later_phase_of_an_infinite_schedule_has_no_jump() -> None:
    settings = {"kind": "infinite", "constant_lr": "last", "warmup": "0 steps", "cooldown": "0 steps"}
    lr = schedule(100, last_lr=1.65e-4, **settings)
    assert {lr(k) for k in range(1, 101)} == {1.65e-4}


def test_keeping_the_last_rate() -> None:
    lr = schedule(5, last_lr=MIN, kind="constant", max_lr="last")
    assert [lr(k) for k in range(1, 6)] == [MIN] * 5


def test_the_peak_of_a_schedule_that_goes_on_is_the_last_rate() -> None:
    config = TypeAdapter(ScheduleConfig).validate_python({"kind": "constant", "max_lr": "last"})
    assert peak(config, last_lr=2e-5) == 2e-5


@pytest.mark.parametrize("k", [0, 101])
def test_an_update_outside_the_phase_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="outside the phase"):
        schedule(100, kind="cosine")(k)


@pytest.mark.parametrize("function", [linear, cosine, one_minus_sqrt, rex, exponential])
@pytest.mark.parametrize("position", [-0.01, 1.01])
def test_a_position_outside_the_decay_is_refused(function: Any, position: float) -> None:
    with pytest.raises(ValueError, match="position"):
        function(position, max_lr=1.0, min_lr=0.1)


def test_inverse_square_root_inside_its_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warm-up"):
        inverse_sqrt(5, max_lr=1.0, warmup=10)


def lengths(steps: int, **settings: Any) -> dict[str, int]:
    config = TypeAdapter(ScheduleConfig).validate_python({"max_lr": MAX, **settings})
    return config.parts(phase_steps=steps, tokens_per_step=1000)


@pytest.mark.parametrize(
    ("length", "steps"),
    [("100 steps", 100), ("1 step", 1), ("1%", 10), ("0.25%", 3), ("2e4 tokens", 20), ("20001 tokens", 21), ("0%", 0)],
)
def test_lengths_in_steps_tokens_and_percent_round_up_to_whole_steps(length: str, steps: int) -> None:
    assert lengths(1000, kind="cosine", warmup=length) == {"warmup": steps}


@given(steps=st.integers(2, 500), percent=st.integers(1, 99))
def test_parts_that_fill_their_phase_exactly_fit_whatever_the_rounding(steps: int, percent: int) -> None:
    parts = lengths(steps, kind="wsd", warmup=f"{percent}%", decay=f"{100 - percent}%")
    assert steps <= sum(parts.values()) <= steps
    assert abs(parts["warmup"] - steps * percent / 100) <= 1


@pytest.mark.parametrize(
    ("last_lr", "settings", "message"),
    [
        (0.0, {"kind": "constant", "max_lr": "last"}, "ended at 0"),
        (0.0, {"kind": "infinite", "max_lr": 1e-3, "constant_lr": "last"}, "ended at 0"),
        (1e-4, {"kind": "infinite", "max_lr": "last", "constant_lr": 1e-3}, "constant_lr is 0.001, above"),
        (1e-4, {"kind": "cosine", "max_lr": "last", "min_lr": 1e-3}, "min_lr is 0.001, above"),
    ],
)
def test_a_last_rate_that_cannot_be_gone_on_from_is_refused(
    last_lr: float, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule(100, last_lr=last_lr, **settings)
