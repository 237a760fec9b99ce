"""The two orders of a source's sequences: each once an epoch; windows keep to their shards."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacl.data.sequences import Sequences, WindowedSequences, build_sequences
from megacl.errors import DataError

T = 4
GOLDEN = [63, 67, 21, 13, 17, 9, 42, 4, 46, 58, 54, 0, 50, 33, 37, 29]
GOLDEN_NEXT = [63, 4, 0, 67, 21, 17, 58, 9]


def source_of(lengths: list[int], fingerprint: str = "f") -> Any:
    ends = np.cumsum(lengths)
    train = SimpleNamespace(tokens=int(ends[-1]), ends=ends, begins=ends - np.array(lengths))
    return SimpleNamespace(name="s", path="/data/s", fingerprint=fingerprint, train=train)


def all_starts(lengths: list[int]) -> set[int]:
    """Where sequences begin if each shard is cut by itself."""
    begins = np.cumsum([0, *lengths])
    return {
        int(begin) + T * index
        for begin, tokens in zip(begins, lengths, strict=False)
        for index in range((tokens - 1) // T if tokens else 0)
    }


lengths_of_shards = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > T)


@given(lengths=lengths_of_shards, window=st.integers(1, 14), seed=st.integers(0, 5), epoch=st.integers(0, 1000))
def test_a_windowed_epoch_holds_every_sequence_of_every_shard_once(
    lengths: list[int], window: int, seed: int, epoch: int
) -> None:
    sequences = WindowedSequences(source_of(lengths), T, seed, window)
    starts = sequences.starts(np.arange(sequences.n) + epoch * sequences.n)
    assert sorted(starts.tolist()) == sorted(all_starts(lengths))


@given(lengths=lengths_of_shards, window=st.integers(1, 14), epoch=st.integers(0, 1000))
def test_a_shard_is_read_in_one_window_of_an_epoch(lengths: list[int], window: int, epoch: int) -> None:
    source = source_of(lengths)
    sequences = WindowedSequences(source, T, 0, window)
    starts = sequences.starts(np.arange(sequences.n) + epoch * sequences.n)
    shards = np.searchsorted(source.train.ends, starts, side="right")
    left = {shard: (tokens - 1) // T for shard, tokens in enumerate(lengths) if tokens > T}
    while len(shards):
        some: list[int] = []  # the shards of this window: the first ones that come, and as many draws as they hold
        count = 0
        while len(some) < min(window, len(left)) or count < sum(left[shard] for shard in some):
            count += 1
            some = sorted(set(shards[:count].tolist()))
        assert len(some) == min(window, len(left))
        assert [int((shards[:count] == shard).sum()) for shard in some] == [left.pop(shard) for shard in some]
        shards = shards[count:]


@given(
    lengths=lengths_of_shards,
    window=st.integers(1, 14),
    draws=st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
)
def test_a_draw_does_not_depend_on_what_is_asked_beside_it(lengths: list[int], window: int, draws: list[int]) -> None:
    sequences = WindowedSequences(source_of(lengths), T, 0, window)
    alone = [int(WindowedSequences(source_of(lengths), T, 0, window).starts(np.array([draw]))[0]) for draw in draws]
    assert sequences.starts(np.array(draws)).tolist() == alone


def test_epochs_seeds_windows_and_data_each_give_another_order() -> None:
    lengths = [T * 10 + 1] * 50

    def order(*, seed: int = 0, window: int = 5, fingerprint: str = "f", epoch: int = 0) -> np.ndarray:
        return WindowedSequences(source_of(lengths, fingerprint), T, seed, window).starts(np.arange(500) + 500 * epoch)

    first = order()
    for other in (order(epoch=1), order(seed=1), order(window=6), order(fingerprint="g")):
        assert int((first == other).sum()) < 10
    shards = first // (T * 10 + 1)
    assert len({tuple(sorted(set(shards[k : k + 50].tolist()))) for k in range(0, 500, 50)}) == 10
    assert shards[:50].tolist() != sorted(shards[:50].tolist())


def test_windowed_order_v1_is_the_same_for_ever() -> None:
    """These numbers are v1, like those of tests/data/test_order.py."""
    sequences = WindowedSequences(source_of([9, 17, 3, 13, 21, 9], "f" * 64), T, 42, 2)
    assert sequences.n == 16
    assert sequences.starts(np.arange(16)).tolist() == GOLDEN
    assert sequences.starts(np.arange(16, 24)).tolist() == GOLDEN_NEXT


def test_without_a_window_all_sequences_of_the_stream_are_permuted() -> None:
    source = source_of([9, 17, 3])
    sequences = build_sequences(source, T, 0, None)
    assert isinstance(sequences, Sequences)
    assert sorted(sequences.starts(np.arange(sequences.n)).tolist()) == [0, 4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("window", [None, 2])
def test_a_source_without_a_whole_sequence_is_refused(window: int | None) -> None:
    with pytest.raises(DataError, match=r"source 's' \(/data/s\) has 4 training tokens, too few for one sequence of 4"):
        build_sequences(source_of([3, 1]), T, 0, window)
