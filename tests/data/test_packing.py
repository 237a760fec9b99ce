"""Packing by best fit against its rules, applied one by one, and against first fit."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Prepared
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import begin, finish, phase_config, source_of

from megacl.data.loader import Loader
from megacl.data.packing import PADDING, PackedSequences, pack
from megacl.data.source import open_source
from megacl.data.stream import PhaseStream
from megacl.errors import ConfigError, DataError
from megacl.lineage import Lineage

EOS = 1

lengths_of_a_shard = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def rows_of(lengths: list[int], row_length: int) -> list[list[tuple[int, int]]]:
    """The (start, length) of each row's pieces."""
    packing = pack(np.array(lengths), row_length)
    bounds = packing.bounds.tolist()
    pieces = list(zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True))
    return [pieces[begin:end] for begin, end in itertools.pairwise(bounds)]


def pieces_of(lengths: list[int], row_length: int) -> list[tuple[int, int]]:
    """All pieces, document by document: those that fit are whole, others are cut into whole rows and a rest."""
    pieces, begin = [], 0
    for length in lengths:
        for offset in range(0, length, row_length):
            pieces.append((begin + offset, min(row_length, length - offset)))
        begin += length
    return pieces


def best_fit_by_hand(pieces: list[tuple[int, int]], row_length: int) -> list[list[tuple[int, int]]]:
    """The definition: the longest first, each into the row with the least room, of equal ones the last one used."""
    rows: list[list[tuple[int, int]]] = []
    room: list[int] = []
    used: list[int] = []  # when each row was used last
    for time, piece in enumerate(sorted(pieces, key=lambda piece: (-piece[1], piece[0]))):
        fitting = [row for row in range(len(rows)) if room[row] >= piece[1]]
        if not fitting:
            rows.append([])
            room.append(row_length)
            used.append(0)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: (room[row], -used[row]))
        rows[row].append(piece)
        room[row] -= piece[1]
        used[row] = time
    return [sorted(row) for row in rows]


def first_fit(pieces: list[tuple[int, int]], row_length: int) -> int:
    """Rows that first fit needs, the pieces taken in their order."""
    room: list[int] = []
    for _, length in pieces:
        row = next((row for row, left in enumerate(room) if left >= length), None)
        if row is None:
            room.append(row_length - length)
        else:
            room[row] -= length
    return len(room)


# ---------------------------------------------------------------------------------------------- one shard


@settings(max_examples=150)
@given(lengths=lengths_of_a_shard, row_length=st.integers(2, 50))
def test_rows_are_those_of_best_fit_decreasing(lengths: list[int], row_length: int) -> None:
    rows = rows_of(lengths, row_length)
    expected = best_fit_by_hand(pieces_of(lengths, row_length), row_length)
    assert sorted(rows) == sorted(expected)


@given(lengths=lengths_of_a_shard, row_length=st.integers(2, 50))
def test_a_document_is_cut_only_where_it_is_longer_than_a_row(lengths: list[int], row_length: int) -> None:
    rows = rows_of(lengths, row_length)
    assert sorted(piece for row in rows for piece in row) == pieces_of(lengths, row_length)
    assert all(sum(length for _, length in row) <= row_length for row in rows)
    assert all(row == sorted(row) for row in rows)


@given(lengths=lengths_of_a_shard, row_length=st.integers(2, 50))
def test_no_two_rows_could_be_one(lengths: list[int], row_length: int) -> None:
    """So all rows but one are more than half full, on average over any two."""
    sums = sorted(sum(length for _, length in row) for row in rows_of(lengths, row_length))
    if len(sums) > 1:
        assert sums[0] + sums[1] > row_length


