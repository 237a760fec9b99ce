"""The metrics of continual learning: by hand, against per-token losses of real runs, and as properties."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Prepared
from hypothesis import given
from hypothesis import strategies as st
from recorded_runs import TOKENS_PER_STEP, branch_off, evaluation, merge_of, phase, write_run, write_two_phases

from megacl.checkpoint import find_checkpoint, open_checkpoint
from megacl.configfile import from_tree
from megacl.data.source import open_source
from megacl.heldout import UNITS
from megacl.model.gpt import build_model
from megacl.trainer import train
from megacl.transfer import UNTRAINED, Matrix, Row, read_matrix

# ---------------------------------------------------------------------------------------------- against real runs

SEQUENCES, T = 8, 32


@pytest.fixture(scope="module")
def months(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phases: English, German without replay, and German again in a run of its own, with English replayed."""
    folder = tmp_path_factory.mktemp("runs")
    tree = prepared.tree(folder / "first", evaluation={"sequences": SEQUENCES})
    english, german = tree["phases"]
    fast = {"kind": "cosine", "max_lr": 2e-2, "warmup": "2 steps"}
    plain = {**german, "replay": None, "schedule": fast}
    train(from_tree({**tree, "phases": [{**english, "steps": 40, "schedule": fast}, plain]}))
    again = {**german, "name": "again", "replay": {"share": 0.5, "from": {"english": 1}}}
    train(from_tree({**tree, "run_dir": str(folder / "again"), "start_from": str(folder / "first"), "phases": [again]}))
    return folder


def loss_by_hand(model: Any, source: Any) -> float:
    """The mean over the first tokens of the held-out documents of -log p, each by itself, in float64."""
    stream = [source.eos_id, *source.validation.read(0, SEQUENCES * T).tolist()]
    nats = []
    with torch.no_grad():
        for begin in range(0, SEQUENCES * T, T):
            logits = model.double()(torch.tensor([stream[begin : begin + T]]))[0]
            for place in range(T):
                nats.append(-torch.log_softmax(logits[place], -1)[stream[begin + place + 1]].item())
    return math.fsum(nats) / len(nats)


def test_the_matrix_and_its_quantities_are_those_of_per_token_losses(months: Path, prepared: Prepared) -> None:
    tree = prepared.tree(months / "first")
    sources = {name: open_source(path) for name, path in prepared.sources.items()}
    untrained = build_model(from_tree(tree).model, seed=0)
    hand = [{name: loss_by_hand(untrained, source) for name, source in sources.items()}]
    for reference in (f"{months}/first@english", f"{months}/first@german", f"{months}/again"):
        checkpoint = open_checkpoint(find_checkpoint(reference, pytest.fail))
        model = build_model(checkpoint.config.model, seed=1)
        load = checkpoint.load_weights()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(load(name))
        hand.append({name: loss_by_hand(model, source) for name, source in sources.items()})

    matrix = read_matrix(months / "again", warn=pytest.fail)
    assert [row.label for row in matrix.rows] == [UNTRAINED, "english", "german", "again"]
    assert [sorted(row.own) for row in matrix.rows] == [[], ["english"], ["german"], ["german"]]
    assert [row.tokens for row in matrix.rows] == [12 * T * k for k in (0, 40, 48, 56)]
    for row, expected in zip(matrix.rows, hand, strict=True):
        assert row.values == pytest.approx(expected, rel=1e-5)
    e, g = ([row[name] for row in hand] for name in ("english", "german"))
    assert e[1] < min(e[0], e[3] - 0.05), "English was learned, and then forgotten"
    assert matrix.forgetting("english") == pytest.approx(e[3] - e[1], abs=1e-4)
    assert matrix.learned("english") == pytest.approx(e[1], rel=1e-5)
    assert matrix.retained("english") == pytest.approx(e[3], rel=1e-5)
    assert matrix.backward_transfer("english") == pytest.approx(e[1] - e[3], abs=1e-4)
    assert matrix.forward_transfer("german") == pytest.approx(g[0] - g[1], abs=1e-4)
    assert matrix.learned("german") == pytest.approx(g[3], rel=1e-5)
    assert matrix.retained("german") is None
    assert matrix.learned("german", 2) == pytest.approx(g[2], rel=1e-5)

    # Bits per byte: nats over ln 2 and over the bytes of that part of the text, which is in proportion to its tokens.
    in_bits = read_matrix(months / "again", unit="bits_per_byte")
    for row, expected in zip(in_bits.rows, hand, strict=True):
        for name, source in sources.items():
            per_token = source.validation.text_bytes / source.validation.tokens
            assert row.values[name] == pytest.approx(expected[name] / math.log(2) / per_token, rel=1e-5)


