"""Learning-rate schedules: pure functions of where a phase stands.

A phase has T optimizer steps; update k = 1..T runs at `schedule(k)`, so that the last update is exactly at min_lr and
the first one of a warm-up is already above its start. k counts batches taken from the data, not updates applied: an
update that is skipped (an overflow in fp16) still moves the schedule on.

    schedule = build_schedule(phase.schedule, steps=1000, tokens_per_step=8192, last_lr=3e-5)
    lr = schedule(k)
"""

import math
from collections.abc import Callable, Mapping

from megacl.config_phase import (
    AnnealSchedule,
    ConstantSchedule,
    CosineSchedule,
    InfiniteSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    RexSchedule,
    ScheduleConfig,
    WarmupStableDecaySchedule,
)
from megacl.errors import ConfigError

Schedule = Callable[[int], float]


def _between(start: float, end: float, passed: float) -> float:
    """start + (end - start) * passed, exact at both ends (the sum alone may miss `end` by a rounding)."""
    return end if passed == 1.0 else start + (end - start) * passed


def _check(position: float) -> None:
    if not 0.0 <= position <= 1.0:
        raise ValueError(f"position is {position}; it must lie in [0, 1]")


def linear(position: float, *, max_lr: float, min_lr: float) -> float:
    """A straight line from max_lr at position 0 to min_lr at position 1.

    lr = max_lr + (min_lr - max_lr) * position

    position: fraction of the line that has passed, in [0, 1]; outside it raises ValueError.
    """
    _check(position)
    return _between(max_lr, min_lr, position)


def cosine(position: float, *, max_lr: float, min_lr: float) -> float:
    """Half a cosine from max_lr at position 0 to min_lr at position 1.

    lr = min_lr + (max_lr - min_lr) / 2 * (1 + cos(pi * position))

    position: fraction of the decay that has passed, in [0, 1]; outside it raises ValueError.
    Source: Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5.
    """
    _check(position)
    return _between(max_lr, min_lr, (1.0 - math.cos(math.pi * position)) / 2.0)


def one_minus_sqrt(position: float, *, max_lr: float, min_lr: float) -> float:
    """Falls fast at first: the decay that Hägele et al. found best after a constant rate.

    lr = min_lr + (max_lr - min_lr) * (1 - sqrt(position))

    position: fraction of the decay that has passed, in [0, 1]; outside it raises ValueError.
    Source: Hägele et al. 2024, arXiv 2405.18392, sec. 3.
    """
    _check(position)
    return _between(max_lr, min_lr, math.sqrt(position))


def rex(position: float, *, max_lr: float, min_lr: float = 0.0, d: float = 0.5) -> float:
    """Reflected exponential: stays high for long, falls fast at the end.

    z = 1 - position;  lr = min_lr + (max_lr - min_lr) * z / ((1 - d) + d * z)

    position: fraction of the decay that has passed, in [0, 1]; outside it raises ValueError. d in (0, 1).
    Source: Chen, Wolfe & Kyrillidis 2021, arXiv 2107.04197, d = 1/2 there.
    """
    _check(position)
    z = 1.0 - position
    return _between(min_lr, max_lr, z / ((1.0 - d) + d * z))


def inverse_sqrt(step: int, *, max_lr: float, warmup: int) -> float:
    """Falls with the root of time, from max_lr at the end of the warm-up; needs no horizon.

    lr = max_lr * sqrt(warmup / step)

    step, warmup: in optimizer steps, step >= warmup >= 1; otherwise ValueError.
    Source: Vaswani et al. 2017, arXiv 1706.03762, sec. 5.3.
    """
    if not step >= warmup >= 1:
        raise ValueError(f"step is {step} and warmup {warmup}; step must not lie inside the warm-up of at least 1")
    return max_lr * math.sqrt(warmup / step)


def inverse_sqrt_cooldown(position: float, *, max_lr: float, constant_lr: float, a: float = 10.0) -> float:
    """The cool-down of an infinite schedule in inverse-square-root form, rescaled to arrive at constant_lr.

    h(p) = 1 / sqrt(1 + a p) - 1;  lr = max_lr + (constant_lr - max_lr) * h(position) / h(1)

    position: fraction of the cool-down that has passed, in [0, 1]; outside it raises ValueError.
    Source: Ibrahim et al. 2024, arXiv 2403.08763, sec. 7.
    """
    _check(position)
    return _between(max_lr, constant_lr, (1 / math.sqrt(1 + a * position) - 1) / (1 / math.sqrt(1 + a) - 1))


def exponential(position: float, *, max_lr: float, min_lr: float) -> float:
    """Falls by the same factor in each step: the anneal of an infinite schedule.

    lr = max_lr * (min_lr / max_lr) ** position

    position: fraction of the anneal that has passed, in [0, 1]; outside it raises ValueError. min_lr > 0.
    Source: Ibrahim et al. 2024, arXiv 2403.08763, sec. 7.
    """
    _check(position)
    # The power is off by a rounding at 1, and the last update has to be exactly at min_lr.
    return min_lr if position == 1.0 else max_lr * (min_lr / max_lr) ** position


def warmup(step: int, *, length: int, start_lr: float, max_lr: float) -> float:
    """A straight line that reaches max_lr at step `length`; step 0 would stand at start_lr.

    lr = start_lr + (max_lr - start_lr) * step / length

    step in [0, length]; outside it raises ValueError.
    """
    return linear(step / length, max_lr=start_lr, min_lr=max_lr)