def test_a_packing_is_a_function_of_the_lengths_alone() -> None:
    lengths = np.random.Generator(np.random.Philox(0)).integers(1, 300, 2000)
    first, second = pack(lengths, 128), pack(lengths.astype(np.int32).copy(), 128)
    for name in ("bounds", "starts", "lengths"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_rows_are_fuller_than_those_of_first_fit_and_nearly_full_on_lengths_as_of_text() -> None:
    """Lengths with the spread of web text: log-normal around 150 tokens."""
    draw = np.random.Generator(np.random.Philox(1)).lognormal(np.log(150), 1.0, 3000)
    lengths = np.maximum(2, draw.astype(int)).tolist()
    for row_length in (256, 1024):
        rows = len(rows_of(lengths, row_length))
        assert rows <= first_fit(pieces_of(lengths, row_length), row_length)
        assert sum(lengths) / (rows * row_length) > 0.99


# ---------------------------------------------------------------------------------------------- a source


class ListedStream:
    """The training documents of some shards; token values are their places in the stream, EOS at documents' ends."""

    def __init__(self, shards: list[list[int]]) -> None:
        self.shards = shards
        self.ends = np.cumsum([sum(lengths) for lengths in shards])
        self.begins = np.append(0, self.ends[:-1])
        self.tokens, self.documents = int(self.ends[-1]), sum(map(len, shards))
        self.values = np.arange(self.tokens, dtype=np.int64) + 1000
        ends_of_documents = np.cumsum([length for lengths in shards for length in lengths])
        self.values[ends_of_documents - 1] = EOS
        self.opened: list[int] = []

    def documents_of(self, shard: int) -> Any:
        self.opened.append(shard)
        return SimpleNamespace(offsets=np.append(0, np.cumsum(self.shards[shard])).astype(np.int32))

    def read(self, start: int, length: int) -> Any:
        assert 0 <= start <= start + length <= self.tokens
        return self.values[start : start + length]


def listed_source(shards: list[list[int]], name: str = "s") -> Any:
    return source_of(ListedStream(shards), name, f"{name} {shards}", window=None, eos_id=EOS)


sources = st.lists(lengths_of_a_shard, min_size=1, max_size=4)


@settings(max_examples=80)
@given(
    shards=sources,
    seq_length=st.integers(2, 30),
    seed=st.integers(0, 3),
    window=st.sampled_from([None, 1, 2, 5]),
    epoch=st.integers(0, 2),
)
def test_every_token_is_predicted_once_an_epoch(
    shards: list[list[int]], seq_length: int, seed: int, window: int | None, epoch: int
) -> None:
    source = listed_source(shards)
    packed = PackedSequences(source, seq_length, seed, window)
    draws = np.arange(packed.n, dtype=np.int64) + epoch * packed.n
    rows = packed.read(packed.starts(draws))
    assert rows.shape == (packed.n, seq_length + 1)
    predicted = rows[:, 1:]
    assert sorted(predicted[predicted != PADDING].tolist()) == sorted(source.train.values.tolist())
    assert (predicted != PADDING).sum() / predicted.size == pytest.approx(packed.fill)


@settings(max_examples=80)
@given(shards=sources, seq_length=st.integers(2, 30))
def test_a_row_is_pieces_of_one_shard_behind_what_stood_before_them_and_then_padding(
    shards: list[list[int]], seq_length: int
) -> None:
    source = listed_source(shards)
    packed = PackedSequences(source, seq_length, 0)
    expected = [
        [(begin + first, length) for first, length in row]
        for lengths, begin in zip(shards, source.train.begins.tolist(), strict=True)
        for row in rows_of(lengths, seq_length)
    ]
    by_row = packed.read(np.arange(packed.n, dtype=np.int64)).tolist()
    for tokens, pieces in zip(by_row, expected, strict=True):
        places = [place for begin, length in pieces for place in range(begin, begin + length)]
        first = places[0]
        before = EOS if first == 0 else int(source.train.values[first - 1])
        assert tokens == [
            before,
            *source.train.values[places].tolist(),
            *[PADDING] * (seq_length - len(places)),
        ]


def test_rows_are_found_shard_by_shard_and_each_is_packed_once() -> None:
    source = listed_source([[5, 3, 9], [7], [2, 2, 2]], name="once")
    packed = PackedSequences(source, 8, 0)
    again = PackedSequences(source, 8, 1)
    packed.read(np.arange(packed.n, dtype=np.int64))
    again.read(np.arange(again.n, dtype=np.int64))
    assert sorted(source.train.opened) == [0, 1, 2]


def test_under_a_window_of_one_an_epoch_goes_through_the_shards_one_after_another() -> None:
    rng = np.random.Generator(np.random.Philox(3))
    source = listed_source([rng.integers(2, 30, 20).tolist() for _ in range(6)], name="windowed")
    packed = PackedSequences(source, 30, 0, window=1)
    orders = []
    for epoch in range(3):
        rows = packed.starts(np.arange(packed.n, dtype=np.int64) + epoch * packed.n).tolist()
        places = packed.read(np.array(rows)).max(axis=1) - 1000
        shards = np.searchsorted(source.train.ends, places, side="right").tolist()
        order = [shard for shard, _ in itertools.groupby(shards)]
        assert sorted(order) == [0, 1, 2, 3, 4, 5]
        assert rows != sorted(rows)
        orders.append(order)
    assert orders[0] != orders[1]


def test_a_source_without_documents_is_refused() -> None:
    source = listed_source([[3]])
    source.train.tokens = 0
    with pytest.raises(DataError, match=r"source 's' .* has no training documents; prepare some"):
        PackedSequences(source, 8, 0)


def test_documents_of_a_prepared_source_come_whole(prepared: Prepared) -> None:
    source = open_source(prepared.sources["english"])
    documents = [
        shard.tokens(index).tolist()
        for shard in map(source.train.documents_of, range(len(source.train.shards)))
        for index in range(len(shard))
    ]
    longest = max(map(len, documents))
    packed = PackedSequences(source, longest, 0)
    rows = packed.read(packed.starts(np.arange(packed.n, dtype=np.int64)))
    found = []
    for row in rows.tolist():
        assert row[0] == source.eos_id
        document: list[int] = []
        for token in row[1:]:
            if token == PADDING:
                break
            document.append(token)
            if token == source.eos_id:
                found.append(document)
                document = []
        assert not document
    assert sorted(found) == sorted(documents)


# ---------------------------------------------------------------------------------------------- a phase

SHARDS = {"a": [[4, 9, 2, 7, 30], [3, 3, 8]], "b": [[6, 5, 5, 14], [2, 11]]}
T, BATCH = 10, 12


def stream_of_two_phases() -> PhaseStream:
    """A packed phase of one source, then one of another that replays a quarter of it."""
    named = {name: listed_source(shards, name) for name, shards in SHARDS.items()}
    first = begin(Lineage(), phase_config("p0", {"a": 1}, 3), named, seq_length=T, batch=BATCH, packing="best_fit")
    lineage = finish(Lineage(), first)
    phase = phase_config("p1", {"b": 1}, 5, replay={"share": 0.25})
    return begin(lineage, phase, named, seq_length=T, batch=BATCH, packing="best_fit")


def batches(world_size: int, start: int = 0) -> list[Any]:
    loaders = []
    for rank in range(world_size):
        loader = Loader(stream_of_two_phases(), batch_size=BATCH, rank=rank, world_size=world_size, vocab_size=2000)
        loader.load_state_dict({"samples": start})
        loaders.append(loader)
    return [np.concatenate([batch.tokens for batch in ranks]).tolist() for ranks in zip(*loaders, strict=True)]


@pytest.mark.parametrize(("world_size", "done"), [(2, 0), (3, 2), (4, 4)])
def test_packed_batches_are_the_same_on_any_number_of_ranks_and_after_a_resume(world_size: int, done: int) -> None:
    assert batches(world_size, start=done * BATCH) == batches(1)[done:]


def test_a_packed_phase_is_replayed_row_by_row_in_its_order() -> None:
    stream = stream_of_two_phases()
    assert stream.padded
    samples = np.arange(5 * BATCH, dtype=np.int64)
    located = stream.locate(samples)
    tokens = stream.read(samples)
    a = PackedSequences(listed_source(SHARDS["a"], "a"), T, 0)
    expected = a.read(a.starts(np.arange(int(located.replayed.sum()), dtype=np.int64)))
    np.testing.assert_array_equal(tokens[located.replayed], expected)
    np.testing.assert_array_equal(located.start[located.replayed], a.starts(np.arange(len(expected), dtype=np.int64)))


def test_a_phase_goes_on_where_a_packed_one_stopped_and_not_where_a_cut_one_did() -> None:
    named = {"a": listed_source(SHARDS["a"], "a")}
    lineage = Lineage()
    firsts = []
    for number, packing in enumerate(["best_fit", "cut", "best_fit", "cut"]):
        if packing == "cut":
            named["a"].train.gather = lambda starts, length: np.zeros((len(starts), length), np.int64)
        phase = phase_config(f"p{number}", {"a": 1}, 1)
        stream = begin(lineage, phase, named, seq_length=4, batch=3, packing=packing)
        firsts.append(stream.record.sources[0].first)
        lineage = finish(lineage, stream)
    assert firsts == [0, 0, 3, 3]


def test_a_cut_phase_that_replays_a_packed_one_is_padded() -> None:
    named = {name: listed_source(shards, name) for name, shards in SHARDS.items()}
    first = begin(Lineage(), phase_config("p0", {"a": 1}, 3), named, seq_length=T, batch=BATCH, packing="best_fit")
    phase = phase_config("p1", {"b": 1}, 2, replay={"share": 0.5})
    assert begin(finish(Lineage(), first), phase, named, seq_length=T, batch=BATCH).padded
    assert not begin(Lineage(), phase_config("p0", {"b": 1}, 2), named, seq_length=T, batch=BATCH).padded


def test_a_packed_phase_is_not_replayed_under_another_seq_length() -> None:
    named = {name: listed_source(shards, name) for name, shards in SHARDS.items()}
    first = begin(Lineage(), phase_config("p0", {"a": 1}, 3), named, seq_length=T, batch=BATCH, packing="best_fit")
    phase = phase_config("p1", {"b": 1}, 2, replay={"share": 0.5})
    with pytest.raises(
        ConfigError,
        match="phase 'p1' replays 'p0', whose sequences of 10 are packed and cannot be cut to 5; give this",
    ):
        begin(finish(Lineage(), first), phase, named, seq_length=5, batch=BATCH)
