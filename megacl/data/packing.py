"""A source as rows that no document is cut for: documents packed into sequences by best fit.

A row is T + 1 tokens: one to begin with, then whole documents, at most T tokens of them, then PADDING. A document of
more than T tokens is cut into pieces of T, of which each has a row to itself, and the rest, which is packed like a
document. A row begins with what stands before its first piece in the source: EOS, or inside a cut document the token
before. So every token is predicted once an epoch, as where sequences are cut.

    packed = PackedSequences(source, seq_length=2048, seed=0)
    packed.n                                        # rows of an epoch
    packed.fill                                     # 0.999: the part of their places that holds tokens
    packed.read(packed.starts(np.arange(64)))       # int64 [64, 2049], PADDING at the ends

Each shard is packed for itself, from its documents' lengths alone, so any row is found without the other shards: only
their numbers of rows must be known. These are counted once in a process, at the first use, at the price of packing
every shard once; docs/design.md says what that costs. No token is read for it.
"""

import collections
import contextvars
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megacl.data.order import Int64, WindowedOrder, order_key, permuted
from megacl.data.source import Source, TokenStream
from megacl.errors import DataError

PADDING = -1
"""Stands behind the last document of a row; it is neither read nor predicted."""

_PACKED_SHARDS = 4096
"""Shards whose packing a process keeps, over all sources: about 80 KB each of 10,000 documents."""

_THREADS = 8
"""Shards that are opened at a time while rows are counted: what they wait for is the disk."""

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Packing:
    """Which pieces of a shard's tokens lie in which row."""

    bounds: Int32
    """Row r's pieces are numbers bounds[r] to bounds[r + 1] - 1: [rows + 1]."""
    starts: Int32
    """Where in the shard each piece begins, ascending inside a row: [pieces]."""
    lengths: Int32
    """Tokens of each piece: [pieces]."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, row: int) -> tuple[list[int], list[int]]:
        """(starts, lengths) of a row's pieces."""
        begin, end = int(self.bounds[row]), int(self.bounds[row + 1])
        return self.starts[begin:end].tolist(), self.lengths[begin:end].tolist()


def pack(lengths: npt.NDArray[np.integer], row_length: int) -> Packing:
    """Packs documents that lie end to end into rows of at most row_length tokens, by best fit decreasing.

    lengths: tokens of each document, at least 1. The longest document comes first, of equal ones the earlier; each goes
    into the row that it leaves the least room in, of equal ones into the one that was used last, or into a new one.
    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
    """
    lengths = lengths.astype(np.int64)
    whole, rest = np.divmod(lengths, row_length)
    begins = np.cumsum(lengths) - lengths
    has_rest = rest > 0
    rests = rest[has_rest]
    rows_of_rests = _best_fit(rests, row_length)
    # A piece of a whole row's length: the k-th of its document, which comes k row lengths behind the document's begin.
    number = int(whole.sum())
    k = np.arange(number) - np.repeat(np.cumsum(whole) - whole, whole)
    rows = np.concatenate([rows_of_rests, np.arange(number) + int(rows_of_rests.max(initial=-1)) + 1])
    starts = np.concatenate([(begins + whole * row_length)[has_rest], np.repeat(begins, whole) + k * row_length])
    sizes = np.concatenate([rests, np.full(number, row_length)])
    order = np.lexsort((starts, rows))
    bounds = np.append(0, np.cumsum(np.bincount(rows)))
    return Packing(*(array.astype(np.int32) for array in (bounds, starts[order], sizes[order])))


