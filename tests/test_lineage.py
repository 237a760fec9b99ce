"""The lineage as a file and as text."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacl.errors import CheckpointError
from megacl.lineage import (
    Lineage,
    MixturePiece,
    PhaseRecord,
    Ranges,
    SourceRecord,
    describe,
    load_lineage,
    pass_over,
    save_lineage,
)

SOURCE = SourceRecord(name="a", path="data/a", generation=1, fingerprint="f" * 64, train_tokens=900, first=0)
PHASE = PhaseRecord(
    run="r",
    name="p",
    order="v1",
    seed=0,
    seq_length=8,
    global_batch_size=4,
    budget_samples=40,
    samples=20,
    tokens=160,
    tokenizer="t",
    sources=(SOURCE,),
    mixture=(MixturePiece(first=0, weights=(1,)),),
    schedule={"kind": "constant", "max_lr": 1e-3},
    optimizer_state="new",
    start_lr=0.0,
    last_lr=1e-3,
)


def test_a_lineage_comes_back_from_its_file(tmp_path: Path) -> None:
    lineage = Lineage(phases=(replace(PHASE, passed_over=((4, 8), (12, 16))),))
    save_lineage(lineage, tmp_path)
    assert load_lineage(tmp_path) == lineage
    tree = json.loads((tmp_path / "lineage.json").read_text())
    assert (tree["format"], tree["version"]) == ("megacl-lineage", 3)


def test_text_says_how_far_a_phase_went(tmp_path: Path) -> None:
    text = describe(Lineage(phases=(PHASE,)))
    assert "160 of 320 tokens in 20 sequences of 8, 4 a step, seed 0, order v1" in text
    assert "generation 1 of data/a, fingerprint ffffffffffff" in text
    assert text.endswith("160 tokens in all")


def test_text_says_what_was_passed_over() -> None:
    text = describe(Lineage(phases=(replace(PHASE, passed_over=((4, 8), (12, 16)), tokens=96),)))
    assert "96 of 320 tokens in 20 sequences of 8" in text
    assert "passed over 8 of these sequences, in 2 places" in text


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12))))
def test_ranges_that_are_passed_over_add_up_as_sets_of_samples_do(ranges: list[tuple[int, int]]) -> None:
    passed_over: Ranges = ()
    samples: set[int] = set()
    for first, count in ranges:
        passed_over = pass_over(passed_over, first, first + count)
        samples |= {*range(first, first + count)}
        assert [each for first, end in passed_over for each in range(first, end)] == sorted(samples)
        assert all(end < following for (_, end), (following, _) in itertools.pairwise(passed_over))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{}", "it is not a lineage of version 3"),
        ('{"format": "megacl-lineage", "version": 2, "phases": []}', "it is not a lineage of version 3"),
        ("[]", "it is not a lineage"),
        ("{", "it is not JSON"),
        (
            '{"format": "megacl-lineage", "version": 3, "phases": [{"name": "x"}]}',
            "it is not a whole lineage: phases.0",
        ),
    ],
)
def test_what_is_no_lineage_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "lineage.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_lineage(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "lineage.json"))
    assert message in str(caught.value)
