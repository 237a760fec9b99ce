"""What was evaluated on a model's way, over chains of runs: moved, resumed, cut short, and gone back."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Prepared
from recorded_runs import TOKENS_PER_STEP, branch_off, evaluation, phase, step, write_run, write_two_phases
from runs import metrics

from megacl.configfile import from_tree
from megacl.errors import CheckpointError, DataError
from megacl.heldout import Evaluation, bump, curve, loss_at, read_evaluations, rise
from megacl.trainer import train


def losses(way: list[Evaluation]) -> list[tuple[str, str, int, dict[str, float]]]:
    return [(each.phase, each.at, each.tokens, {name: r.loss for name, r in each.sources.items()}) for each in way]


# ---------------------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def base(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English for 12 steps, then German for 8, evaluated every 4 steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "base"
    train(from_tree(tree(prepared, run_dir)))
    return run_dir


def tree(prepared: Prepared, run_dir: Path, **changes: Any) -> dict[str, Any]:
    return prepared.tree(run_dir, evaluation={"sequences": 8, "every_steps": 4}, **changes)


@pytest.fixture(scope="module")
def branch(base: Path, prepared: Prepared) -> Path:
    """The same German on the same English, as a run of its own, which calls the sources otherwise."""
    run_dir = base.parent / "branch"
    settings = tree(prepared, run_dir, start_from=f"{base}@english")
    names = {"de": "german", "en": "english"}
    settings["sources"] = {name: {"path": str(prepared.sources[source])} for name, source in names.items()}
    settings["phases"] = [{**settings["phases"][1], "mixture": {"de": 1}}]
    train(from_tree(settings))
    return run_dir


def test_a_branch_has_the_way_of_the_run_that_it_branched_off_and_its_own_names(base: Path, branch: Path) -> None:
    ours, expected = read_evaluations(branch), read_evaluations(base)
    assert [each.run for each in ours] == ["base"] * 4 + ["branch"] * 3
    assert [(each.at, each.tokens // (12 * 32)) for each in ours] == [
        ("start", 0),
        ("interval", 4),
        ("interval", 8),
        ("end", 12),
        ("start", 12),
        ("interval", 16),
        ("end", 20),
    ]
    for name, source in (("en", "english"), ("de", "german")):
        assert curve(ours, name) == curve(expected, source)
        assert loss_at(ours, name, "german") == loss_at(expected, source, "german")
        assert rise(ours, name) == rise(expected, source)
        assert bump(ours, name) == bump(expected, source, "german")


def test_a_chain_is_found_from_another_folder_and_where_both_runs_were_moved_together(
    branch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses(read_evaluations(branch))
    shutil.copytree(branch.parent, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "base" / "checkpoints")
    for name in ("base", "branch"):  # as they would be called from the folder that holds them
        config = tmp_path / "moved" / name / "config.yaml"
        config.write_text(config.read_text().replace(f"{branch.parent}/", ""))
    assert losses(read_evaluations(tmp_path / "moved" / "branch")) == expected
    monkeypatch.chdir(tmp_path / "moved" / "branch")
    assert losses(read_evaluations(Path("."))) == expected


def test_where_the_run_before_is_gone_or_another_one_the_way_begins_with_the_branch_and_that_is_said(
    base: Path, branch: Path, prepared: Prepared, tmp_path: Path
) -> None:
    moved = tmp_path / "branch"
    shutil.copytree(branch, moved)
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace(f"start_from: {base}@english", f"start_from: {tmp_path}/base@english"))
    said: list[str] = []
    way = read_evaluations(moved, warn=said.append)
    assert [each.at for each in way] == ["start", "interval", "end"]
    assert len(said) == 1
    assert "is neither a run nor a checkpoint" in said[0]
    settings = tree(prepared, tmp_path / "base", seed=5)
    settings["phases"] = [{**settings["phases"][0], "steps": 3}]
    train(from_tree(settings))
    assert read_evaluations(moved, warn=said.append) == way
    assert f"{tmp_path}/base: it is not the run that {moved} started from" in said[1]


def test_a_run_that_was_resumed_and_given_a_phase_has_the_way_of_an_undisturbed_one(
    base: Path, prepared: Prepared, tmp_path: Path
) -> None:
    settings = tree(prepared, tmp_path / "base")
    for phases in (settings["phases"][:1], settings["phases"]):
        train(from_tree({**settings, "phases": phases}))
    ours, expected = read_evaluations(tmp_path / "base"), read_evaluations(base)
    for source in ("english", "german"):
        points = curve(expected, source)
        assert [point for point in curve(ours, source) if point in points] == curve(ours, source)
        assert loss_at(ours, source, "german") == loss_at(expected, source, "german")
        assert loss_at(ours, source, "english") == loss_at(expected, source, "english")


def test_until_a_step_is_what_was_known_there(base: Path) -> None:
    assert losses(read_evaluations(base, until=13)) == losses(read_evaluations(base))[:4]
    assert len(metrics(base, "evaluation")) > 4


# ---------------------------------------------------------------------------------------------- written runs


def test_what_was_undone_by_going_back_is_left_out(tmp_path: Path) -> None:
    def at(number: int, learned: int, loss: float, kind: str = "interval") -> dict[str, Any]:
        return evaluation(number, phase="a", tokens=TOKENS_PER_STEP * learned, at=kind, losses={"a": loss})

    records = [
        at(0, 0, 8.0, "start"),
        at(2, 2, 6.0),
        at(4, 4, 9.0),
        {"kind": "go_back", "step": 4, "phase": "a", "to_step": 2, "passed_over": [64, 128]},
        at(4, 2, 6.0),
        at(6, 4, 5.0, "end"),
    ]
    whole = replace(phase("run", "a", 6, {"a": 1.0}), passed_over=((64, 128),), tokens=4 * TOKENS_PER_STEP)
    run = write_run(tmp_path / "run", [whole], records)
    assert curve(read_evaluations(run), "a") == [(0, 8.0), (2 * TOKENS_PER_STEP, 6.0), (4 * TOKENS_PER_STEP, 5.0)]
    from_the_start = [*records[:3], {**records[3], "to_step": None}, at(4, 0, 8.0), at(6, 2, 7.0, "end")]
    run = write_run(tmp_path / "other", [whole], from_the_start)
    assert curve(read_evaluations(run), "a") == [(0, 8.0), (2 * TOKENS_PER_STEP, 7.0)]


def test_one_sources_way_by_hand(tmp_path: Path) -> None:
    way = read_evaluations(write_two_phases(tmp_path / "run"))
    # english: 8, (6.5), 5 behind english, 5.125 behind german; german: 8.25, (7.75), 7.5, 5.5
    assert loss_at(way, "english") == 5.125
    assert loss_at(way, "english", "english") == 5.0
    assert loss_at(way, "english", at="start") == 8.0
    assert loss_at(way, "english", "english", "interval") == 6.5
    assert loss_at(way, "english", unit="bits_per_byte") == pytest.approx(5.125 * 500 / math.log(2) / 2000)
    assert (rise(way, "english"), rise(way, "german")) == (0.125, -2.0)
    assert (bump(way, "english"), bump(way, "german")) == (0.125, -2.0)
    assert bump(way, "english", "english") == -1.5
    with pytest.raises(DataError, match="source 'french' was not evaluated at any end"):
        loss_at(way, "french")
    with pytest.raises(DataError, match="source 'english' was not evaluated at the end of phase 'french'"):
        loss_at(way, "english", "french")
    with pytest.raises(DataError, match="'french' was not evaluated at a phase's end and before"):
        rise(way, "french")
    with pytest.raises(DataError, match="source 'english' was not evaluated both before phase 'french'"):
        bump(way, "english", "french")


def test_a_name_that_means_other_data_in_an_earlier_run_is_kept_apart(tmp_path: Path) -> None:
    first = evaluation(10, phase="a", tokens=10 * TOKENS_PER_STEP, at="end", losses={"web": 5.0})
    first["sources"]["web"]["fingerprint"] = "0123456789"
    before = replace(phase("first", "a", 10, {"web": 1.0}))
    write_run(tmp_path / "first", [before], [first])
    start = evaluation(0, phase="b", tokens=10 * TOKENS_PER_STEP, at="start", losses={"web": 6.0})
    run = write_run(tmp_path / "second", [before, phase("second", "english", 5, {"web": 1.0})], [start])
    branch_off(run, tmp_path / "first", after=1, step=10)
    assert [list(each.sources) for each in read_evaluations(run)] == [["web-012345"], ["web"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"at": "noon"}, "is an evaluation without 'phase' and 'at'"),
        ({"sources": []}, "is an evaluation without 'sources'"),
        ({"tokens": None}, "is an evaluation without a whole number 'tokens'"),
        ({"sources": {"a": {"loss": "x"}}}, "is an evaluation without a number 'loss' for each source"),
    ],
)
def test_a_record_that_is_not_whole_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    record = evaluation(1, phase="english", tokens=8192, at="end", losses={"english": 5.0})
    records = [step(1, phase="english", tokens=8192), {**record, **change}]
    run = write_run(tmp_path / "run", [phase("run", "english", 1, {"english": 1.0})], records)
    with pytest.raises(CheckpointError, match=f"line 2 {words}"):
        read_evaluations(run)


def test_a_loss_that_was_not_finite_is_nan_and_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    record = evaluation(1, phase="english", tokens=8192, at="end", losses={"english": None})
    run = write_run(tmp_path / "run", [phase("run", "english", 1, {"english": 1.0})], [record])
    assert math.isnan(loss_at(read_evaluations(run), "english"))
    assert json.loads((run / "metrics.jsonl").read_text())["sources"]["english"]["loss"] is None
    with pytest.raises(CheckpointError, match="no run directory"):
        read_evaluations(tmp_path)
