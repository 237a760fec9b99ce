"""The lineage as a file and as text."""

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacl.errors import CheckpointError
from megacl.lineage import (
    BranchRecord,
    CheckpointMark,
    ConversionRecord,
    Lineage,
    MergedCheckpoint,
    MergeRecord,
    MixturePiece,
    PhaseRecord,
    Ranges,
    SourceRecord,
    load_lineage,
    pass_over,
    save_lineage,
)
from megacl.lineage_text import describe

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


def mark(lineage: Lineage, step: int) -> CheckpointMark:
    return CheckpointMark(run="r", step=step, tokens=lineage.tokens, id=lineage.id, weights="a" * 64)


def history() -> Lineage:
    """A phase, a branch off the middle of it, a phase of the same name in another run, a merge of that, one more."""
    lineage = Lineage(phases=(replace(PHASE, passed_over=((4, 8), (12, 16))),))
    lineage = lineage.with_event(BranchRecord(after=1, checkpoint=mark(lineage, 5)))
    earlier = lineage.with_phase(replace(PHASE, run="child"))
    lineage = lineage.with_phase(replace(PHASE, run="child", samples=40))
    merged = tuple(
        MergedCheckpoint(**vars(mark(each, 5 * (2 + number))), weight=weight)
        for number, (each, weight) in enumerate(((earlier, 0.25), (lineage, 0.75)))
    )
    lineage = lineage.with_event(MergeRecord(name="release", after=2, shape="linear", checkpoints=merged))
    lineage = lineage.with_event(BranchRecord(after=2, checkpoint=mark(lineage, 15)))
    return lineage.with_phase(replace(PHASE, name="q"))


def test_a_lineage_comes_back_from_its_file(tmp_path: Path) -> None:
    lineage = history()
    save_lineage(lineage, tmp_path)
    assert load_lineage(tmp_path) == lineage
    tree = json.loads((tmp_path / "lineage.json").read_text())
    assert (tree["format"], tree["version"]) == ("megacl-lineage", 5)
    assert [type(entry) for entry in lineage.entries] == [
        *(PhaseRecord, BranchRecord, PhaseRecord),
        *(MergeRecord, BranchRecord, PhaseRecord),
    ]


def test_ids_are_hashes_over_the_id_before_and_the_entry_as_it_stands_in_the_file() -> None:
    lineage = history()
    tree = json.loads(lineage.dump())
    before = hashlib.sha256(b"").hexdigest()
    assert Lineage().id == before
    for entry, own in zip(lineage.entries, lineage.ids, strict=True):
        plain = (tree["phases"] if isinstance(entry, PhaseRecord) else tree["events"]).pop(0)
        assert plain.pop("id") == own
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        before = hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
        assert own == before
    assert lineage.id == before


def test_a_step_changes_the_last_id_alone() -> None:
    before = history()
    after = before.with_phase(replace(before.phases[-1], samples=24))
    assert len(after.entries) == len(before.entries)
    assert after.ids[:-1] == before.ids[:-1]
    assert after.id != before.id
    assert after.with_phase(before.phases[-1]).ids == before.ids


def test_a_phase_goes_on_in_its_own_run_only() -> None:
    lineage = Lineage(phases=(PHASE,))
    assert lineage.with_phase(replace(PHASE, samples=24)).phases == (replace(PHASE, samples=24),)
    assert len(lineage.with_phase(replace(PHASE, run="another")).phases) == 2
    branched = lineage.with_event(BranchRecord(after=1, checkpoint=mark(lineage, 5)))
    assert len(branched.with_phase(PHASE).phases) == 2
    with pytest.raises(ValueError, match="stands after 0 phases, and the lineage has 1"):
        lineage.with_event(BranchRecord(after=0, checkpoint=mark(lineage, 5)))


def numbers_in(tree: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where numbers stand in a JSON tree."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [found for key, value in pairs for found in numbers_in(value, (*path, key))]
    return [path] if isinstance(tree, int | float) else []


def test_any_number_that_was_changed_is_named_with_its_entry(tmp_path: Path) -> None:
    named = {
        ("phases", 0): "phase 'p' of run r",
        ("phases", 1): "phase 'p' of run child",
        ("phases", 2): "phase 'q' of run r",
        ("events", 0): "the branch after phase 'p'",
        ("events", 1): "the merge after phase 'p'",
        ("events", 2): "the branch after phase 'p'",
    }
    text = history().dump()
    places = [place for place in numbers_in(json.loads(text)) if place[0] in ("phases", "events")]
    assert {place[:2] for place in places} == set(named)
    for place in places:
        if place[-1] == "after":
            continue
        tree = json.loads(text)
        inside = tree
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] += 1
        (tmp_path / "lineage.json").write_text(json.dumps(tree))
        with pytest.raises(CheckpointError) as caught:
            load_lineage(tmp_path)
        assert f"lineage.json: {named[place[:2]]} does not match its id" in str(caught.value), place
        assert "\n" not in str(caught.value)


