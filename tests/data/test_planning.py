"""What a phase reads of its sources, against its rules applied one sample at a time."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import STRIDE, begin, counting_source, finish, phase_config

from megacl.data.mixture import Pattern
from megacl.data.stream import PhaseStream
from megacl.errors import ConfigError, DataError
from megacl.lineage import Lineage

T = 4

NAMES = ("a", "b", "c")


def sources_of(sizes: Any) -> dict[str, Any]:
    """Sources of so many sequences."""
    return {name: counting_source(i, size * T + 1) for i, (name, size) in enumerate(zip(NAMES, sizes, strict=True))}


def own_sources(stream: PhaseStream) -> list[str]:
    """The source of each of a phase's own samples, in order."""
    located = stream.locate(np.arange(stream.record.budget_samples))
    own = located.source[~located.replayed].tolist()
    return [NAMES[stream.sources[number].train.number] for number in own]


def simulated(phase: Any, left: dict[str, int], batch: int, share: Fraction) -> tuple[list[str], int]:
    """(source of each own sample, steps) of a phase, one sample after another, by the rules of docs/mixtures.md."""

    def own_before(samples: int) -> int:
        return samples - (samples * share).__floor__()

    def pattern(weights: dict[str, float], place: int) -> str:
        names = [name for name in phase.source_names if weights.get(name)]
        whole = tuple(int(weights[name]) for name in names)
        return names[int(Pattern(whole).locate(np.array([place]))[0][0])]

    def minus(weights: dict[str, float]) -> dict[str, float]:
        return {name: weight for name, weight in weights.items() if name not in out}

    def knot(percent: str) -> int:
        return own_before(-(-int(percent.removesuffix("%")) * phase.steps // 100) * batch)

    total = own_before(phase.steps * batch)
    changes = [(knot(change.at), change) for change in phase.mixture_changes]
    out: set[str] = set()
    taken = dict.fromkeys(NAMES, 0)
    dealt: list[str] = []
    begin, mixture, places, ended = 0, phase.mixture, [0, 0], False
    while len(dealt) < total and not ended:
        m = len(dealt)
        while changes and changes[0][0] <= m:
            begin, mixture, places = changes[0][0], changes[0][1].mixture, [0, 0]
            changes.pop(0)
        sides, new = [minus(mixture), minus(mixture)], 0
        if changes and changes[0][1].how == "linear":
            length, r = changes[0][0] - begin, m - begin
            sides[1] = minus(changes[0][1].mixture)
            new = (r + 1) ** 2 // (2 * length) - r**2 // (2 * length)
        if not sides[0] and not sides[1]:
            break
        if not sides[new]:  # the other side is all there is from here on
            sides, new = [sides[1 - new]] * 2, 0
        elif not sides[1 - new]:
            sides, new = [sides[new]] * 2, 0
        source = pattern(sides[new], places[new])
        if phase.when_exhausted != "repeat" and taken[source] == left[source]:
            out.add(source)
            places = [0, 0]
            ended = phase.when_exhausted == "stop"
            continue
        places[new] += 1
        taken[source] += 1
        dealt.append(source)
    steps = max(k for k in range(phase.steps + 1) if own_before(k * batch) <= len(dealt))
    return dealt[: own_before(steps * batch)], steps


weights = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 5).map(float), min_size=1)


