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

Where documents are packed instead of cut (data/packing.py), both orders are those of the rows.
"""

from dataclasses import dataclass
from typing import Literal

from megacl.data.order import Int64, WindowedOrder, order_key, permuted
from megacl.data.packing import PackedSequences
from megacl.data.source import Source
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
        self.source, self.seq_length = source, seq_length
        key = order_key(seed=seed, fingerprint=source.fingerprint, seq_length=seq_length, window=window)
        self._order = WindowedOrder((source.train.ends - source.train.begins - 1) // seq_length, window, key)
        _check_some(source, self.n, seq_length)

    @property
    def n(self) -> int:
        """Sequences in one epoch."""
        return self._order.n

    def starts(self, draws: Int64) -> Int64:
        """Where in the training stream each draw begins: int64 [N], counted over all epochs -> int64 [N]."""
        shards, within = self._order.locate(draws)
        starts: Int64 = self.source.train.begins[shards] + within * self.seq_length
        return starts

    def read(self, starts: Int64) -> Int64:
        """Tokens, int64 [N, T + 1], of the sequences that begin at `starts`, int64 [N]."""
        return self.source.train.gather(starts, self.seq_length + 1)


AnySequences = Sequences | WindowedSequences | PackedSequences


def build_sequences(
    source: Source, seq_length: int, seed: int, window: int | None, packing: Literal["cut", "best_fit"] = "cut"
) -> AnySequences:
    """The sequences of a source, cut or packed, in one of its orders. Raises DataError where there is not one."""
    if packing == "best_fit":
        return PackedSequences(source, seq_length, seed, window)
    if window is None:
        return Sequences(source, seq_length, seed)
    return WindowedSequences(source, seq_length, seed, window)


def _check_some(source: Source, n: int, seq_length: int) -> None:
    if n < 1:
        raise DataError(
            f"source {source.name!r} ({source.path}) has {source.train.tokens} training tokens, too few for one "
            f"sequence of {seq_length}; prepare more documents or shorten seq_length."
        )
