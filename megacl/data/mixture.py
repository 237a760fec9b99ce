"""Mixtures: sample m of a phase -> (source, how many of that source came before), by exact integer counts.

    mixture = Mixture((MixturePiece(first=0, weights=(3, 1)), MixturePiece(first=500, weights=(1, 1))))
    source, draw = mixture.locate(np.arange(64))      # each source's draws count 0, 1, 2, ...

One pattern. Of its first m samples, source s has floor(m w_s) or ceil(m w_s), at every m, whatever the batch size: no
drawing, no drift, and a source of 0.1 % comes once in a thousand, not by luck. Weights become integers that sum to a
period of at most 65,536; the pattern of one period repeats, so any sample is found in O(1).

A line of L samples from pattern A to pattern B. Its first r samples hold floor(r^2 / 2L) of B, the integral of a part
that grows from 0 to 1, and the rest of A. Each side is read in its own pattern's order, so that a source's draw is the
sum of its places on both.

A mixture is a sequence of such pieces; each begins its patterns anew, and the draws go on. Where a phase continues an
earlier one's mixture, the first piece has begun before sample 0, and draws count from sample 0 all the same.
"""

import bisect
import functools
import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from megacl.data.order import Int64
from megacl.lineage import MixturePiece

MAX_PERIOD = 65_536

MAX_LINE = 2**32
"""Samples of a line must be fewer, since their number is squared in 64 bits."""


def integer_weights(weights: Mapping[str, float | Fraction]) -> dict[str, int]:
    """Weights as integers without a common divisor, whose sum is at most 65,536.

    A decimal counts as the fraction that it spells (0.1 is 1/10). Where the common denominator is larger than the
    limit, the weights are rounded to 65,536ths by largest remainder, each at least one of them.
    Raises ValueError for a weight that is not positive and for more sources than there are places.
    """
    exact = {name: Fraction(repr(w) if isinstance(w, float) else w) for name, w in weights.items()}
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


# ---------------------------------------------------------------------------------------------- one pattern


@dataclass(frozen=True)
class _Places:
    """One period of a pattern. All int64 [sum of weights]."""

    source: Int64
    """Which source stands at each place."""
    before: Int64
    """How many of it stand before."""
    by_source: Int64
    """source x period + place, sorted: the places of each source behind one another."""


@functools.lru_cache(maxsize=64)
def _places(weights: tuple[int, ...]) -> _Places:
    """Where the sources stand.

    Occurrence k of a source of weight w may stand at places floor(k W / w) to ceil((k + 1) W / w) - 1: earlier it would
    exceed ceil(m w / W), later it would fall below floor(m w / W). Taking at each place the waiting occurrence with the
    nearest deadline meets all of them, since the sources fill every place exactly (Baruah et al. 1996, "Proportionate
    progress": such a schedule exists; Jackson 1955: nearest deadline first finds it).
    """
    period, count = sum(weights), len(weights)
    each = np.asarray(weights, dtype=np.int64)
    owner = np.repeat(np.arange(count), each)
    k = np.arange(period) - np.repeat(np.cumsum(each) - each, each)
    release, deadline = k * period // each[owner], -(-(k + 1) * period // each[owner])
    by_release = _stably_sorted(release, period)
    jobs = (deadline * count + owner)[by_release].tolist()  # one number for both: heaps of numbers are the fastest
    released = np.cumsum(np.bincount(release, minlength=period)).tolist()
    waiting: list[int] = []
    taken: list[int] = []
    for begun, end in itertools.pairwise([0, *released]):
        for job in jobs[begun:end]:
            heapq.heappush(waiting, job)
        taken.append(heapq.heappop(waiting))
    sources = np.asarray(taken) % count
    places = _stably_sorted(sources, count)
    before = np.empty(period, dtype=np.int64)
    before[places] = k
    return _Places(sources, before, owner * period + places)


def _stably_sorted(values: Int64, limit: int) -> Int64:
    """The indices that sort values in [0, limit), equal ones in their order; in linear time where limit < 65,537."""
    return np.argsort(values.astype(np.min_scalar_type(limit - 1)), kind="stable")