SHAPES: Mapping[str, Callable[..., float]] = {
    "linear": linear,
    "cosine": cosine,
    "1-sqrt": one_minus_sqrt,
    "exponential": exponential,
}
"""The decays by their names in a configuration, each of (position, *, max_lr, min_lr)."""


def build_schedule(config: ScheduleConfig, *, steps: int, tokens_per_step: int, last_lr: float) -> Schedule:
    """The learning rate of update k = 1..steps of a phase.

    steps: T, the phase's optimizer steps. tokens_per_step: turns lengths given in tokens into steps. last_lr: the rate
    at which the last phase ended, 0.0 for a model's first phase: a warm-up begins there, and it is what "last" means.
    The function raises ValueError for k outside 1..steps. Raises ConfigError where a rate that is "last" turns out to
    be 0, or does not stand in order with the others.
    """
    parts = config.parts(phase_steps=steps, tokens_per_step=tokens_per_step)
    rising = parts["warmup"]
    max_lr = _rate(config.max_lr, last_lr)
    after = _after_warmup(config, steps, parts, max_lr, last_lr)

    def schedule(k: int) -> float:
        if not 1 <= k <= steps:
            raise ValueError(f"update {k} lies outside the phase, 1 to {steps}")
        if k <= rising:
            return warmup(k, length=rising, start_lr=last_lr, max_lr=max_lr)
        return after(k)

    return schedule


def peak(config: ScheduleConfig, *, last_lr: float) -> float:
    """max_lr, the rate to which a schedule warms up, `last` resolved as in `build_schedule`."""
    return _rate(config.max_lr, last_lr)


def constant_part(config: ScheduleConfig, *, steps: int, tokens_per_step: int) -> range:
    """The updates k of a phase of `steps` steps at the rate that its schedule holds; empty where it holds none.

    A model stands on the constant rate behind update k where k is among them, from the last one of a warm-up or
    cool-down, which reaches that rate, to the last one before a decay.
    """
    parts = config.parts(phase_steps=steps, tokens_per_step=tokens_per_step)
    rising = max(parts["warmup"], 1)
    match config:
        case ConstantSchedule():
            return range(rising, steps + 1)
        case InfiniteSchedule():
            return range(max(parts["warmup"] + parts["cooldown"], 1), steps - parts["anneal"] + 1)
        case WarmupStableDecaySchedule():
            return range(rising, steps - parts["decay"] + 1)
    return range(0)


def _rate(rate: float | str, last_lr: float) -> float:
    if isinstance(rate, float):
        return rate
    if last_lr == 0.0:
        raise ConfigError('a schedule goes on with the "last" rate, and the phase before ended at 0; give a number.')
    return last_lr


def _after_warmup(config: ScheduleConfig, steps: int, parts: dict[str, int], max_lr: float, last_lr: float) -> Schedule:
    """The part of a schedule that follows its warm-up."""
    rising = parts["warmup"]
    match config:
        case ConstantSchedule():
            return lambda k: max_lr
        case InverseSqrtSchedule():
            return lambda k: inverse_sqrt(k, max_lr=max_lr, warmup=rising)
        case InfiniteSchedule():
            return _infinite(config, steps, parts, max_lr, _rate(config.constant_lr, last_lr))
    min_lr = 0.1 * max_lr if config.min_lr is None else config.min_lr
    _check_order(max_lr, min_lr, "min_lr")
    match config:
        case LinearSchedule():
            return lambda k: linear((k - rising) / (steps - rising), max_lr=max_lr, min_lr=min_lr)
        case CosineSchedule():
            return lambda k: cosine((k - rising) / (steps - rising), max_lr=max_lr, min_lr=min_lr)
        case RexSchedule():
            return lambda k: rex((k - rising) / (steps - rising), max_lr=max_lr, min_lr=min_lr, d=config.d)
        case AnnealSchedule():
            shape = SHAPES[config.shape]
            return lambda k: shape((k - rising) / (steps - rising), max_lr=max_lr, min_lr=min_lr)
        case WarmupStableDecaySchedule():
            falling = parts["decay"]
            shape = SHAPES[config.shape]
            return lambda k: (
                max_lr if k <= steps - falling else shape(1 - (steps - k) / falling, max_lr=max_lr, min_lr=min_lr)
            )


def _check_order(high: float, low: float, name: str) -> None:
    if low > high:
        raise ConfigError(f'a schedule\'s {name} is {low:g}, above the "last" rate that it is to fall from, {high:g}.')


def _infinite(
    config: InfiniteSchedule, steps: int, parts: dict[str, int], max_lr: float, constant_lr: float
) -> Schedule:
    """Cool-down to constant_lr, constant, and at the phase's end an anneal where one is asked for.

    Source: Ibrahim et al. 2024, arXiv 2403.08763, sec. 7.
    """
    min_lr = 0.1 * constant_lr if config.min_lr is None else config.min_lr
    rising, cooling, annealing = parts["warmup"], parts["cooldown"], parts["anneal"]
    _check_order(max_lr, constant_lr, "constant_lr")
    _check_order(constant_lr, min_lr, "min_lr")

    def after(k: int) -> float:
        if k <= rising + cooling:
            passed = (k - rising) / cooling
            if config.shape == "cosine":
                return cosine(passed, max_lr=max_lr, min_lr=constant_lr)
            return inverse_sqrt_cooldown(passed, max_lr=max_lr, constant_lr=constant_lr)
        if k <= steps - annealing:
            return constant_lr
        return exponential(1 - (steps - k) / annealing, max_lr=constant_lr, min_lr=min_lr)

    return after
