"""The replay buffer holds no bytes: which sample stands at a replayed place follows from the lineage.

Sample g of a phase is a replayed one iff floor((g + 1) s) > floor(g s), s being the share as an exact fraction: the
first g samples hold floor(g s) of them, each batch its part, and the phase's token budget stays what it was.

A replayed sample reads an earlier phase's own samples again (never what that phase itself replayed or passed over), in
the order in which they were first seen, or under the policy `uniform` in a permutation of them, and round after round.
Under another seq_length that phase's token stream is cut anew, in the order in which it was visited.

A policy is weights over the earlier phases. With a_i the age of phase i where a new one begins:

    original, uniform   own tokens that phase i learned from: every earlier sample is equally likely
    power_law           (a_i + 1)^-d
    exponential         exp(-d a_i)
    latest              1 for the newest phase, 0 for the others

a_i counts phases from the beginning of phase i on, so that the newest has age 1; or the tokens learned since then, in
units of the mean phase so far, so that phases of one length have the same ages either way.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megacl.config_phase import ReplayConfig
from megacl.data.order import Int64, order_key
from megacl.lineage import Lineage, PhaseRecord, Ranges, ReplayedPhase


def replayed_before(samples: Int64, share: Fraction) -> Int64:
    """floor(g s) for each g: how many of the first g samples are replayed ones. int64 [N] -> int64 [N]."""
    # In two parts, since g times the numerator could exceed 64 bits.
    periods, rest = np.divmod(samples, share.denominator)
    result: Int64 = periods * share.numerator + rest * share.numerator // share.denominator
    return result


def is_replayed(samples: Int64, share: Fraction) -> NDArray[np.bool_]:
    """Whether each sample g is a replayed one. int64 [N] -> bool [N]."""
    return replayed_before(samples + 1, share) > replayed_before(samples, share)


# ---------------------------------------------------------------------------------------------- which phases


def policy_weights(replay: ReplayConfig, lineage: Lineage, phases: Sequence[str]) -> Mapping[str, float | Fraction]:
    """Weights over those of `phases` (names in `lineage`, not none) that a policy replays where a new phase begins."""
    if replay.policy == "latest":
        return {phases[-1]: 1.0}
    records = {phase.name: phase for phase in lineage.phases}
    if replay.policy in ("original", "uniform"):
        return {name: Fraction(records[name].own_samples * records[name].seq_length) for name in phases}
    ages = _ages(lineage, in_tokens=replay.age == "tokens")
    d = 0.5 if replay.d is None else replay.d
    if replay.policy == "power_law":
        youngest = min(ages[name] for name in phases) + 1  # a common factor here too
        return {name: max(((ages[name] + 1) / youngest) ** -d, sys.float_info.min) for name in phases}
    newest = min(ages[name] for name in phases)  # a common factor, without which all may be too small for a float
    return {name: max(math.exp(-d * (ages[name] - newest)), sys.float_info.min) for name in phases}


def _ages(lineage: Lineage, *, in_tokens: bool) -> dict[str, float]:
    """The age of each phase where a new one begins after `lineage`."""
    count = len(lineage.phases)
    if not in_tokens:
        return {phase.name: float(count - index) for index, phase in enumerate(lineage.phases)}
    ages, since = {}, 0
    for phase in reversed(lineage.phases):
        since += phase.tokens
        ages[phase.name] = since * count / lineage.tokens
    return ages


# ---------------------------------------------------------------------------------------------- which of its samples


def draws_in_a_round(phase: PhaseRecord, seq_length: int) -> int:
    """Sequences of `seq_length` that the own samples hold from which a phase has learned."""
    return phase.own_samples * phase.seq_length // seq_length


def times_replayed(lineage: Lineage, name: str) -> float:
    """How often the phases of a lineage have replayed phase `name`: tokens replayed, as a part of its own."""
    earlier = next(phase for phase in lineage.phases if phase.name == name)
    replays = [entry for phase in lineage.phases if phase.replay for entry in phase.replay.from_]
    replayed = sum(entry.tokens for entry in replays if entry.phase == name)
    return replayed / (earlier.own_samples * earlier.seq_length)


def next_draw(lineage: Lineage, name: str, *, permuted: bool, seq_length: int) -> int:
    """The draw from phase `name` with which a replay that begins after `lineage` goes on, counted over all rounds.

    It goes on where the last replay of that phase stopped. In the original order that is a place in the phase's
    tokens, and holds for every seq_length. Between two orders (original or permuted, or permuted by another
    seq_length) there is no such place: a round that was begun counts as over, so that in each round no token is
    replayed twice.
    """
    earlier = next(phase for phase in lineage.phases if phase.name == name)
    last: tuple[PhaseRecord, bool, ReplayedPhase] | None = None
    for phase in lineage.phases:
        if phase.replay:
            for entry in phase.replay.from_:
                if entry.phase == name:
                    last = phase, phase.replay.policy == "uniform", entry
    if last is None:
        return 0
    phase, was_permuted, entry = last
    a_round = draws_in_a_round(earlier, seq_length)
    rounds, draws = divmod(entry.first + entry.samples, draws_in_a_round(earlier, phase.seq_length))
    if permuted == was_permuted and (phase.seq_length == seq_length or not permuted):
        return rounds * a_round + min(-(-draws * phase.seq_length // seq_length), a_round)
    return (rounds + (draws > 0)) * a_round


def replay_key(phase: PhaseRecord, seq_length: int) -> int:
    """The key of the permutation in which the policy `uniform` reads a phase's own samples, cut to `seq_length`."""
    return order_key(seed=phase.seed, fingerprint=f"replay of phase {phase.name}", seq_length=seq_length)