@dataclass(frozen=True)
class Pattern:
    """Integer weights, not all of them 0, over numbered sources. Functions take and return int64 arrays."""

    weights: tuple[int, ...]

    @functools.cached_property
    def _weights(self) -> Int64:
        return np.asarray(self.weights, dtype=np.int64)

    @property
    def period(self) -> int:
        """Samples after which the pattern repeats."""
        return sum(self.weights)

    def locate(self, samples: Int64) -> tuple[Int64, Int64]:
        """(source, its draw) of each sample: int64 [N] -> two of int64 [N]. A source's draws count 0, 1, 2, ..."""
        at = _places(self.weights)
        periods, places = np.divmod(samples, self.period)
        source = at.source[places]
        return source, periods * self._weights[source] + at.before[places]

    def before(self, samples: Int64, source: Int64) -> Int64:
        """How many of the first `samples` samples are of `source`: element by element, int64 [N], [N] -> [N]."""
        at = _places(self.weights)
        periods, places = np.divmod(samples, self.period)
        first, reached = np.searchsorted(at.by_source, [source * self.period, source * self.period + places])
        begun: Int64 = reached - first
        return periods * self._weights[source] + begun

    def counts(self, samples: int) -> Int64:
        """How many of the first `samples` samples each source has: int64 [sources]."""
        periods, rest = divmod(samples, self.period)
        begun = np.bincount(_places(self.weights).source[:rest], minlength=len(self.weights)).astype(np.int64)
        return periods * self._weights + begun


