"""Mixtures: sample m of a phase -> (source, how many of that source came before), by exact integer counts.

Of the first m samples, source s has floor(m w_s) or ceil(m w_s), at every m, whatever the batch size: no drawing, no
drift, and a source of 0.1 % comes once in a thousand, not by luck. Weights become integers that sum to a period of at
most 65,536; the pattern of one period repeats, so any sample is found in O(1).
"""

import functools
import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megacl.data.order import Int64

MAX_PERIOD = 65_536


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as integers without a common divisor, whose sum is at most 65,536.

    A decimal counts as the fraction that it spells (0.1 is 1/10). Where the common denominator is larger than the
    limit, the weights are rounded to 65,536ths by largest remainder, each at least one of them.
    Raises ValueError for a weight that is not positive and for more sources than there are places.
    """
    exact = {name: Fraction(repr(weight)) for name, weight in weights.items()}
    if not exact or min(exact.values()) <= 0 or len(exact) > MAX_PERIOD:
        raise ValueError(f"weights must be positive, one to {MAX_PERIOD} of them")
    total = sum(exact.values())
    shares = {name: weight / total for name, weight in exact.items()}
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period <= MAX_PERIOD:
        return {name: int(share * period) for name, share in shares.items()}
    counts = {name: max(1, math.floor(share * MAX_PERIOD)) for name, share in shares.items()}
    by_remainder = sorted(counts, key=lambda name: counts[name] - shares[name] * MAX_PERIOD)
    while sum(counts.values()) > MAX_PERIOD:  # only where raising small ones to 1 took too many places
        counts[max(counts, key=lambda name: counts[name])] -= 1
    for name in by_remainder[: MAX_PERIOD - sum(counts.values())]:
        counts[name] += 1
    divisor = math.gcd(*counts.values())
    return {name: count // divisor for name, count in counts.items()}


@functools.lru_cache(maxsize=64)
def _pattern(weights: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One period: which source stands at each place, and how many of it stand before; both int64 [sum of weights].

    Occurrence k of a source of weight w may stand at places floor(k W / w) to ceil((k + 1) W / w) - 1: earlier it would
    exceed ceil(m w / W), later it would fall below floor(m w / W). Taking at each place the waiting occurrence with the
    nearest deadline meets all of them, since the sources fill every place exactly (Baruah et al. 1996, "Proportionate
    progress": such a schedule exists; Jackson 1955: nearest deadline first finds it).
    """
    period = sum(weights)
    releases = [(0, source, 0) for source in range(len(weights))]  # a heap of (place, source, occurrence)
    waiting: list[tuple[int, int, int]] = []  # a heap of (deadline, source, occurrence)
    sources = np.empty(period, dtype=np.int64)
    before = np.empty(period, dtype=np.int64)
    for place in range(period):
        while releases and releases[0][0] <= place:
            _, source, k = heapq.heappop(releases)
            weight = weights[source]
            heapq.heappush(waiting, (-(-(k + 1) * period // weight), source, k))
            if k + 1 < weight:
                heapq.heappush(releases, ((k + 1) * period // weight, source, k + 1))
        _, sources[place], before[place] = heapq.heappop(waiting)
    sources.setflags(write=False)
    before.setflags(write=False)
    return sources, before


@dataclass(frozen=True)
class Mixture:
    """Integer weights over numbered sources. All functions take and return int64 arrays."""

    weights: tuple[int, ...]

    @property
    def period(self) -> int:
        """Samples after which the pattern repeats."""
        return sum(self.weights)

    def locate(self, samples: Int64) -> tuple[Int64, Int64]:
        """(source, its draw) of each sample: int64 [N] -> two of int64 [N]. A source's draws count 0, 1, 2, ..."""
        sources, before = _pattern(self.weights)
        periods, places = np.divmod(samples, self.period)
        source = sources[places]
        return source, periods * np.asarray(self.weights, dtype=np.int64)[source] + before[places]

    def counts(self, samples: int) -> Int64:
        """How many of the first `samples` samples each source has: int64 [sources]."""
        sources, _ = _pattern(self.weights)
        periods, rest = divmod(samples, self.period)
        begun = np.bincount(sources[:rest], minlength=len(self.weights)).astype(np.int64)
        return periods * np.asarray(self.weights, dtype=np.int64) + begun
