"""The replay buffer holds no bytes: which sample stands at a replayed place follows from the lineage.

Sample g of a phase is a replayed one iff floor((g + 1) s) > floor(g s), s being the share as an exact fraction: the
first g samples hold floor(g s) of them, each batch its part, and the phase's token budget stays what it was.

A replayed sample reads an earlier phase's own samples again (never what that phase itself replayed), in the order in
which they were first seen, and wraps around at the end. Under another seq_length that phase's token stream is cut anew,
in the order in which it was visited.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megacl.data.order import Int64


def replayed_before(samples: Int64, share: Fraction) -> Int64:
    """floor(g s) for each g: how many of the first g samples are replayed ones. int64 [N] -> int64 [N]."""
    # In two parts, since g times the numerator could exceed 64 bits.
    periods, rest = np.divmod(samples, share.denominator)
    result: Int64 = periods * share.numerator + rest * share.numerator // share.denominator
    return result


def is_replayed(samples: Int64, share: Fraction) -> NDArray[np.bool_]:
    """Whether each sample g is a replayed one. int64 [N] -> bool [N]."""
    return replayed_before(samples + 1, share) > replayed_before(samples, share)


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
