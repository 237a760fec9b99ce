"""Replay policies against lists of what was seen, kept as a replay buffer would keep them."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import begin, counting_source, finish, phase_config

from megacl.data.mixture import Pattern, integer_weights
from megacl.data.order import permuted
from megacl.data.replay import replay_key, times_replayed
from megacl.data.stream import PhaseStream
from megacl.errors import ConfigError, DataError
from megacl.lineage import Lineage, Ranges, pass_over

POLICIES = ["original", "uniform", "power_law", "exponential", "latest"]


def rows_of(stream: PhaseStream) -> tuple[list[list[int]], list[list[int]]]:
    """(own samples, replayed samples) of a phase, as tokens."""
    samples = np.arange(stream.record.budget_samples)
    rows, replayed = stream.read(samples), stream.locate(samples).replayed
    return rows[~replayed].tolist(), rows[replayed].tolist()


def history(*steps: int, seq_length: int = 4, batch: int = 5) -> tuple[Lineage, dict[str, Any], dict[str, list[Any]]]:
    """(lineage, sources, own samples) of phases p0, p1, ... of so many steps, each on a source of its own."""
    sources = {f"s{i}": counting_source(i, 20_000) for i in range(len(steps) + 1)}
    lineage, own = Lineage(), {}
    for number, count in enumerate(steps):
        phase = phase_config(f"p{number}", {f"s{number}": 1}, count)
        stream = begin(lineage, phase, sources, seq_length=seq_length, batch=batch)
        own[f"p{number}"] = rows_of(stream)[0]
        lineage = finish(lineage, stream)
    return lineage, sources, own


def replays(history: Any, steps: int, *, batch: int = 20, seq_length: int = 4, **replay: Any) -> PhaseStream:
    """The stream of a phase that follows, of which half is replayed."""
    lineage, sources, _ = history
    name = f"p{len(lineage.phases)}"
    phase = phase_config(name, {list(sources)[-1]: 1}, steps, replay={"share": 0.5, **replay})
    return begin(lineage, phase, sources, seq_length=seq_length, batch=batch)


def counts_of(history: Any, **replay: Any) -> list[float]:
    """What part of 4,000 replayed samples each earlier phase gives."""
    stream = replays(history, 400, **replay)
    record = finish(history[0], stream).phases[-1]
    assert record.replay is not None
    by_name = {entry.phase: entry.samples / record.replay.samples for entry in record.replay.from_}
    return [by_name.get(phase.name, 0.0) for phase in history[0].phases]


# ---------------------------------------------------------------------------------------------- which phases


@pytest.mark.parametrize(
    ("replay", "ages_to_weights"),
    [
        ({"policy": "power_law"}, lambda age: (age + 1) ** -0.5),
        ({"policy": "power_law", "d": 2}, lambda age: (age + 1) ** -2.0),
        ({"policy": "exponential"}, lambda age: math.exp(-0.5 * age)),
        ({"policy": "exponential", "d": 1.5}, lambda age: math.exp(-1.5 * age)),
    ],
)
@pytest.mark.parametrize("in_tokens", [False, True])
def test_older_phases_fade_by_the_formula(replay: Any, ages_to_weights: Any, in_tokens: bool) -> None:
    past = history(10, 40, 20, 30)
    ages = [4, 3, 2, 1]
    if in_tokens:  # learned since the phase began, in units of the mean phase, which has 25 steps
        ages, replay = [100 / 25, 90 / 25, 50 / 25, 30 / 25], {**replay, "age": "tokens"}
    wanted = np.array([ages_to_weights(age) for age in ages])
    assert counts_of(past, **replay) == pytest.approx(wanted / wanted.sum(), abs=4e-4)


def test_phases_of_one_length_have_the_same_age_in_tokens_and_in_phases() -> None:
    past = history(15, 15, 15)
    assert counts_of(past, policy="power_law", age="tokens") == counts_of(past, policy="power_law", age="phases")


def test_uniform_goes_by_what_phases_saw_of_their_own_and_latest_by_the_newest_alone() -> None:
    past = history(10, 40, 30)
    assert counts_of(past, policy="uniform") == pytest.approx([1 / 8, 4 / 8, 3 / 8])
    assert counts_of(past, policy="latest") == [0, 0, 1]


def test_a_fading_so_strong_that_powers_vanish_leaves_older_phases_one_place() -> None:
    assert counts_of(history(2, 2, 2), policy="power_law", d=1e4) == pytest.approx([0, 0, 1], abs=1e-3)


def test_a_phase_so_old_that_its_weight_is_no_number_still_has_a_place() -> None:
    assert counts_of(history(2, 2, 2), policy="exponential", d=800)[2] > 0.999


def test_a_phase_too_short_for_one_sequence_is_passed_over_unless_it_is_named() -> None:
    past = history(1, 30, batch=1)
    record = finish(past[0], replays(past, 10, seq_length=8, policy="power_law")).phases[-1]
    assert record.replay is not None
    assert [entry.phase for entry in record.replay.from_] == ["p1"]
    with pytest.raises(DataError, match="'p0' saw too few tokens of its own to replay one sequence of 8; take it out"):
        replays(past, 10, seq_length=8, **{"from": {"p0": 1}})
    with pytest.raises(ConfigError, match="no phase with a sequence of its own"):
        replays(history(1, batch=1), 10, seq_length=8)


# ---------------------------------------------------------------------------------------------- which samples


@settings(max_examples=50)
@given(steps=st.tuples(st.integers(1, 12), st.integers(1, 12)), later=st.lists(st.integers(1, 6), max_size=4))
def test_uniform_replays_every_sample_once_before_any_twice(steps: tuple[int, int], later: list[int]) -> None:
    lineage, sources, own = history(*steps)
    replayed: dict[str, list[list[int]]] = {}
    for count in later:
        seen_by = {row[0]: name for name, rows in own.items() for row in rows}
        stream = replays((lineage, sources, own), count, batch=4, policy="uniform")
        new, old = rows_of(stream)
        lineage = finish(lineage, stream)
        for row in old:
            replayed.setdefault(seen_by[row[0]], []).append(row)  # only what a phase saw of its own is replayed
        own[lineage.phases[-1].name] = new
    for name, rows in replayed.items():
        for start in range(0, len(rows), len(own[name])):
            part = rows[start : start + len(own[name])]
            assert len({tuple(row) for row in part}) == len(part)


def test_uniform_is_not_the_original_order_and_differs_from_round_to_round() -> None:
    past = history(20)
    _, old = rows_of(replays(past, 20, policy="uniform"))
    first, second = old[:100], old[100:]
    assert sorted(first) == sorted(second) == sorted(past[2]["p0"])
    assert first != past[2]["p0"]
    assert first != second


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lengths", [(512, 2048, 512), (2048, 512, 2048), (512, 512, 512), (640, 512, 2048)])
def test_phases_of_other_lengths_and_batches_replay_what_was_seen(policy: str, lengths: tuple[int, ...]) -> None:
    sources = {f"s{i}": counting_source(i, 90_000) for i in range(3)}
    lineage, own = Lineage(), {}
    cursor: dict[str, tuple[int, int]] = {}  # of each phase: (rounds over, tokens or permuted draws of this one)
    for number, (length, batch) in enumerate(zip(lengths, (4, 3, 8), strict=True)):
        replay = {"replay": {"share": 0.5, "policy": policy}} if number else {}
        phase = phase_config(f"p{number}", {f"s{number}": 1}, 9, **replay)
        stream = begin(lineage, phase, sources, seq_length=length, batch=batch)
        new, old = rows_of(stream)
        lineage = finish(lineage, stream)
        if number:
            weights = integer_weights(fading(policy, {name: rows for name, (_, rows) in own.items()}))
            expected = []
            firsts = {}
            for name in weights:
                old_length, rows = own[name]
                a_round = len(rows) * old_length // length
                rounds, reached = cursor.get(name, (0, 0))
                if policy == "uniform":  # another cut begins a round of its own, the same one goes on
                    same = number < 2 or lengths[1] == length
                    firsts[name] = rounds * a_round + reached if same else (rounds + (reached > 0)) * a_round
                else:
                    firsts[name] = rounds * a_round + min(-(-reached // length), a_round)
            pattern = Pattern(tuple(weights.values()))
            source, draws = pattern.locate(np.arange(len(old)))
            for index, draw in zip(source.tolist(), draws.tolist(), strict=True):
                name = list(weights)[index]
                old_length, rows = own[name]
                a_round = len(rows) * old_length // length
                record = next(phase for phase in lineage.phases if phase.name == name)
                piece = (firsts[name] + draw) % a_round
                if policy == "uniform":
                    at = np.array([firsts[name] + draw])
                    piece = int(permuted(at, a_round, replay_key(record, length))[0])
                expected.append(cut(rows, old_length, length, piece))
            assert old == expected
            for index, name in enumerate(weights):
                old_length, rows = own[name]
                a_round = len(rows) * old_length // length
                rounds, draws_of_round = divmod(firsts[name] + int((source == index).sum()), a_round)
                cursor[name] = rounds, draws_of_round * (1 if policy == "uniform" else length)
        own[f"p{number}"] = length, new


def fading(policy: str, own: dict[str, list[Any]]) -> dict[str, float | Fraction]:
    """The policy's weights, written down once more."""
    ages = {name: len(own) - index for index, name in enumerate(own)}
    if policy == "power_law":
        return {name: (age + 1) ** -0.5 for name, age in ages.items()}
    if policy == "exponential":
        return {name: math.exp(-0.5 * (age - 1)) for name, age in ages.items()}
    if policy == "latest":
        return {list(own)[-1]: 1.0}
    return {name: Fraction(len(rows) * (len(rows[0]) - 1)) for name, rows in own.items()}