# ---------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class _Stretch:
    """The samples of one piece, numbered as in the whole mixture."""

    piece: MixturePiece

    @functools.cached_property
    def _old(self) -> Pattern:
        return Pattern(self.piece.weights)

    @functools.cached_property
    def _new(self) -> Pattern:
        return Pattern(self.piece.line.weights if self.piece.line else self.piece.weights)

    def _of_new(self, samples: Int64) -> Int64:
        """How many samples of the piece before each of `samples`, int64 [N], go by the new pattern: int64 [N]."""
        line = self.piece.line
        if line is None:
            return np.zeros_like(samples)
        passed = np.append(samples, self.piece.first) - line.start
        unsigned = passed.astype(np.uint64)
        of_new = (unsigned * unsigned // np.uint64(2 * (line.end - line.start))).astype(np.int64)
        before: Int64 = of_new[:-1] - of_new[-1]
        return before

    def locate(self, samples: Int64) -> tuple[Int64, Int64]:
        """(source, its draw within the piece) of samples that lie in it."""
        if self.piece.line is None:
            return self._old.locate(samples - self.piece.first)
        of_new = self._of_new(samples)
        of_old = samples - self.piece.first - of_new
        is_new = self._of_new(samples + 1) > of_new
        source, draw = np.empty_like(samples), np.empty_like(samples)
        for mine, pattern, ours, other, others in (
            (is_new, self._new, of_new, self._old, of_old),
            (~is_new, self._old, of_old, self._new, of_new),
        ):
            source[mine], within = pattern.locate(ours[mine])
            draw[mine] = within + other.before(others[mine], source[mine])
        return source, draw

    def counts(self, end: int) -> Int64:
        """How many samples each source has from the piece's beginning up to `end`, not included."""
        of_new = int(self._of_new(np.array([end]))[0])
        return self._old.counts(end - self.piece.first - of_new) + self._new.counts(of_new)


@dataclass(frozen=True)
class Mixture:
    """Numbered sources mixed by pieces, of which the last goes on for ever: a line comes to an end, so it has none."""

    pieces: tuple[MixturePiece, ...]

    def __post_init__(self) -> None:
        if self.pieces[-1].line is not None:
            raise ValueError("a mixture's last piece has a line; a piece must follow where that ends")

    @functools.cached_property
    def _stretches(self) -> tuple[_Stretch, ...]:
        return tuple(_Stretch(piece) for piece in self.pieces)

    @functools.cached_property
    def _firsts(self) -> Int64:
        return np.array([piece.first for piece in self.pieces], dtype=np.int64)

    @functools.cached_property
    def _before(self) -> Int64:
        """Draws of each source before each piece, counted from sample 0 on: int64 [pieces, sources]."""
        before = [-self._stretches[0].counts(0)]
        for stretch, following in zip(self._stretches, self.pieces[1:], strict=False):
            before.append(before[-1] + stretch.counts(following.first))
        return np.stack(before)

    def _piece_of(self, samples: Int64) -> Int64:
        return np.searchsorted(self._firsts, samples, side="right") - 1

    def locate(self, samples: Int64) -> tuple[Int64, Int64]:
        """(source, its draw) of each sample: int64 [N] -> two of int64 [N]. A source's draws count 0, 1, 2, ..."""
        if len(self.pieces) == 1 and self.pieces[0].first == 0:
            return self._stretches[0].locate(samples)
        source, draw = np.empty_like(samples), np.empty_like(samples)
        pieces = self._piece_of(samples)
        for index in np.unique(pieces):
            mine = pieces == index
            source[mine], within = self._stretches[index].locate(samples[mine])
            draw[mine] = within + self._before[index][source[mine]]
        return source, draw

    def counts(self, samples: int) -> Int64:
        """How many of the first `samples` samples each source has: int64 [sources]."""
        index = int(self._piece_of(np.array([samples]))[0])
        counted: Int64 = self._before[index] + self._stretches[index].counts(samples)
        return counted


def pieces_since(pieces: tuple[MixturePiece, ...], sample: int) -> tuple[MixturePiece, ...]:
    """The pieces of the mixture that goes on with `sample` of this one: sample 0 there is that one here."""
    current = max(index for index, piece in enumerate(pieces) if piece.first <= sample)
    return tuple(
        replace(
            piece,
            first=piece.first - sample,
            line=piece.line and replace(piece.line, start=piece.line.start - sample, end=piece.line.end - sample),
        )
        for piece in pieces[current:]
    )


# ---------------------------------------------------------------------------------------------- sources that run out


def first_to_run_out(mixture: Mixture, left: Sequence[int], samples: int) -> tuple[int, int] | None:
    """(sample, source) of the first of `samples` samples that its source cannot give, or None if all can.

    left: how many draws each source has. Found by halving, since counts never fall.
    """
    limits = np.asarray(left, dtype=np.int64)
    sample = bisect.bisect_left(range(samples + 1), True, key=lambda m: bool((mixture.counts(m) > limits).any())) - 1
    if sample == samples:
        return None
    return sample, int(mixture.locate(np.array([sample]))[0][0])


def renormalised(
    pieces: tuple[MixturePiece, ...], left: Sequence[int], samples: int
) -> tuple[tuple[MixturePiece, ...], int, dict[int, int]]:
    """A mixture whose sources run out: from there on each pattern's others share a source's places by their weights.

    left: how many draws each source has. Returns the pieces; how many of the `samples` samples there are before a piece
    has nothing left; and for each source that runs out the sample that would have been the first beyond it. Pieces that
    begin at or behind the last of the samples are kept, since a phase that continues this one may reach them.
    """
    out: dict[int, int] = {}
    while (found := first_to_run_out(Mixture(pieces), left, samples)) is not None:
        sample, source = found
        out[source] = sample
        changed = [piece for piece in pieces if piece.first < sample]
        for piece, end in zip(pieces, [*(piece.first for piece in pieces[1:]), math.inf], strict=True):
            if end <= sample:
                continue
            first = max(piece.first, sample)
            without = _without(piece, source, first)
            if without is None and first < samples:
                samples = first
                changed += [later for later in pieces if later.first >= first]
                break
            changed.append(without or piece)
        pieces = tuple(changed) or pieces
    return pieces, samples, out


def _without(piece: MixturePiece, source: int, first: int) -> MixturePiece | None:
    """The rest of a piece from `first` on without one source, or None where that leaves nothing to read."""
    weights, line = _drop(piece.weights, source), piece.line
    if line is None:
        return MixturePiece(first=first, weights=weights) if any(weights) else None
    towards = _drop(line.weights, source)
    if any(weights) and any(towards):
        return MixturePiece(first=first, weights=weights, line=replace(line, weights=towards))
    return MixturePiece(first=first, weights=weights if any(weights) else towards) if any(weights + towards) else None


def _drop(weights: tuple[int, ...], source: int) -> tuple[int, ...]:
    kept = [0 if index == source else weight for index, weight in enumerate(weights)]
    return tuple(weight // (math.gcd(*kept) or 1) for weight in kept)
