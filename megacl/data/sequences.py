"""A source as a random-access list of fixed-length sequences: cut where they fall, across documents and shards.

Sequence i of a stream is its tokens [i T, i T + T]: T to read and T to predict, shifted by one, so that neighbours
share one token and every token but the first is predicted once. There are n = (tokens - 1) // T of them.
"""

from dataclasses import dataclass

from megacl.data.order import Int64, order_key, permuted
from megacl.data.shards import Source
from megacl.errors import DataError


@dataclass(frozen=True)
class Sequences:
    """The training sequences of one generation of a source, in the order v1 of one seed."""

    source: Source
    seq_length: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise DataError(
                f"source {self.source.name!r} ({self.source.path}) has {self.source.train.tokens} training tokens, too "
                f"few for one sequence of {self.seq_length}; prepare more documents or shorten seq_length."
            )

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
