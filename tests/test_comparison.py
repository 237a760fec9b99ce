"""A run beside a union run: the places at which they are compared, by hand, and what cannot be compared."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import TOKENS_PER_STEP, evaluation, phase, write_run, write_two_phases
from runs import command_line

from megacl.comparison import MEAN, Point, compare
from megacl.errors import DataError
from megacl.model.config import ModelConfig
from megacl.model.gpt import flops_per_token

# recorded_runs.py: 512 x 32 weights in the head, 12 x 32^2 in each of 2 layers, and attention over 256 tokens.
FLOPS = 6 * (512 * 32 + 2 * 12 * 32**2) + 12 * 2 * 32 * 256


def union(folder: Path, steps: int = 40, tokenizer: str = "f00d", **changes: Any) -> Path:
    """English and German together: evaluated at the beginning, after half of the steps, and at the end."""
    losses = [{"english": 8.0, "german": 8.0}, {"english": 6.0, "german": 7.0}, {"english": 5.0, "german": 5.0}]
    records = []
    for at, place, found in zip(("start", "interval", "end"), (0, steps // 2, steps), losses, strict=True):
        records.append(evaluation(place, phase="union", tokens=place * TOKENS_PER_STEP, at=at, losses=found))
        for result in records[-1]["sources"].values():
            result.update(changes)
    record = phase(folder.name, "union", steps, {"english": 0.5, "german": 0.5})
    run = write_run(folder, [replace(record, tokenizer=tokenizer)], records)
    return run


def losses_at(point: Point) -> dict[str, float | None]:
    return point.values["loss"]


def test_the_union_is_read_at_equal_tokens_and_at_its_end(tmp_path: Path) -> None:
    comparison = compare(write_two_phases(tmp_path / "run"), union(tmp_path / "union", steps=30), pytest.fail)
    ours, equal, end = comparison.points
    assert [each.where for each in comparison.points] == ["run", "union, equal tokens and compute", "union, at its end"]
    assert [each.tokens for each in comparison.points] == [k * TOKENS_PER_STEP for k in (20, 20, 30)]
    assert [each.flops for each in comparison.points] == [k * TOKENS_PER_STEP * FLOPS for k in (20, 20, 30)]
    assert losses_at(ours) == {"english": 5.125, "german": 5.5, MEAN: 5.3125}
    third = 5 / 15  # of the way from step 15 to step 30
    assert losses_at(equal) == pytest.approx({"english": 6 - third, "german": 7 - 2 * third, MEAN: 6.5 - 1.5 * third})
    assert losses_at(end) == {"english": 5.0, "german": 5.0, MEAN: 5.0}
    for unit, value in (("loss", 5.125), ("bits_per_byte", 5.125 * 500 / math.log(2) / 2000)):
        assert ours.values[unit]["english"] == pytest.approx(value)
    assert comparison.units == ("loss", "bits_per_byte")
    assert (comparison.last_phase, comparison.last_tokens, comparison.notes) == ("german", 10 * TOKENS_PER_STEP, ())
    lines = "\n".join(comparison.lines())
    assert "run has learned from 163,840 tokens, 81,920 of them in its last phase, german" in lines
    assert "5.0000 (+0.1250)" in lines
    assert "5.6667 (-0.5417)" in lines


def test_a_dearer_model_is_read_at_equal_compute_too(tmp_path: Path) -> None:
    other = union(tmp_path / "union", steps=40)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("num_layers: 2", "num_layers: 4"))
    dearer = flops_per_token(ModelConfig(vocab_size=512, hidden_size=32, num_layers=4, num_attention_heads=2), 256)
    _, tokens, compute, _ = compare(write_two_phases(tmp_path / "run"), other).points
    assert (tokens.where, compute.where) == ("union, equal tokens", "union, equal compute")
    assert tokens.tokens == 20 * TOKENS_PER_STEP
    assert compute.tokens == pytest.approx(20 * TOKENS_PER_STEP * FLOPS / dearer)
    assert compute.flops == pytest.approx(20 * TOKENS_PER_STEP * FLOPS)
    steps = compute.tokens / TOKENS_PER_STEP  # before the 20th, where English stands at 6 and came from 8
    assert losses_at(compute)["english"] == pytest.approx(8 - 2 * steps / 20)


def test_where_the_union_does_not_reach_is_said_and_left_out(tmp_path: Path) -> None:
    comparison = compare(write_two_phases(tmp_path / "run"), union(tmp_path / "union", steps=10))
    assert [each.where for each in comparison.points] == ["run", "union, at its end"]
    assert comparison.notes == ("union does not reach equal tokens and compute",)


def test_with_unlike_tokenizers_only_bits_per_byte_compare(tmp_path: Path) -> None:
    other = union(tmp_path / "union", steps=30, tokenizer="cafe", fingerprint="other shards")
    comparison = compare(write_two_phases(tmp_path / "run"), other)
    assert comparison.units == ("bits_per_byte",)
    assert len(comparison.notes) == 1
    assert "unlike tokenizers" in comparison.notes[0]
    assert "nats a token" not in "\n".join(comparison.lines())


def test_text_that_differs_is_said(tmp_path: Path) -> None:
    run = write_two_phases(tmp_path / "run")
    (note, _) = compare(run, union(tmp_path / "union", fingerprint="other shards")).notes
    assert note == "source english is other data in the two runs; its held-out documents may differ"
    (note, _) = compare(run, union(tmp_path / "fewer", text_bytes=1000.0)).notes
    assert note.startswith("source english was evaluated on 2,000 bytes of text here and 1,000 there")


def test_runs_without_a_source_or_an_evaluation_in_common_are_refused(tmp_path: Path) -> None:
    run = write_two_phases(tmp_path / "run")
    french = evaluation(1, phase="french", tokens=1, at="end", losses={"french": 5.0})
    other = write_run(tmp_path / "french", [phase("french", "french", 1, {"french": 1.0})], [french])
    with pytest.raises(DataError, match="have no evaluated source in common"):
        compare(run, other)
    with pytest.raises(DataError, match="nothing has been evaluated there yet"):
        compare(run, write_run(tmp_path / "begun", [], []))


def test_the_command_compares_as_text_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = str(write_two_phases(tmp_path / "run")), str(union(tmp_path / "union"))
    status, out, _ = command_line(capsys, "evaluate", run, "--against", other)
    assert status == 0
    assert "held-out loss, bits per byte of text; in brackets: how far run lies above it" in out
    status, out, _ = command_line(capsys, "evaluate", run, "--against", other, "--json")
    points = json.loads(out)["points"]
    assert [point["values"]["loss"]["german"] for point in points] == [5.5, 7.0, 5.0]
    status, out, err = command_line(capsys, "evaluate", run, "--against", other, "--seq-length", "5")
    assert (status, out) == (2, "")
    assert "leave out --data, --seq-length and --out" in err
    for no_run in (str(tmp_path), f"{run}@1"):
        status, _, err = command_line(capsys, "evaluate", no_run, "--against", other)
        assert status == 2
        assert f"{no_run}: no run directory; " in err