def test_a_branch_from_another_history_is_named_though_all_ids_are_made_anew(tmp_path: Path) -> None:
    lineage = history()
    phases = (replace(lineage.phases[0], seed=1), *lineage.phases[1:])
    save_lineage(replace(lineage, phases=phases), tmp_path)
    with pytest.raises(CheckpointError, match="the branch after phase 'p' does not match its id"):
        load_lineage(tmp_path)


def test_an_entry_that_was_taken_out_is_noticed(tmp_path: Path) -> None:
    for key, index in (("phases", 0), ("phases", 1), ("events", 0), ("events", 1), ("events", 2)):
        tree = json.loads(history().dump())
        del tree[key][index]
        (tmp_path / "lineage.json").write_text(json.dumps(tree))
        with pytest.raises(CheckpointError, match=r"does not match its id|stand after"):
            load_lineage(tmp_path)


def test_text_says_how_far_a_phase_went(tmp_path: Path) -> None:
    text = describe(Lineage(phases=(PHASE,)))
    assert "160 of 320 tokens in 20 sequences of 8, 4 a step, seed 0, order v1" in text
    assert "generation 1 of data/a, fingerprint ffffffffffff" in text
    assert text.endswith("160 tokens in all")


def test_text_says_what_was_passed_over() -> None:
    text = describe(Lineage(phases=(replace(PHASE, passed_over=((4, 8), (12, 16)), tokens=96),)))
    assert "96 of 320 tokens in 20 sequences of 8" in text
    assert "passed over 8 of these sequences, in 2 places" in text


def test_text_shows_branches_and_merges() -> None:
    lineage = history()
    lines = describe(lineage).splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    ids = [own[:12] for own in lineage.ids]
    assert heads[:-1] == [
        f"phase 0  p  (run r)  id {ids[0]}",
        f"branch from r@5, 160 tokens, lineage {ids[0]}, weights aaaaaaaaaaaa  id {ids[1]}",
        f"phase 1  p  (run child)  id {ids[2]}",
        f"merge  release  of 2 checkpoints, shape linear  id {ids[3]}",
        f"branch from r@15, 320 tokens, lineage {ids[3]}, weights aaaaaaaaaaaa  id {ids[4]}",
        f"phase 2  q  (run r)  id {ids[5]}",
    ]
    assert f"  0.75 of r@15, 320 tokens, lineage {ids[2]}, weights aaaaaaaaaaaa" in lines


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
        ("{}", "it is not a lineage of version 5"),
        ('{"format": "megacl-lineage", "version": 3, "phases": []}', "it is not a lineage of version 5"),
        ("[]", "it is not a lineage"),
        ("{", "it is not JSON"),
        (
            '{"format": "megacl-lineage", "version": 5, "phases": [{"name": "x"}]}',
            "it is not a whole lineage: phases.0",
        ),
        ('{"format": "megacl-lineage", "version": 5, "phases": 1}', "it is not a whole lineage: phases"),
        (
            '{"format": "megacl-lineage", "version": 5, "events": [{"kind": "leap"}]}',
            "it is not a whole lineage: events.0",
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


def test_a_conversion_is_an_entry_that_names_the_history_before_it(tmp_path: Path) -> None:
    before = history()
    out = ConversionRecord(
        after=3, from_="megacl", to="hf", name="x", checkpoint=mark(before, 20), files={"a": "b" * 64}, notes=("cut",)
    )
    after = before.with_event(out).with_event(ConversionRecord(after=3, from_="hf", to="megacl", name="y"))
    save_lineage(after, tmp_path)
    assert load_lineage(tmp_path) == after
    assert json.loads(after.dump())["events"][-2]["from"] == "megacl"
    assert after.names == before.names
    assert "conversion  from megacl to hf, of x" in describe(after)
    elsewhere = before.with_event(replace(out, checkpoint=replace(mark(before, 20), id="0" * 64)))
    save_lineage(elsewhere, tmp_path)
    with pytest.raises(CheckpointError, match="the conversion after phase 'q' does not match its id"):
        load_lineage(tmp_path)