def test_at_an_earlier_checkpoint_the_matrix_is_what_it_was(months: Path) -> None:
    whole = read_matrix(months / "first")
    assert read_matrix(months / "first", until=40).rows == whole.rows[:2]
    assert read_matrix(months / "first", until=45).rows == whole.rows[:2]
    assert read_matrix(months / "again", until=0).rows[-1] == whole.rows[-1]


# ---------------------------------------------------------------------------------------------- by hand


def test_a_phase_under_way_a_source_that_joins_and_a_run_whose_parent_is_gone(tmp_path: Path) -> None:
    tokens = 10 * TOKENS_PER_STEP
    records = [
        evaluation(0, phase="german", tokens=tokens, at="start", losses={"english": 5.0, "german": 7.0}),
        evaluation(5, phase="german", tokens=tokens + 5, at="interval", losses={"english": 5.5, "german": 6.5}),
        evaluation(9, phase="german", tokens=tokens + 9, at="interval", losses={"english": 5.75, "german": 6.0}),
    ]
    phases = [phase("base", "greek", 4, {"greek": 1.0}), phase("base", "english", 6, {"english": 1.0})]
    run = write_run(tmp_path / "run", [*phases, phase("run", "german", 20, {"german": 1.0})], records)
    matrix = read_matrix(run)
    assert [(row.label, row.under_way, dict(row.values)) for row in matrix.rows] == [
        ("greek", None, {}),  # nothing is known of it
        ("english", None, {"english": 5.0, "german": 7.0}),
        ("german", 9, {"english": 5.75, "german": 6.0}),
    ]
    assert matrix.forgetting("english") == 0.75
    assert matrix.forward_transfer("german") is None  # the untrained model was not evaluated
    scores = matrix.scores()
    assert (scores.learned, scores.retained, scores.forgetting, scores.backward) == (6.0, 5.75, 0.75, -0.75)
    assert matrix.scores(0).learned is None


def test_scores_are_means_over_the_sources_that_have_the_quantity(tmp_path: Path) -> None:
    order = [("p1", {"a": 0.5, "b": 0.5}), ("p2", {"c": 1.0}), ("p3", {"b": 0.5, "d": 0.5})]
    losses = [(9.0, 9.0, 9.0, 9.0), (4.0, 5.0, 8.0, 8.5), (4.5, 4.75, 3.0, 8.0), (4.25, 4.0, 3.5, 6.0)]
    records = [evaluation(0, phase="p1", tokens=0, at="start", losses=dict(zip("abcd", losses[0], strict=True)))]
    for number, ((name, _), values) in enumerate(zip(order, losses[1:], strict=True), start=1):
        at = {"phase": name, "tokens": number * 10 * TOKENS_PER_STEP, "at": "end"}
        records.append(evaluation(10 * number, **at, losses=dict(zip("abcd", values, strict=True))))
    matrix = read_matrix(
        write_run(tmp_path / "run", [phase("run", name, 10, shares) for name, shares in order], records)
    )
    scores = matrix.scores()
    assert scores.learned == (4.0 + 6.0) / 2  # b and d, the last phase's own
    assert scores.retained == (4.25 + 3.5) / 2  # a and c; b is the last phase's own again
    assert scores.forgetting == (0.25 + 0.5) / 2  # a over 4, c over 3
    assert scores.backward == ((4.0 - 4.25) + (3.0 - 3.5)) / 2
    assert scores.forward == ((9.0 - 8.0) + (9.0 - 8.0)) / 2  # c before p2, d before p3
    behind = matrix.scores(2)
    assert (behind.retained, behind.forgetting) == ((4.5 + 4.75) / 2, (0.5 + 0.0) / 2)
    assert behind.backward == ((4.0 - 4.5) + (5.0 - 4.75)) / 2
    record = matrix.record()
    assert record["sources"]["a"]["forgetting"] == 0.25
    assert [row["scores"]["learned"] for row in record["phases"]] == [None, 4.5, 3.0, 5.0]


def test_a_source_that_is_only_replayed_is_no_phases_own(tmp_path: Path) -> None:
    matrix = read_matrix(write_two_phases(tmp_path / "run"))  # German with a quarter of English replayed
    assert matrix.rows[-1].own == {"german"}


