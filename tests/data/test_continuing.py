"""A phase that continues another one reads what that one would have read next, sample for sample."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import begin, counting_source, finish, phase_config

from megacl.data.stream import PhaseStream
from megacl.errors import ConfigError, DataError
from megacl.lineage import Lineage

LENGTH = 8
SOURCES = {f"s{number}": counting_source(number, 8 * 90 + 1) for number in range(3)}
WINDOWED = {**SOURCES, "s3": counting_source(3, 8 * 64 + 1, documents=4, shards=4, window=2)}


def first_phase(batch: int, sources: dict[str, Any] = SOURCES) -> Lineage:
    """The history that all these have: a phase to be replayed."""
    lineage = Lineage()
    return finish(lineage, begin(lineage, phase_config("first", {"s0": 1}, 9), sources, seq_length=LENGTH, batch=batch))


def both(
    lineage: Lineage, trunk: dict[str, Any], steps: int, taken: int, batch: int, sources: dict[str, Any] = SOURCES
) -> tuple[PhaseStream, PhaseStream, Lineage]:
    """A trunk's phase of `steps` steps; a phase that continues it after `taken` steps, up to the same end; its past."""
    whole = begin(lineage, phase_config("trunk", steps=steps, **trunk), sources, seq_length=LENGTH, batch=batch)
    past = finish(lineage, whole, samples=taken * batch)
    more = {key: trunk[key] for key in ("replay", "when_exhausted") if key in trunk}
    phase = phase_config("release", {}, whole.record.budget_steps - taken, continues=True, **more)
    return whole, begin(past, phase, sources, seq_length=LENGTH, batch=batch), past


def assert_alike(whole: PhaseStream, release: PhaseStream, taken: int) -> None:
    count = release.record.budget_samples
    assert whole.record.budget_samples == taken + count
    rest, own = np.arange(taken, taken + count), np.arange(count)
    assert np.array_equal(whole.read(rest), release.read(own))
    assert np.array_equal(whole.locate(rest).replayed, release.locate(own).replayed)
    whole_end = whole.seen(taken + count, 0.0)
    release_end = release.seen(count, 0.0)
    for there, here in zip(whole_end.sources_read, release_end.sources_read, strict=True):
        assert (there.name, there.first + there.samples) == (here.name, here.first + here.samples)
    if whole_end.replay and release_end.replay:
        for over, here in zip(whole_end.replay.from_, release_end.replay.from_, strict=True):
            assert (over.phase, over.first + over.samples) == (here.phase, here.first + here.samples)


@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.05, 0.3, 1 / 3, 0.77]),
    policy=st.sampled_from(["original", "uniform", "latest"]),
    batch=st.integers(1, 11),
    taken=st.integers(1, 20),
)
def test_the_samples_are_those_of_the_phase_that_it_continues(
    weights: list[int], share: float, policy: str, batch: int, taken: int
) -> None:
    mixture = {f"s{number}": weight for number, weight in enumerate(weights)}
    replay = {"share": round(share, 6), "policy": policy}
    trunk = {"mixture": mixture, **({"replay": replay} if share else {})}
    whole, release, _ = both(first_phase(batch), trunk, taken + 7, taken, batch)
    assert_alike(whole, release, taken * batch)


CHANGES = [
    {"at": "6 steps", "mixture": {"s1": 2, "s2": 3}, "how": "linear"},
    {"at": "11 steps", "mixture": {"s0": 1, "s2": 1}},
]


@pytest.mark.parametrize("taken", [1, 3, 6, 8, 11, 13])
@pytest.mark.parametrize(
    "more",
    [
        {"mixture_changes": CHANGES},
        {"mixture_changes": CHANGES, "replay": {"share": 0.3}, "when_exhausted": "stop"},
        {"when_exhausted": "renormalise", "replay": {"share": 0.15}},
        {"replay": {"share": 0.4, "from_sources": {"s2": 2, "s0": 3}}},
        {"replay": {"share": 0.25, "max_times": 1}},
    ],
    ids=["changes", "stop", "renormalise", "sources", "max_times"],
)
def test_changes_of_its_mixture_and_sources_that_run_out_come_as_they_would_have(
    more: dict[str, Any], taken: int
) -> None:
    mixture = {"s1": 1} if "from_sources" in more.get("replay", {}) else {"s0": 5, "s1": 1}
    lineage = first_phase(7)
    whole, release, _ = both(lineage, {"mixture": mixture, **more}, 15, taken, 7)
    assert_alike(whole, release, taken * 7)


def test_it_goes_on_beyond_the_end_that_the_phase_was_to_have() -> None:
    trunk = {"mixture": {"s0": 2, "s1": 1}, "replay": {"share": 0.3}}
    longer = begin(first_phase(7), phase_config("trunk", steps=20, **trunk), SOURCES, seq_length=LENGTH, batch=7)
    whole, _, _ = both(first_phase(7), trunk, 9, 8, 7)
    past = finish(first_phase(7), whole)
    phase = phase_config("release", {}, 11, continues=True, replay=trunk["replay"])
    release = begin(past, phase, SOURCES, seq_length=LENGTH, batch=7)
    assert np.array_equal(longer.read(np.arange(63, 140)), release.read(np.arange(77)))


