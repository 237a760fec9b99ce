"""What a handful of seeds says: means and their noise, differences between arms, whether a bar is held.

A seed is one draw of the whole experiment, weights and order. Arms are compared seed by seed, since what two arms have
in common (their first phases, the order of the data) cancels in the difference.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["held", "not held", "within noise"]


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds. What needs two seeds is None with one, and all but values is with a NaN among them."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self._known else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds, with n - 1."""
        return statistics.stdev(self.values) if self._known and len(self.values) > 1 else None

    @property
    def noise(self) -> float | None:
        """Twice the standard error of the mean: 2 deviation / sqrt(n)."""
        return None if self.deviation is None else 2 * self.deviation / math.sqrt(len(self.values))

    @property
    def p(self) -> float | None:
        """The two-sided p of Student's t-test that the mean is 0; of differences seed by seed: the paired test."""
        if self.mean is None or self.deviation is None:
            return None
        if self.deviation == 0:
            return 0.0 if self.mean else 1.0
        return two_sided_p(self.mean / self.deviation * math.sqrt(len(self.values)), len(self.values) - 1)

    @property
    def _known(self) -> bool:
        return bool(self.values) and all(map(math.isfinite, self.values))


def verdict(margin: Spread) -> State | None:
    """Whether a bar is held whose margins, seed by seed, are to be at most 0; None where one is not a number.

    Held: the mean lies at or below 0 by at least its noise. Not held: it lies above 0 by more than that. Within noise:
    neither. With one seed there is no noise to be known, and the sign decides.
    """
    if margin.mean is None:
        return None
    noise = margin.noise or 0.0
    if margin.mean <= -noise:
        return "held"
    return "not held" if margin.mean > noise else "within noise"


def paired(arm: Sequence[float], against: Sequence[float]) -> Spread:
    """arm - against, seed by seed."""
    return Spread(tuple(one - other for one, other in zip(arm, against, strict=True)))


def two_sided_p(t: float, freedom: int) -> float:
    """The probability that |T| is at least |t|, T having Student's distribution with `freedom` >= 1 degrees.

    The finite sums for whole degrees of freedom: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4, with
    theta = atan(|t| / sqrt(freedom)).
    """
    if freedom < 1:
        raise ValueError(f"there must be at least one degree of freedom, not {freedom}")
    theta = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(2 + odd, freedom + 1, 2):  # the sum's terms: cosine^(power - 2) and their factors
        total += term
        term *= cosine**2 * (power - 1) / power
    inside = (theta + sine * total) * 2 / math.pi if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))