def test_a_merged_model_has_a_row_of_its_own_behind_the_phase_that_it_was_merged_in(tmp_path: Path) -> None:
    ten = 10 * TOKENS_PER_STEP
    trunk = phase("trunk", "english", 10, {"english": 1.0})
    write_run(tmp_path / "trunk", [trunk], [at("start", "english", 0, 8.0), at("end", "english", ten, 5.0)])
    merged = write_run(tmp_path / "merged", [trunk], [at("end", "release", ten, 4.5)])
    merge_of(merged, tmp_path / "trunk", "release", after=1, step=10)
    assert losses_of(merged) == [(UNTRAINED, 8.0), ("english", 5.0), ("release", 4.5)]
    records = [at("start", "german", ten, 4.5), at("end", "german", 2 * ten, 6.0)]
    after = write_run(tmp_path / "after", [trunk, phase("after", "german", 10, {"german": 1.0})], records)
    branch_off(after, merged, after=1, step=10)
    assert losses_of(after) == [(UNTRAINED, 8.0), ("english", 5.0), ("release", 4.5), ("german", 6.0)]
    assert read_matrix(after).forgetting("english") == 1.5
    again = write_run(tmp_path / "again", [], [at("end", "release-2", 2 * ten, 5.75)])
    merge_of(again, after, "release-2", after=2, step=20)
    assert losses_of(again)[2:] == [("release", 4.5), ("german", 6.0), ("release-2", 5.75)]
    assert read_matrix(again).forgetting("english") == 1.25


def at(where: str, phase: str, tokens: int, english: float) -> dict[str, Any]:
    return evaluation(tokens // TOKENS_PER_STEP, phase=phase, tokens=tokens, at=where, losses={"english": english})


def losses_of(run: Path) -> list[tuple[str, float]]:
    return [(row.label, row.values["english"]) for row in read_matrix(run, warn=pytest.fail).rows]


# ---------------------------------------------------------------------------------------------- properties


values = st.floats(0, 12)
ways = st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=8)


def matrix_of_one(way: list[tuple[float, bool]]) -> Matrix:
    """A source's losses over phases, and whether each read it; behind an untrained model of 12 nats."""
    rows = [Row(UNTRAINED, 0, None, frozenset(), {"s": 12.0})]
    for number, (loss, own) in enumerate(way, start=1):
        rows.append(Row(f"p{number}", number, None, frozenset({"s"} if own else ()), {"s": loss}))
    return Matrix("loss", tuple(rows))


@given(ways)
def test_forgetting_is_never_negative_and_never_less_than_what_backward_transfer_says(way: Any) -> None:
    matrix = matrix_of_one(way)
    forgetting, backward = matrix.forgetting("s"), matrix.backward_transfer("s")
    assert forgetting is not None
    assert forgetting >= 0
    if backward is not None:
        assert forgetting >= -backward
        assert backward == pytest.approx(matrix.learned("s") - matrix.retained("s"))


@given(st.lists(values, min_size=1, max_size=8), st.data())
def test_nothing_is_forgotten_where_losses_only_fall(losses: list[float], data: Any) -> None:
    falling = sorted(losses, reverse=True)
    own = data.draw(st.lists(st.booleans(), min_size=len(falling), max_size=len(falling)))
    matrix = matrix_of_one(list(zip(falling, own, strict=True)))
    assert all(matrix.forgetting("s", row) == 0 for row in range(1, len(matrix.rows)))
    backward, forward = matrix.backward_transfer("s"), matrix.forward_transfer("s")
    assert backward is None or backward >= 0
    assert forward is None or forward >= 0


@given(ways, st.integers(0, 8))
def test_a_row_knows_nothing_of_those_behind_it(way: Any, row: int) -> None:
    whole = matrix_of_one(way)
    row = min(row, len(way))
    cut = Matrix("loss", whole.rows[: row + 1])
    assert cut.scores() == whole.scores(row)
    assert cut.forgetting("s") == whole.forgetting("s", row)


@given(ways, st.floats(0.5, 4))
def test_all_quantities_scale_with_the_unit(way: Any, factor: float) -> None:
    scaled = matrix_of_one(way)
    scaled = Matrix("bits_per_byte", tuple(replace(r, values={"s": factor * r.values["s"]}) for r in scaled.rows))
    ours, theirs = matrix_of_one(way).record()["sources"]["s"], scaled.record()["sources"]["s"]
    for key, value in ours.items():
        assert theirs[key] == (None if value is None else pytest.approx(factor * value))


def test_a_nan_stays_one() -> None:
    matrix = matrix_of_one([(float("nan"), True), (3.0, False)])
    assert np.isnan(matrix.forgetting("s"))
    assert np.isnan(matrix.scores().backward)
    assert UNITS == ("loss", "bits_per_byte")