@pytest.mark.parametrize("replay", [{}, {"replay": {"share": 0.3}}], ids=["new", "replay"])
@pytest.mark.parametrize("when", ["repeat", "stop", "renormalise"])
@pytest.mark.parametrize("how", ["linear", "step"])
@pytest.mark.parametrize("taken", [3, 9])
def test_beyond_a_change_at_the_phases_end_the_new_weights_hold(
    taken: int, how: str, when: str, replay: dict[str, Any]
) -> None:
    """Against a trunk of a longer budget, and where nothing is replayed against the sources counted out one by one."""
    batch, at, ends = 4, 9, (taken, taken + 2, 20)
    change = {"at": f"{at} steps", "mixture": {"s2": 1}, "how": how}
    trunk = {"mixture": {"s1": 1}, "mixture_changes": [change], "when_exhausted": when, **replay}
    past = first_phase(batch)
    longer = begin(past, phase_config("trunk", steps=20, **trunk), SOURCES, seq_length=LENGTH, batch=batch)
    whole = begin(past, phase_config("trunk", steps=at, **trunk), SOURCES, seq_length=LENGTH, batch=batch)
    past = finish(past, whole, samples=taken * batch)
    for name, begun, end in zip(("release", "second"), ends, ends[1:], strict=False):
        phase = phase_config(name, {}, end - begun, continues=True, when_exhausted=when, **replay)
        stream = begin(past, phase, SOURCES, seq_length=LENGTH, batch=batch)
        there, here = np.arange(begun * batch, end * batch), np.arange((end - begun) * batch)
        assert np.array_equal(stream.read(here), longer.read(there))
        past = finish(past, stream)
        assert min(source.samples for source in past.phases[-1].sources) >= 0
        if not replay:
            new = [min(m, at * batch) ** 2 // (2 * at * batch) if how == "linear" else 0 for m in range(20 * batch + 1)]
            is_new = [m >= at * batch or new[m + 1] > new[m] for m in there]
            assert [int(row[0]) // 100_000 for row in stream.read(here)] == [1 + now for now in is_new]


def test_a_windowed_source_goes_on_in_its_window() -> None:
    trunk = {"mixture": {"s0": 1, "s3": 2}}
    whole, release, _ = both(first_phase(5, WINDOWED), trunk, 14, 4, 5, WINDOWED)
    assert_alike(whole, release, 20)


def test_phases_continue_one_another_and_are_replayed_like_any_other() -> None:
    trunk = {"mixture": {"s0": 3, "s1": 1}, "replay": {"share": 0.3}}
    whole, second, past = both(first_phase(7), trunk, 12, 3, 7)
    past = finish(past, second, samples=4 * 7, passed_over=((7, 14),))
    phase = phase_config("third", {}, 5, continues=True, replay=trunk["replay"])
    third = begin(past, phase, SOURCES, seq_length=LENGTH, batch=7)
    assert np.array_equal(whole.read(np.arange(49, 84)), third.read(np.arange(35)))
    past = finish(past, third)
    replay = {"share": 0.5, "from": {"release": 1}}
    last = begin(past, phase_config("last", {"s2": 1}, 2, replay=replay), SOURCES, seq_length=LENGTH, batch=20)
    replayed = last.read(np.flatnonzero(last.locate(np.arange(40)).replayed))
    own = np.flatnonzero(~second.locate(np.arange(28)).replayed)
    learned = own[(own < 7) | (own >= 14)]
    again = np.resize(learned, 20)
    assert np.array_equal(replayed, second.read(again))


def test_the_steps_of_its_changes_are_counted_from_its_own_beginning() -> None:
    trunk = {"mixture": {"s0": 5, "s1": 1}, "mixture_changes": CHANGES, "replay": {"share": 0.3}}
    whole, release, _ = both(first_phase(7), trunk, 15, 4, 7)
    assert whole.record.steps_of_change == (1, 7, 12)
    assert release.record.steps_of_change == (1, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"replay": {"share": 0.2}},
            ConfigError,
            r"its replay differs from that phase's \(share 3/10, policy original",
        ),
        ({"replay": None}, ConfigError, "its replay differs"),
        ({"seq_length": 4}, ConfigError, "whose seq_length is 8, and its own is 4"),
        ({"seed": 1}, ConfigError, "whose seed is 0"),
        ({"sources": {"s1": SOURCES["s1"]}}, DataError, "reads source 's0'.*sources has none of that name"),
        (
            {"sources": {**SOURCES, "s0": counting_source(0, 999)}},
            DataError,
            "reads source 's0'.*fingerprint fingerprint-.*sources has fingerprint-",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused_in_one_line(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    trunk = {"mixture": {"s0": 5, "s1": 1}, "replay": {"share": 0.3}}
    whole, _, past = both(first_phase(7), trunk, 15, 4, 7)
    wanted = {"replay": trunk["replay"], "seq_length": LENGTH, "seed": 0, "sources": SOURCES, **change}
    phase = phase_config("release", {}, 5, continues=True, replay=wanted["replay"])
    with pytest.raises(error, match=message) as caught:
        begin(past, phase, wanted["sources"], seq_length=wanted["seq_length"], batch=7, seed=wanted["seed"])
    assert "\n" not in str(caught.value)
    assert replace(whole.record, samples=0) == whole.record
