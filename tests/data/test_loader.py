"""The loader hands every rank its slice, the same whatever the number of ranks and wherever it resumes."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import begin, counting_source, finish, phase_config

from megacl.data.loader import Loader
from megacl.data.stream import PhaseStream
from megacl.errors import ConfigError, DataError
from megacl.lineage import Lineage

BATCH = 12


def make_stream() -> PhaseStream:
    sources = {"s0": counting_source(0, 800), "s1": counting_source(1, 900)}
    lineage = finish(Lineage(), begin(Lineage(), phase_config("p0", {"s0": 1}, 6), sources, seq_length=5, batch=BATCH))
    phase = phase_config("p1", {"s1": 1}, 7, replay={"share": 0.25})
    return begin(lineage, phase, sources, seq_length=5, batch=BATCH)


def batches(world_size: int, start: int = 0) -> list[Any]:
    """Global batches, put together from what each rank is handed."""
    loaders = []
    for rank in range(world_size):
        loader = Loader(make_stream(), batch_size=BATCH, rank=rank, world_size=world_size, vocab_size=10**6)
        loader.load_state_dict({"samples": start})
        loaders.append(loader)
    parts = zip(*loaders, strict=True)
    return [
        (
            np.concatenate([batch.samples for batch in ranks]).tolist(),
            np.concatenate([batch.tokens for batch in ranks]).tolist(),
        )
        for ranks in parts
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ids_and_tokens_of_each_batch_are_the_same_on_any_number_of_ranks(world_size: int) -> None:
    assert batches(world_size) == batches(1)


@settings(deadline=None, max_examples=15)
@given(done=st.integers(0, 7), before=st.sampled_from([1, 2, 3, 4, 6]), after=st.sampled_from([1, 2, 3, 4, 6]))
def test_after_a_resume_on_other_ranks_the_rest_is_what_it_would_have_been(done: int, before: int, after: int) -> None:
    assert batches(before)[:done] + batches(after, start=done * BATCH) == batches(1)


def test_a_phase_ends_with_its_budget() -> None:
    assert [ids[0] for ids, _ in batches(1)] == [BATCH * k for k in range(7)]
    assert batches(1, start=7 * BATCH) == []


def test_the_state_counts_what_was_handed_out_and_not_what_was_read_ahead() -> None:
    loader = Loader(make_stream(), batch_size=BATCH, rank=0, world_size=1, vocab_size=10**6)
    assert loader.state_dict() == {"samples": 0}
    first = next(iter(loader))
    assert loader.state_dict() == {"samples": BATCH}
    second = next(iter(loader))
    assert second.first_sample == first.first_sample + BATCH


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="global_batch_size is 12; it must be a multiple of the data-parallel size, 5"
    ):
        Loader(make_stream(), batch_size=BATCH, rank=0, world_size=5, vocab_size=10**6)


def test_a_token_beyond_the_vocabulary_names_its_source() -> None:
    loader = Loader(make_stream(), batch_size=BATCH, rank=0, world_size=1, vocab_size=100_005)
    with pytest.raises(DataError, match=r"source 's1' .* holds token id 100\d+, but the model's vocab_size is 100005"):
        list(loader)


@pytest.mark.parametrize("batch", [1, 12, 300])
def test_small_batches_that_are_read_together_are_those_that_are_read_alone(batch: int) -> None:
    sources = {"s0": counting_source(0, 5000)}
    stream = begin(Lineage(), phase_config("p", {"s0": 1}, 700 // batch), sources, seq_length=5, batch=batch)
    found = list(Loader(stream, batch_size=batch, rank=0, world_size=1, vocab_size=10**6))
    assert [each.first_sample for each in found] == [batch * k for k in range(700 // batch)]
    for each in found:
        samples = np.arange(each.first_sample, each.first_sample + batch)
        assert each.samples.tolist() == samples.tolist()
        np.testing.assert_array_equal(each.tokens, stream.read(samples))


def test_what_stages_a_batch_is_called_in_the_background_for_each_one() -> None:
    threads = set()

    def stage(tokens: Any) -> Any:
        threads.add(threading.current_thread().name)
        return tokens + 1

    plain = Loader(make_stream(), batch_size=BATCH, rank=0, world_size=1, vocab_size=10**6)
    staged = Loader(make_stream(), batch_size=BATCH, rank=0, world_size=1, vocab_size=10**6, stage=stage)
    for one, other in zip(plain, staged, strict=True):
        np.testing.assert_array_equal(one.tokens + 1, other.tokens)
    assert threads == {"megacl-loader"}


def test_the_time_waited_for_a_batch_is_counted() -> None:
    stream = make_stream()
    read = stream.read
    stream.read = lambda samples: (time.sleep(0.2), read(samples))[1]  # type: ignore[method-assign]
    loader = Loader(stream, batch_size=BATCH, rank=0, world_size=1, vocab_size=10**6)
    assert loader.waited == 0
    next(iter(loader))
    assert loader.waited > 0  # how much is a matter of the machine: reading begins before the wait
