"""A source as a random-access list of fixed-length sequences, in one of two orders.

    sequences = build_sequences(source, seq_length=2048, seed=0, window=64)
    starts = sequences.starts(np.arange(16))        # int64 [16]: where in the training stream these draws begin
    tokens = sequences.read(starts)                 # int64 [16, 2049]

A sequence at p is the tokens [p, p + T]: T to read and T to predict, shifted by one, so that neighbours share one
token.

**All of them permuted** (window null). The stream is cut where it falls, across documents and shards: sequence i begins
at i T, there are n = (tokens - 1) // T, and every token but the first is predicted once. A batch touches as many shards
as it has sequences.

**Windowed** (window N). Each shard is cut by itself, into (tokens - 1) // T sequences; what is left at its end, fewer
than T tokens, is not read. In each epoch the shards stand in a new random order, and each N consecutive ones are a
window, whose sequences are permuted among themselves. So a shard is needed during one window of an epoch only, and may
be fetched once and read whole. Memory is O(shards) for each epoch in use, 1.6 MB for 100,000 shards; a sample costs
O(log shards).
"""

import functools
from dataclasses import dataclass

import numpy as np

from megacl.data.order import Int64, order_key, permuted
from megacl.data.shards import Source
from megacl.errors import DataError


@dataclass(frozen=True)
class Sequences:
    """The training sequences of one generation of a source, all of them permuted, in the order v1 of one seed."""

    source: Source
    seq_length: int
    seed: int

    def __post_init__(self) -> None:
        _check_some(self.source, self.n, self.seq_length)

    @property
    def n(self) -> int:
        """Sequences in one epoch."""
        return (self.source.train.tokens - 1) // self.seq_length

    def starts(self, draws: Int64) -> Int64:
        """Where in the training stream each draw begins: int64 [N], counted over all epochs -> int64 [N]."""
        key = order_key(seed=self.seed, fingerprint=self.source.fingerprint, seq_length=self.seq_length)
        return permuted(draws, self.n, key) * self.seq_length

    def read(self, starts: Int64) -> Int64:
        """Tokens, int64 [N, T + 1], of the sequences that begin at `starts`, int64 [N]."""
        return self.source.train.gather(starts, self.seq_length + 1)


class WindowedSequences:
    """The training sequences of a source, its shards in random order, permuted inside each `window` of them."""

    def __init__(self, source: Source, seq_length: int, seed: int, window: int) -> None:
        self.source, self.seq_length, self.window = source, seq_length, window
        self._key = order_key(seed=seed, fingerprint=source.fingerprint, seq_length=seq_length, window=window)
        counts = (source.train.ends - source.train.begins - 1) // seq_length
        self._shards = np.flatnonzero(counts > 0)
        self._counts: Int64 = counts[self._shards]
        self.n = int(self._counts.sum())
        """Sequences in one epoch."""
        _check_some(source, self.n, seq_length)
        self._arranged = functools.lru_cache(maxsize=2)(self._arrange)  # a batch may begin the next epoch

    def _arrange(self, epoch: int) -> tuple[Int64, Int64]:
        """The shards of an epoch in their order, as indices of `_shards`, and where each one's sequences end in it."""
        shards = len(self._shards)
        # The complement of the key, since the key itself orders the windows' sequences.
        order = permuted(np.arange(shards) + epoch * shards, shards, self._key ^ (2**64 - 1))
        return order, np.cumsum(self._counts[order])

    def starts(self, draws: Int64) -> Int64:
        """Where in the training stream each draw begins: int64 [N], counted over all epochs -> int64 [N]."""
        starts = np.empty_like(draws)
        epochs, places = np.divmod(draws, self.n)
        for epoch in np.unique(epochs).tolist():
            mine = np.flatnonzero(epochs == epoch)
            starts[mine] = self._starts_in(epoch, places[mine])
        return starts

    def _starts_in(self, epoch: int, places: Int64) -> Int64:
        order, ends = self._arranged(epoch)
        last = np.minimum(np.arange(self.window, len(ends) + self.window, self.window), len(ends)) - 1
        edges = np.concatenate([[0], ends[last]])
        windows = np.searchsorted(edges, places, side="right") - 1
        permuted_places = np.empty_like(places)
        for window in np.unique(windows).tolist():
            mine = np.flatnonzero(windows == window)
            begin, size = int(edges[window]), int(edges[window + 1] - edges[window])
            round_ = epoch * len(last) + window  # each window of each epoch is an epoch of its own to `permuted`
            permuted_places[mine] = begin + permuted(places[mine] - begin + round_ * size, size, self._key)
        at = np.searchsorted(ends, permuted_places, side="right")
        within = permuted_places - (ends[at] - self._counts[order[at]])
        starts: Int64 = self.source.train.begins[self._shards[order[at]]] + within * self.seq_length
        return starts

    def read(self, starts: Int64) -> Int64:
        """Tokens, int64 [N, T + 1], of the sequences that begin at `starts`, int64 [N]."""
        return self.source.train.gather(starts, self.seq_length + 1)


def build_sequences(source: Source, seq_length: int, seed: int, window: int | None) -> Sequences | WindowedSequences:
    """The sequences of a source in one of its orders. Raises DataError where there is not one."""
    if window is None:
        return Sequences(source, seq_length, seed)
    return WindowedSequences(source, seq_length, seed, window)


def _check_some(source: Source, n: int, seq_length: int) -> None:
    if n < 1:
        raise DataError(
            f"source {source.name!r} ({source.path}) has {source.train.tokens} training tokens, too few for one "
            f"sequence of {seq_length}; prepare more documents or shorten seq_length."
        )
