"""The samples of a phase, checked by their tokens alone against the rules they follow, applied one by one."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import STRIDE, begin, counting_source, finish, phase_config

from megacl.data.stream import PhaseStream, open_recorded
from megacl.errors import ConfigError, DataError
from megacl.lineage import Lineage, load_lineage, save_lineage

T = 4


def rows_of(stream: PhaseStream) -> list[list[int]]:
    """All samples of a phase, one by one, as lists of tokens."""
    return stream.read(np.arange(stream.record.budget_samples)).tolist()


def split(rows: list[list[int]], share: str) -> tuple[list[list[int]], list[list[int]]]:
    """(new samples, replayed samples), by the rule on g, in exact fractions."""
    fraction = Fraction(share)
    replayed = [((g + 1) * fraction).__floor__() > (g * fraction).__floor__() for g in range(len(rows))]
    new = [row for row, again in zip(rows, replayed, strict=True) if not again]
    old = [row for row, again in zip(rows, replayed, strict=True) if again]
    return new, old


def place(row: list[int]) -> tuple[int, int]:
    """(source, sequence number) of a sample that is one sequence."""
    source, start = divmod(row[0], STRIDE)
    assert row == list(range(row[0], row[0] + T + 1)), "a sequence is T tokens and the one that follows"
    assert start % T == 0
    return source, start // T


sizes = st.lists(st.integers(T + 1, 60 * T), min_size=1, max_size=3)
shares = st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.9])


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, steps=st.integers(1, 30), weight=st.integers(1, 5), seed=st.integers(0, 5))
def test_nothing_comes_twice_before_everything_came_once(sizes: list[int], steps: int, weight: int, seed: int) -> None:
    sources = {f"s{i}": counting_source(i, size) for i, size in enumerate(sizes)}
    mixture = {name: weight if name == "s0" else 1.0 for name in sources}
    lineage = Lineage()
    seen: dict[int, list[int]] = {i: [] for i in range(len(sizes))}
    for number in range(3):  # three phases on the same data go on where the one before stopped
        stream = begin(lineage, phase_config(f"p{number}", mixture, steps), sources, seq_length=T, batch=3, seed=seed)
        for row in rows_of(stream):
            source, sequence = place(row)
            seen[source].append(sequence)
        lineage = finish(lineage, stream)
    for source, sequences in seen.items():
        n = (sizes[source] - 1) // T
        for epoch in range(0, len(sequences), n):
            part = sequences[epoch : epoch + n]
            assert len(set(part)) == len(part)
            assert max(part, default=0) < n


@settings(deadline=None, max_examples=60)
@given(steps=st.tuples(*[st.integers(1, 20)] * 4), shares=st.tuples(*[shares] * 3), batch=st.integers(1, 7))
def test_replay_reads_the_earlier_phases_own_samples_in_their_order_and_goes_on_where_it_stopped(
    steps: tuple[int, ...], shares: tuple[float, ...], batch: int
) -> None:
    sources = {f"s{i}": counting_source(i, 500) for i in range(4)}
    lineage = Lineage()
    own: dict[str, list[list[int]]] = {}
    cursor: dict[str, int] = {}
    for number in range(4):
        share = shares[number - 1] if number else 0.0
        replay = {"replay": {"share": share}} if share else {}
        phase = phase_config(f"p{number}", {f"s{number}": 1}, steps[number], **replay)
        if share and not any(own.values()):
            with pytest.raises(ConfigError, match="nothing to replay"):
                begin(lineage, phase, sources, seq_length=T, batch=batch)
            return
        stream = begin(lineage, phase, sources, seq_length=T, batch=batch)
        new, old = split(rows_of(stream), str(share))
        assert len(old) == (Fraction(str(share)) * steps[number] * batch).__floor__()
        assert all(place(row)[0] == number for row in new)
        by_phase: dict[int, list[list[int]]] = {}
        for row in old:
            by_phase.setdefault(place(row)[0], []).append(row)
        for earlier, rows in by_phase.items():
            name = f"p{earlier}"
            at = cursor.get(name, 0)
            expected = [own[name][(at + i) % len(own[name])] for i in range(len(rows))]
            assert rows == expected
            cursor[name] = at + len(rows)
        own[f"p{number}"] = new
        lineage = finish(lineage, stream)
        recorded = lineage.phases[-1].replay
        if recorded:
            assert {entry.phase: entry.samples for entry in recorded.from_ if entry.samples} == {
                f"p{earlier}": len(rows) for earlier, rows in by_phase.items()
            }


def test_replay_is_split_by_the_tokens_that_earlier_phases_saw() -> None:
    sources = {f"s{i}": counting_source(i, 5000) for i in range(3)}
    lineage = Lineage()
    for number, steps in enumerate((30, 10)):
        stream = begin(lineage, phase_config(f"p{number}", {f"s{number}": 1}, steps), sources, seq_length=T, batch=10)
        lineage = finish(lineage, stream)
    phase = phase_config("p2", {"s2": 1}, 8, replay={"share": 0.5})
    _, old = split(rows_of(begin(lineage, phase, sources, seq_length=T, batch=10)), "1/2")
    assert [sum(place(row)[0] == source for row in old) for source in (0, 1)] == [30, 10]
    phase = phase_config("p2", {"s2": 1}, 8, replay={"share": 0.5, "from": {"p1": 3, "p0": 1}})
    _, old = split(rows_of(begin(lineage, phase, sources, seq_length=T, batch=10)), "1/2")
    assert [sum(place(row)[0] == source for row in old) for source in (0, 1)] == [10, 30]


@settings(deadline=None, max_examples=60)
@given(old_length=st.integers(2, 9), new_length=st.integers(2, 20), steps=st.integers(6, 12))
def test_under_another_length_the_earlier_stream_is_cut_anew_in_the_order_it_was_visited(
    old_length: int, new_length: int, steps: int
) -> None:
    sources = {"s0": counting_source(0, 900), "s1": counting_source(1, 9000)}
    first = begin(Lineage(), phase_config("p0", {"s0": 1}, steps), sources, seq_length=old_length, batch=5)
    visited = rows_of(first)
    tokens = [token for row in visited for token in row[:-1]]
    after = {row[-2]: row[-1] for row in visited}  # what followed the last token of a visited sequence
    lineage = finish(Lineage(), first)
    second = phase_config("p1", {"s1": 1}, 7, replay={"share": 0.5})
    stream = begin(lineage, second, sources, seq_length=new_length, batch=4)
    _, old = split(rows_of(stream), "1/2")
    pieces = len(tokens) // new_length
    for number, row in enumerate(old):
        start = number % pieces * new_length
        assert row[:-1] == tokens[start : start + new_length]
        end = start + new_length
        expected = after[row[-2]] if end % old_length == 0 else tokens[end]
        assert row[-1] == expected


def test_a_model_from_elsewhere_replays_a_named_source() -> None:
    sources = {"new": counting_source(0, 900), "old": counting_source(1, 200)}
    phase = phase_config("p0", {"new": 1}, 12, replay={"share": 0.25, "from_sources": {"old": 1}})
    stream = begin(Lineage(), phase, sources, seq_length=T, batch=8)
    new, old = split(rows_of(stream), "1/4")
    assert {place(row)[0] for row in new} == {0}
    assert [place(row)[0] for row in old] == [1] * 24
    assert len({place(row) for row in old}) == 24
    lineage = finish(Lineage(), stream)
    stream = begin(lineage, phase_config("p1", {"old": 1}, 3), sources, seq_length=T, batch=8)
    again = {place(row) for row in rows_of(stream)}
    assert again.isdisjoint({place(row) for row in old}), "the source goes on where its replay stopped"


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_sample_is_found_without_the_ones_before_it(data: Any) -> None:
    sources = {f"s{i}": counting_source(i, 700) for i in range(3)}
    lineage = finish(
        Lineage(),
        begin(Lineage(), phase_config("p0", {"s0": 2, "s1": 1}, 10), sources, seq_length=6, batch=5),
    )
    phase = phase_config("p1", {"s2": 1, "s0": 3}, 10, replay={"share": 0.3})
    stream = begin(lineage, phase, sources, seq_length=T, batch=5)
    whole = stream.read(np.arange(50))
    some = np.array(data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=12)), dtype=np.int64)
    assert np.array_equal(stream.read(some), whole[some])
    located = stream.locate(some)
    first = np.array([stream.sources[source].train.number for source in located.source]) * STRIDE + located.start
    assert np.array_equal(first, whole[some, 0])
    assert np.array_equal(located.phase, np.where(located.replayed, 0, 1))


def test_a_lineage_read_back_from_its_file_gives_the_same_samples(tmp_path: Any) -> None:
    sources = {f"s{i}": counting_source(i, 700) for i in range(2)}
    lineage = finish(Lineage(), begin(Lineage(), phase_config("p0", {"s0": 1}, 9), sources, seq_length=T, batch=3))
    stream = begin(lineage, phase_config("p1", {"s1": 1}, 9, replay={"share": 0.4}), sources, seq_length=T, batch=3)
    lineage = finish(lineage, stream, samples=12)
    save_lineage(lineage, tmp_path)
    again = load_lineage(tmp_path)
    assert again == lineage
    by_fingerprint = {source.fingerprint: source for source in sources.values()}
    recomputed = PhaseStream(again, lambda record: by_fingerprint[record.fingerprint])
    assert np.array_equal(recomputed.read(np.arange(27)), stream.read(np.arange(27)))


def test_replaying_a_phase_that_was_left_early_reads_only_what_it_saw() -> None:
    sources = {f"s{i}": counting_source(i, 2000) for i in range(2)}
    first = begin(Lineage(), phase_config("p0", {"s0": 1}, 50), sources, seq_length=T, batch=4)
    lineage = finish(Lineage(), first, samples=20)
    stream = begin(lineage, phase_config("p1", {"s1": 1}, 20, replay={"share": 0.5}), sources, seq_length=T, batch=4)
    _, old = split(rows_of(stream), "1/2")
    assert {place(row) for row in old} == {place(row) for row in rows_of(first)[:20]}
    assert any("2.00 times over" in line for line in stream.repeats())


def test_several_epochs_are_counted_and_said() -> None:
    sources = {"s0": counting_source(0, 10 * T + 1)}
    stream = begin(Lineage(), phase_config("p0", {"s0": 1}, 5), sources, seq_length=T, batch=5)
    assert finish(Lineage(), stream).phases[0].sources[0].epochs == 2.5
    assert stream.repeats() == ["phase 'p0': by its end the model has read source 's0' 2.50 times over"]


def test_what_was_read_in_another_cut_or_order_counts_as_read() -> None:
    sources = {"s0": counting_source(0, 200 * T + 1)}
    lineage = finish(Lineage(), begin(Lineage(), phase_config("p0", {"s0": 1}, 18), sources, seq_length=T, batch=10))
    for changed in ({"seq_length": 2 * T, "batch": 5}, {"seq_length": T, "batch": 10, "seed": 1}):
        stream = begin(lineage, phase_config("p1", {"s0": 1}, 18), sources, **changed)
        assert finish(lineage, stream).phases[1].sources[0].epochs == 1.8
        assert stream.repeats() == ["phase 'p1': by its end the model has read source 's0' 1.80 times over"]


def test_reading_in_another_order_what_was_partly_read_is_said() -> None:
    sources = {"s0": counting_source(0, 200 * T + 1)}
    lineage = finish(Lineage(), begin(Lineage(), phase_config("p0", {"s0": 1}, 8), sources, seq_length=T, batch=10))
    stream = begin(lineage, phase_config("p1", {"s0": 1}, 8), sources, seq_length=T, batch=10, seed=1)
    assert ["320 tokens in another" in line for line in stream.repeats()] == [True]
    stream = begin(lineage, phase_config("p1", {"s0": 1}, 8), sources, seq_length=T, batch=10)
    assert stream.repeats() == []


def test_a_source_too_small_for_one_sequence_is_refused() -> None:
    sources = {"s0": counting_source(0, T)}
    with pytest.raises(DataError, match="too few for one sequence of 4"):
        begin(Lineage(), phase_config("p0", {"s0": 1}, 5), sources, seq_length=T, batch=5)


def test_a_phase_name_that_the_model_knows_is_refused() -> None:
    sources = {"s0": counting_source(0, 100)}
    lineage = finish(Lineage(), begin(Lineage(), phase_config("p0", {"s0": 1}, 2), sources, seq_length=T, batch=5))
    with pytest.raises(ConfigError, match="already been through a phase or a merge named 'p0'"):
        begin(lineage, phase_config("p0", {"s0": 1}, 2), sources, seq_length=T, batch=5)


def test_replaying_a_phase_that_the_model_has_not_been_through_names_those_it_knows() -> None:
    sources = {"s0": counting_source(0, 100)}
    lineage = finish(Lineage(), begin(Lineage(), phase_config("p0", {"s0": 1}, 2), sources, seq_length=T, batch=5))
    phase = phase_config("p1", {"s0": 1}, 2, replay={"share": 0.1, "from": {"q": 1}})
    with pytest.raises(ConfigError, match="replays 'q', which the model has not been through; it knows p0"):
        begin(lineage, phase, sources, seq_length=T, batch=5)


def test_the_same_data_under_two_names_is_refused() -> None:
    sources = {"a": counting_source(0, 100), "b": counting_source(0, 100)}
    with pytest.raises(ConfigError, match="same data twice, as 'a' and 'b'"):
        begin(Lineage(), phase_config("p0", {"a": 1, "b": 1}, 2), sources, seq_length=T, batch=5)


@pytest.mark.parametrize("replayed", ["a", "b"])
def test_data_that_is_both_mixed_and_replayed_by_name_is_refused_in_words_that_say_so(replayed: str) -> None:
    sources = {"a": counting_source(0, 100), "b": counting_source(0, 100)}
    phase = phase_config("p0", {"a": 1}, 2, replay={"share": 0.5, "from_sources": {replayed: 1}})
    with pytest.raises(ConfigError, match=f"replays source '{replayed}', and its mixture reads the same data as 'a'"):
        begin(Lineage(), phase, sources, seq_length=T, batch=5)


def test_history_whose_data_is_gone_is_named_with_its_fingerprint(tmp_path: Any) -> None:
    source = counting_source(0, 100)
    source.path = str(tmp_path / "gone")
    stream = begin(Lineage(), phase_config("p0", {"s0": 1}, 2), {"s0": source}, seq_length=T, batch=5)
    with pytest.raises(DataError, match="source 's0', fingerprint fingerprint-, which is gone"):
        open_recorded(stream.record.sources[0])


def test_a_windowed_source_goes_on_over_phases_and_is_replayed_in_its_own_order() -> None:
    sources = {"s0": counting_source(0, 400, shards=7, window=2), "s1": counting_source(1, 400)}
    lineage, rows = Lineage(), []
    for name in ("p0", "p1"):
        stream = begin(lineage, phase_config(name, {"s0": 1}, 10), sources, seq_length=T, batch=3)
        rows += rows_of(stream)
        lineage = finish(lineage, stream)
    starts = [row[0] for row in rows]
    assert len(set(starts)) == len(starts)
    stream = begin(lineage, phase_config("p2", {"s1": 1}, 20, replay={"share": 0.5}), sources, seq_length=T, batch=3)
    replayed = split(rows_of(stream), "1/2")[1]
    assert len(replayed) == 30
    for phase in (rows[:30], rows[30:]):  # each phase from its beginning, in the order in which it was first read
        again = [row for row in replayed if row in phase]
        assert again == phase[: len(again)]


def test_in_another_window_a_source_begins_an_order_of_its_own() -> None:
    def cursor(lineage: Lineage, window: int | None) -> tuple[Lineage, int, int]:
        sources = {"s0": counting_source(0, 400, shards=7, window=window)}
        name = f"p{len(lineage.phases)}"
        stream = begin(lineage, phase_config(name, {"s0": 1}, 5), sources, seq_length=T, batch=3)
        (record,) = stream.record.sources
        return finish(lineage, stream), record.first, record.tokens_before

    lineage, *first = cursor(Lineage(), None)
    lineage, *windowed = cursor(lineage, 2)
    lineage, *windowed_again = cursor(lineage, 2)
    lineage, *permuted_again = cursor(lineage, None)
    assert [first, windowed, windowed_again, permuted_again] == [[0, 0], [0, 60], [15, 120], [15, 180]]