class Kept:
    """The numbers that lie in some ranges, counted 0, 1, 2, ...: what is left of a phase that passed something over."""

    def __init__(self, ranges: Ranges) -> None:
        first, end = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
        self._upto = np.cumsum(end - first)
        self._shift = end - self._upto

    def numbers(self, indices: Int64) -> Int64:
        """Which number each index, [N] in [0, count), stands for: int64 [N] -> int64 [N]."""
        result: Int64 = indices + self._shift[np.searchsorted(self._upto, indices, side="right")]
        return result


@dataclass(frozen=True)
class Recut:
    """A list of sequences, cut to another length in the order of the list.

    The list's sequences of T tokens and one more are laid end to end, T tokens each; piece r is its tokens
    [r U, r U + U), and as the last one to predict the token that follows there: inside a sequence its next token, at
    its end the one that followed it originally. With U = T, piece r is sequence r. All arrays are int64.
    """

    read_list: Callable[[Int64], Int64]
    """Indices [N] -> tokens [N, T + 1]."""
    count: int
    """Length of the list."""
    old_length: int
    new_length: int

    @property
    def n(self) -> int:
        """Pieces of the new length."""
        return self.count * self.old_length // self.new_length

    def first_of(self, pieces: Int64) -> tuple[Int64, Int64]:
        """(index in the list, offset inside it) of each piece's first token: [N] -> [N], [N]."""
        index, offset = np.divmod(pieces * self.new_length, self.old_length)
        return index, offset

    def read(self, pieces: Int64) -> Int64:
        """Tokens [N, U + 1] of pieces [N]."""
        if self.old_length == self.new_length:
            return self.read_list(pieces)
        first, offset = self.first_of(pieces)
        touched = (self.old_length - 1 + self.new_length - 1) // self.old_length + 1
        indices = np.minimum(first[:, None] + np.arange(touched), self.count - 1)
        unique, back = np.unique(indices, return_inverse=True)
        tokens = self.read_list(unique)[back.reshape(indices.shape)]  # [N, touched, T + 1]
        rows = np.arange(pieces.size)[:, None]
        where = offset[:, None] + np.arange(self.new_length)
        body = tokens[rows, where // self.old_length, where % self.old_length]
        last = where[:, -1:]
        label = tokens[rows, last // self.old_length, last % self.old_length + 1]
        return np.concatenate([body, label], axis=1)
