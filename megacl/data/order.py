"""O(1) permutations: the order in which a source is read, with nothing built and nothing kept.

    draws = np.arange(10)                        # the first ten draws from a source of n sequences
    key = order_key(seed=0, fingerprint=source.fingerprint, seq_length=2048)
    sequences = permuted(draws, n, key)          # int64, each of [0, n) once before any comes twice

Order v1: index = L * b + R with L in [0, a), R in [0, b), a = ceil(sqrt n), b = ceil(n / a), so that a b exceeds n by
less than a. Eight rounds of a Feistel network over these two digits, with addition instead of exclusive or (so that any
a and b will do), make a bijection of [0, a b); what falls outside [0, n) is sent through again until it falls inside
("cycle walking": Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). The round function is the finaliser of
SplitMix64 (Steele, Lea & Flood 2014). A change of any of this is order v2, beside this one: runs depend on every bit.
"""

import functools
import hashlib
import math

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
_UInt64 = NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def order_key(*, seed: int, fingerprint: str, seq_length: int, window: int | None = None) -> int:
    """The 64-bit key of a source's order: other data, another cut, window or seed is another order.

    window: shards in a window of a windowed order; None for a permutation of all sequences.
    """
    text = f"megacl order v1\n{seed}\n{fingerprint}\n{seq_length}"
    if window is not None:
        text += f"\nwindow {window}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: _UInt64) -> _UInt64:
    """The finaliser of SplitMix64: each bit of the result depends on each bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(draws: Int64, n: int, key: int) -> Int64:
    """Which of n items each draw takes: draws [e n, e n + n) are a permutation of [0, n), another for each epoch e.

    draws: int64 [N], non-negative. n: in [1, 2^62). Returns int64 [N] in [0, n). Raises ValueError otherwise.
    """
    if not 1 <= n < 2**62:
        raise ValueError(f"n is {n}; it must lie in [1, 2^62)")
    if draws.size and int(draws.min()) < 0:
        raise ValueError("draws must not be negative")
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64 on purpose
        epochs = (draws // n).astype(np.uint64)
        epoch_keys = _mix(epochs * _GOLDEN + np.uint64(key))
        result = _feistel((draws % n).astype(np.uint64), epoch_keys, a, b)
        outside = np.flatnonzero(result >= np.uint64(n))
        while outside.size:
            again = _feistel(result[outside], epoch_keys[outside], a, b)
            result[outside] = again
            outside = outside[again >= np.uint64(n)]
    return result.astype(np.int64)


def _feistel(index: _UInt64, keys: _UInt64, a: int, b: int) -> _UInt64:
    """A bijection of [0, a b): each round adds to one digit a function of the other, which can be taken away again."""
    left, right = np.divmod(index, np.uint64(b))
    for r in range(_ROUNDS):
        keys = keys + _GOLDEN
        if r % 2 == 0:
            left = (left + _mix(right ^ keys) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + _mix(left ^ keys) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


class WindowedOrder:
    """Draws from lists of items, such as shards of sequences: the lists in random order, mixed within windows.

    In each epoch the lists stand in a new random order, and the items of each `window` consecutive ones are permuted
    among themselves, so that a list is needed during one window of an epoch only. Memory is O(lists) for each epoch in
    use; a draw costs O(log lists).
    """

    def __init__(self, counts: Int64, window: int, key: int) -> None:
        """counts: items of each list, int64 [lists], not negative."""
        self._lists = np.flatnonzero(counts > 0)
        self._counts = counts[self._lists]
        self._window, self._key = window, key
        self.n = int(self._counts.sum())
        """Items in one epoch."""
        self._arranged = functools.lru_cache(maxsize=2)(self._arrange)  # a batch may begin the next epoch

    def _arrange(self, epoch: int) -> tuple[Int64, Int64, Int64]:
        """The lists of an epoch in their order, as indices of `_lists`; where each one's items end; windows' edges."""
        lists = len(self._lists)
        # The complement of the key, since the key itself orders the windows' items.
        order = permuted(np.arange(lists) + epoch * lists, lists, self._key ^ (2**64 - 1))
        ends = np.cumsum(self._counts[order])
        last = np.minimum(np.arange(self._window, lists + self._window, self._window), lists) - 1
        return order, ends, np.concatenate([[0], ends[last]])

    def locate(self, draws: Int64) -> tuple[Int64, Int64]:
        """(list, item in it) of each draw, counted over all epochs: int64 [N] -> two of int64 [N]."""
        lists, items = np.empty_like(draws), np.empty_like(draws)
        epochs, places = np.divmod(draws, self.n)
        for epoch in np.unique(epochs).tolist():
            mine = np.flatnonzero(epochs == epoch)
            lists[mine], items[mine] = self._locate_in(epoch, places[mine])
        return lists, items

    def _locate_in(self, epoch: int, places: Int64) -> tuple[Int64, Int64]:
        order, ends, edges = self._arranged(epoch)
        windows = np.searchsorted(edges, places, side="right") - 1
        permuted_places = np.empty_like(places)
        for window in np.unique(windows).tolist():
            mine = np.flatnonzero(windows == window)
            begin, size = int(edges[window]), int(edges[window + 1] - edges[window])
            round_ = epoch * (len(edges) - 1) + window  # each window of each epoch is an epoch of its own to `permuted`
            permuted_places[mine] = begin + permuted(places[mine] - begin + round_ * size, size, self._key)
        at = np.searchsorted(ends, permuted_places, side="right")
        return self._lists[order[at]], permuted_places - (ends[at] - self._counts[order[at]])
