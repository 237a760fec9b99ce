"""The lineage as a file and as text."""

import json
from pathlib import Path

import pytest

from megacl.errors import CheckpointError
from megacl.lineage import Lineage, MixturePiece, PhaseRecord, SourceRecord, describe, load_lineage, save_lineage

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
    lineage = Lineage(phases=(PHASE,))
    save_lineage(lineage, tmp_path)
    assert load_lineage(tmp_path) == lineage
    tree = json.loads((tmp_path / "lineage.json").read_text())
    assert (tree["format"], tree["version"]) == ("megacl-lineage", 2)


def test_text_says_how_far_a_phase_went(tmp_path: Path) -> None:
    text = describe(Lineage(phases=(PHASE,)))
    assert "160 of 320 tokens in 20 sequences of 8, 4 a step, seed 0, order v1" in text
    assert "generation 1 of data/a, fingerprint ffffffffffff" in text
    assert text.endswith("160 tokens in all")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{}", "it is not a lineage of version 2"),
        ('{"format": "megacl-lineage", "version": 1, "phases": []}', "it is not a lineage of version 2"),
        ("[]", "it is not a lineage"),
        ("{", "it is not JSON"),
        (
            '{"format": "megacl-lineage", "version": 2, "phases": [{"name": "x"}]}',
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