def _best_fit(lengths: Int64, row_length: int) -> Int64:
    """The row of each piece, int64 [pieces]; lengths: int64 [pieces] in [1, row_length]."""
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    # No two of the pieces longer than half a row share one.
    alone = int(np.searchsorted(-falling, -(row_length // 2)))
    rows = list(range(alone))
    by_room: dict[int, list[int]] = collections.defaultdict(list)
    rooms = 0  # bit r is set where by_room[r] is not empty: the least room of L or more is the lowest bit from L on
    for row, length in enumerate(falling[:alone].tolist()):
        by_room[row_length - length].append(row)
        rooms |= 1 << (row_length - length)
    new = alone
    for length in falling[alone:].tolist():
        large_enough = rooms >> length
        if large_enough:
            room = length + (large_enough & -large_enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, new
            new += 1
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
        rows.append(row)
    result = np.empty(len(lengths), np.int64)
    result[order] = rows
    return result


@dataclass(frozen=True)
class _Packed:
    """The training documents of a source in rows of one length. The fingerprint stands for the stream in caches."""

    fingerprint: str
    row_length: int
    stream: TokenStream = field(compare=False)


@functools.lru_cache(maxsize=_PACKED_SHARDS)
def _packing(packed: _Packed, shard: int) -> Packing:
    """The packing of one shard; DataError where it is damaged or cannot be opened."""
    return pack(np.diff(packed.stream.documents_of(shard).offsets), packed.row_length)


@functools.lru_cache(maxsize=64)
def _rows(packed: _Packed) -> tuple[Int64, Int64]:
    """The number of each shard's first row, and of the one behind its last: two of int64 [shards]."""
    with ThreadPoolExecutor(_THREADS) as threads:
        # A thread does not know by itself what its starter's `wanted_until` says.
        counted = [
            threads.submit(contextvars.copy_context().run, _packing, packed, shard)
            for shard in range(len(packed.stream.shards))
        ]
        counts = np.array([len(packing.result()) for packing in counted], np.int64)
    ends = np.cumsum(counts)
    return ends - counts, ends


@dataclass(frozen=True)
class PackedSequences:
    """The rows of one generation of a source, in one of its orders. What `starts` gives are numbers of rows.

    window: as in data/sequences.py.
    """

    source: Source
    seq_length: int
    seed: int
    window: int | None = None

    def __post_init__(self) -> None:
        if not self.source.train.tokens:
            raise DataError(
                f"source {self.source.name!r} ({self.source.path}) has no training documents; prepare some."
            )

    @property
    def _packed(self) -> _Packed:
        return _Packed(self.source.fingerprint, self.seq_length, self.source.train)

    @property
    def n(self) -> int:
        """Rows in one epoch."""
        return int(_rows(self._packed)[1][-1])

    @property
    def fill(self) -> float:
        """The part of the rows' places that holds tokens to predict, in (0, 1]; the rest is padding."""
        return self.source.train.tokens / (self.n * self.seq_length)

    @functools.cached_property
    def _key(self) -> int:
        fingerprint = self.source.fingerprint
        return order_key(seed=self.seed, fingerprint=fingerprint, seq_length=self.seq_length, window=self.window)

    @functools.cached_property
    def _windowed(self) -> WindowedOrder | None:
        begins, ends = _rows(self._packed)
        return None if self.window is None else WindowedOrder(ends - begins, self.window, self._key)

    def starts(self, draws: Int64) -> Int64:
        """The row of each draw: int64 [N], counted over all epochs -> int64 [N]."""
        if self._windowed is None:
            return permuted(draws, self.n, self._key)
        shards, within = self._windowed.locate(draws)
        rows: Int64 = _rows(self._packed)[0][shards] + within
        return rows

    def read(self, starts: Int64) -> Int64:
        """Tokens, int64 [N, T + 1], of the rows `starts`, int64 [N]."""
        packed, stream, eos = self._packed, self.source.train, self.source.eos_id
        begins, ends = _rows(packed)
        result = np.full((len(starts), self.seq_length + 1), PADDING, np.int64)
        shards = np.searchsorted(ends, starts, side="right")
        for shard in np.unique(shards).tolist():
            packing, first_row = _packing(packed, shard), int(begins[shard])
            begin, end = int(stream.begins[shard]), int(stream.ends[shard])
            values = stream.read(begin, end - begin)  # a view
            for index in np.flatnonzero(shards == shard).tolist():
                tokens = result[index]
                firsts, lengths = packing.row(int(starts[index]) - first_row)
                tokens[0] = values[firsts[0] - 1] if firsts[0] else eos
                place = 1
                for first, length in zip(firsts, lengths, strict=True):
                    tokens[place : place + length] = values[first : first + length]
                    place += length
        return result