@st.composite
def phases(draw: Any) -> Any:
    ats = sorted(draw(st.sets(st.integers(10, 90), max_size=3)))
    hows = [draw(st.sampled_from(["step", "linear"])) for _ in ats]
    steps = draw(st.integers(20, 30))
    percents = [at for i, at in enumerate(ats) if i == 0 or -(-at * steps // 100) > -(-ats[i - 1] * steps // 100)]
    return phase_config(
        "p1",
        draw(weights),
        steps,
        mixture_changes=[
            {"at": f"{at}%", "mixture": draw(weights), "how": how} for at, how in zip(percents, hows, strict=False)
        ],
        when_exhausted=draw(st.sampled_from(["repeat", "stop", "renormalise"])),
        replay=draw(st.sampled_from([None, {"share": 0.25}, {"share": 0.9}])),
    )


@given(
    phase=phases(),
    sizes=st.tuples(*[st.integers(1, 60)] * 3),
    batch=st.integers(1, 4),
    before=st.integers(1, 9),
)
def test_a_phase_reads_what_its_rules_give_one_sample_after_another(
    phase: Any, sizes: tuple[int, ...], batch: int, before: int
) -> None:
    sources = sources_of(sizes)
    lineage = finish(Lineage(), begin(Lineage(), phase_config("p0", {"a": 1}, before), sources, seq_length=T, batch=3))
    left = {**dict(zip(NAMES, sizes, strict=True)), "a": max(0, sizes[0] - 3 * before)}
    share = Fraction(str(phase.replay.share)) if phase.replay else Fraction(0)
    expected, steps = simulated(phase, left, batch, share)
    if not steps:
        with pytest.raises(ConfigError, match="'p1' ends before its first batch is full: the model has yet to read"):
            begin(lineage, phase, sources, seq_length=T, batch=batch)
        return
    stream = begin(lineage, phase, sources, seq_length=T, batch=batch)
    assert stream.record.budget_steps == steps
    assert own_sources(stream) == expected
    samples = np.arange(stream.record.budget_samples)
    rows, located = stream.read(samples), stream.locate(samples)
    own = rows[~located.replayed, 0].tolist()
    if phase.when_exhausted != "repeat":
        assert len(set(own)) == len(own), "nothing comes twice"
    after = finish(lineage, stream).phases[-1]
    for source in after.sources:
        assert source.samples == expected.count(source.name)
        assert source.share == source.samples / len(expected)
        if source.runs_out is not None and source.runs_out < after.budget_samples:
            assert source.samples == left[source.name]
            assert not any(begun == source.name for begun in expected[own_before(source.runs_out, share) :])


def own_before(samples: int, share: Fraction) -> int:
    return samples - (samples * share).__floor__()


@given(phase=phases(), sizes=st.tuples(*[st.integers(30, 60)] * 3), data=st.data())
def test_a_phase_that_was_left_anywhere_goes_on_as_it_would_have(phase: Any, sizes: tuple[int, ...], data: Any) -> None:
    sources = sources_of(sizes)
    lineage = finish(Lineage(), begin(Lineage(), phase_config("p0", {"a": 1}, 2), sources, seq_length=T, batch=3))
    stream = begin(lineage, phase, sources, seq_length=T, batch=2)
    samples = np.arange(stream.record.budget_samples)
    seen = data.draw(st.integers(0, samples.size))
    left_early = finish(lineage, stream, samples=seen)
    by_fingerprint = {source.fingerprint: source for source in sources.values()}
    again = PhaseStream(left_early, lambda record: by_fingerprint[record.fingerprint])
    assert np.array_equal(again.read(samples), stream.read(samples))
    some = np.array(data.draw(st.lists(st.integers(0, samples.size - 1), min_size=1, max_size=5)), dtype=np.int64)
    assert np.array_equal(again.read(some), stream.read(samples)[some])


def test_a_source_goes_on_after_a_phase_that_read_it_to_its_end() -> None:
    sources = sources_of((20, 50, 50))
    phase = phase_config("p0", {"a": 1, "b": 1}, 30, when_exhausted="renormalise")
    stream = begin(Lineage(), phase, sources, seq_length=T, batch=2)
    lineage = finish(Lineage(), stream)
    counted = {source.name: (source.samples, source.runs_out) for source in lineage.phases[0].sources}
    assert counted == {"a": (20, 40), "b": (40, None)}
    left = begin(lineage, phase_config("p1", {"a": 1, "b": 1}, 5, when_exhausted="renormalise"), sources,
                 seq_length=T, batch=2)  # fmt: skip
    assert own_sources(left) == ["b"] * 10
    again = begin(lineage, phase_config("p1", {"a": 1}, 10), sources, seq_length=T, batch=2)
    assert len({row[0] for row in again.read(np.arange(20)).tolist()}) == 20, "and again from its beginning"


# ---------------------------------------------------------------------------------------------- weights


def mixed(**settings: Any) -> dict[str, int]:
    """The integer weights of a phase over a: 1000 tokens in 10 documents, and b: 3000 in 90."""
    sources = {"a": counting_source(0, 1000, documents=10), "b": counting_source(1, 3000, documents=90)}
    phase = phase_config("p0", settings.pop("mixture", {"a": 1, "b": 1}), 5, **settings)
    record = begin(Lineage(), phase, sources, seq_length=T, batch=2).record
    return dict(zip(("a", "b"), record.mixture[0].weights, strict=True))


def test_weights_multiply_tokens_or_documents() -> None:
    assert mixed() == {"a": 1, "b": 1}
    assert mixed(weights_by="tokens") == {"a": 1, "b": 3}
    assert mixed(weights_by="documents") == {"a": 1, "b": 9}
    assert mixed(weights_by="tokens", mixture={"a": 3, "b": 0.5}) == {"a": 2, "b": 1}


def test_a_temperature_evens_the_shares_out_by_its_root() -> None:
    assert mixed(weights_by="documents", temperature=2) == {"a": 1, "b": 3}
    hot = mixed(weights_by="documents", temperature=1e6)
    assert abs(hot["a"] / sum(hot.values()) - 0.5) < 1e-4
    cold = mixed(weights_by="tokens", temperature=0.001)
    assert cold == {"a": 1, "b": 65535}, "and where it leaves nothing, one place in 65,536"


def test_weights_by_documents_of_a_source_without_any_are_refused() -> None:
    sources = {"a": counting_source(0, 1000, documents=0)}
    with pytest.raises(DataError, match="source 'a' \\(/data/s0\\) has no training documents"):
        begin(Lineage(), phase_config("p", {"a": 1}, 5, weights_by="documents"), sources, seq_length=T, batch=2)


def test_a_line_that_is_too_long_to_be_exact_is_refused() -> None:
    change = {"at": "100%", "mixture": {"b": 1}, "how": "linear"}
    phase = phase_config("p", {"a": 1}, 2**32, mixture_changes=[change])
    with pytest.raises(ConfigError, match="changes its mixture over 4,294,967,296 samples; a straight line may have"):
        begin(Lineage(), phase, sources_of((5, 5, 5)), seq_length=T, batch=1)
    phase = phase_config("p", {"a": 1}, 2**32 - 1, mixture_changes=[change])
    record = begin(Lineage(), phase, sources_of((5, 5, 5)), seq_length=T, batch=1).record
    assert [source.share for source in record.sources] == pytest.approx([0.5, 0.5])


def test_tokens_say_where_they_lie() -> None:
    assert counting_source(2, 100).train.gather(np.array([7]), 3).tolist() == [[2 * STRIDE + 7 + i for i in range(3)]]