def cut(rows: list[list[int]], old_length: int, length: int, piece: int) -> list[int]:
    """Piece `piece` of rows laid end to end, and the token that followed it."""
    tokens = [token for row in rows for token in row[:-1]]
    end = (piece + 1) * length
    label = rows[end // old_length - 1][-1] if end % old_length == 0 else tokens[end]
    return [*tokens[end - length : end], label]


# ---------------------------------------------------------------------------------------------- what was passed over


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_what_a_phase_passed_over_is_counted_nowhere_and_never_replayed(data: Any, seed: int) -> None:
    """Two phases on mixed sources, the second replays the first, the third both; each against lists of its samples."""
    batch = data.draw(st.integers(2, 6))
    sources = {f"s{i}": counting_source(i, 3_000) for i in range(4)}
    lineage = Lineage()
    kept: dict[str, list[list[int]]] = {}  # of each phase: the own samples that the model has learned from
    for number, policy in enumerate((None, *data.draw(st.tuples(*[st.sampled_from(POLICIES)] * 2)))):
        share = data.draw(st.sampled_from(["0.25", "0.5", "0.6"])) if policy else 0
        replay = {"replay": {"share": float(share), "policy": policy}} if policy else {}
        phase = phase_config(f"p{number}", {f"s{number}": 2, f"s{number + 1}": 1}, 8, **replay)
        stream = begin(lineage, phase, sources, seq_length=4, batch=batch, seed=seed)
        lost = data.draw(st.sets(st.integers(0, 7), max_size=6))
        passed_over: Ranges = ()
        for step in lost:
            passed_over = pass_over(passed_over, step * batch, (step + 1) * batch)
        samples = np.arange(8 * batch)
        rows, replayed = stream.read(samples).tolist(), stream.locate(samples).replayed.tolist()
        learned = [sample for sample in samples.tolist() if sample // batch not in lost]
        before = {name: {tuple(row) for row in own} for name, own in kept.items()}
        assert all(
            any(tuple(row) in own for own in before.values())
            for row, again in zip(rows, replayed, strict=True)
            if again
        ), "what is replayed was learned from before"
        if policy == "latest":
            own = kept[f"p{number - 1}"]
            old = [row for row, again in zip(rows, replayed, strict=True) if again]
            first = 0 if number == 1 else stream.record.replay.from_[0].first  # type: ignore[union-attr]
            assert old == [own[(first + draw) % len(own)] for draw in range(len(old))], "in order, round after round"
        kept[f"p{number}"] = [rows[sample] for sample in learned if not replayed[sample]]

        lineage = finish(lineage, stream, passed_over=passed_over)
        record = lineage.phases[-1]
        assert (record.learned_samples, record.updates) == (len(learned), 8 - len(lost))
        assert record.tokens == 4 * len(learned)
        assert record.own_samples == len(kept[f"p{number}"])
        for index, source in enumerate(record.sources):
            place = int(source.name[1:])
            mine = [s for s in samples.tolist() if not replayed[s] and rows[s][0] // 100_000 == place]
            assert source.samples == len(mine), "a draw that was passed over is taken all the same"
            assert source.tokens == 4 * len({*mine} & {*learned})
            assert record.sources[index].epochs == (source.tokens_before + source.tokens) / (2_999 // 4 * 4)
        for entry in record.replay.from_ if record.replay else ():
            mine = [s for s in samples.tolist() if replayed[s] and tuple(rows[s]) in before[entry.phase]]
            assert (entry.samples, entry.tokens) == (len(mine), 4 * len({*mine} & {*learned}))
        if not any(kept.values()):
            return  # nothing is left to replay, which the next phase would say


def test_a_phase_that_passed_over_a_part_is_cut_anew_from_what_is_left() -> None:
    sources = {f"s{i}": counting_source(i, 9_000) for i in range(2)}
    stream = begin(Lineage(), phase_config("p0", {"s0": 1}, 6), sources, seq_length=6, batch=4)
    rows = stream.read(np.arange(24)).tolist()
    lineage = finish(Lineage(), stream, passed_over=((0, 4), (12, 16)))
    left = rows[4:12] + rows[16:]
    later = phase_config("p1", {"s1": 1}, 6, replay={"share": 0.5})
    again = begin(lineage, later, sources, seq_length=10, batch=4)
    _, old = rows_of(again)
    assert old == [cut(left, 6, 10, draw % 9) for draw in range(12)]


# ---------------------------------------------------------------------------------------------- how often


@settings(max_examples=60)
@given(data=st.data(), max_times=st.integers(1, 3), first=st.integers(2, 12))
def test_no_token_is_replayed_more_often_than_the_cap_through_all_policies_and_lengths(
    data: Any, max_times: int, first: int
) -> None:
    lineage, sources, _ = history(first, 3)
    times: dict[int, int] = {}
    for number in range(data.draw(st.integers(1, 5))):
        phase = phase_config(
            f"q{number}",
            {"s2": 1},
            data.draw(st.integers(1, 6)),
            replay={"share": 0.5, "max_times": max_times, "policy": data.draw(st.sampled_from(POLICIES))},
        )
        length = data.draw(st.sampled_from([3, 4, 7]))
        try:
            stream = begin(lineage, phase, sources, seq_length=length, batch=4)
        except ConfigError:  # what is left to replay is too little; the next one may ask for less, or have more
            continue
        _, old = rows_of(stream)
        assert len(old) == stream.record.budget_samples // 2
        for row in old:
            for token in row[:-1]:
                times[token] = times.get(token, 0) + 1
        lineage = finish(lineage, stream)
    assert max(times.values(), default=0) <= max_times


def test_how_often_a_phase_was_replayed_is_counted_through_changes_of_policy() -> None:
    lineage, sources, own = history(8)
    replayed = 0
    for batch, policy in ((80, "original"), (2, "uniform"), (20, "original")):
        stream = replays((lineage, sources, own), 1, batch=batch, policy=policy)
        replayed += sum(row in own["p0"] for row in rows_of(stream)[1])
        lineage = finish(lineage, stream)
        assert times_replayed(lineage, "p0") == replayed / 40
        line = f"phase {stream.record.name!r}: by its end phase 'p0' is replayed {replayed / 40:.2f} times over"
        assert stream.repeats() == ([line] if replayed > 40 else [])
    assert 40 < replayed < 51


def test_a_phase_that_is_not_replayed_here_is_not_said_to_be() -> None:
    past = history(2, 30)
    worn_out = replays(past, 8, policy="power_law")
    assert "phase 'p2': by its end phase 'p0' is replayed 3.60 times over" in worn_out.repeats()
    stream = replays((finish(past[0], worn_out), *past[1:]), 1, batch=2, policy="power_law")
    assert not any(row in past[2]["p0"] for row in rows_of(stream)[1])
    assert stream.repeats() == []


def test_where_one_phase_has_reached_the_cap_the_others_take_its_places() -> None:
    past = history(2, 30)
    stream = replays(past, 4, policy="power_law", max_times=1)
    _, old = rows_of(stream)
    assert sum(row in past[2]["p0"] for row in old) == 10, "all of p0, once"
    assert old[-1] in past[2]["p1"]
    assert len(old) == 40
    short, long = stream.record.replay.from_  # type: ignore[union-attr]
    samples = np.arange(stream.record.budget_samples)
    located = stream.locate(samples)
    assert np.flatnonzero(located.replayed & (located.phase == 0)).size == 10
    beyond = short.runs_out
    assert beyond is not None
    assert located.replayed[beyond]
    assert not np.any(located.phase[beyond:] == 0), "and this is where the eleventh would have stood"
    assert long.runs_out is None


def test_what_cannot_be_replayed_often_enough_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        replays(history(2, 3), 4, max_times=1)
    assert str(caught.value) == (
        "phase 'p2' replays 40 samples, and with replay.max_times 1 there are 25 left to replay; "
        "lower replay.share, or raise max_times."
    )
