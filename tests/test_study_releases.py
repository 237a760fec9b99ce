"""A study whose arms end in releases: the commands of both kinds, and what is read of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Prepared
from runs import command_line, metrics
from studies import study_of, write_study

Capture = pytest.CaptureFixture[str]
STEP = 12 * 32
TRUNK = {"kind": "constant", "max_lr": 3e-3, "warmup": "1 steps"}


@pytest.mark.long
def test_arms_may_end_in_an_anneal_or_a_merge_off_one_trunk(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    tree = study_of(
        prepared,
        seeds=[0],
        phases={"trunk": {"mixture": {"german": 2, "english": 1}, "steps": 8, "schedule": TRUNK}},
        arms={
            "trunk": {"phases": ["trunk"]},
            "released": {"phases": ["trunk"], "release": {"anneal": 2 * STEP}},
            "merged": {"phases": ["trunk"], "merge": {"last": 3, "every_steps": 2}},
        },
        bars=[{"claim": "all learn alike", "holds": 'mean("released") < mean("merged") + 9'}],
    )
    out = tmp_path / "out"
    status, _, err = command_line(capsys, "study", write_study(tmp_path / "s.yaml", tree), "--out", str(out))
    assert status == 0, err
    folders = {path.parent.name: path.parent for path in out.glob("runs/seed-0/*/metrics.jsonl")}
    released = next(folder for name, folder in folders.items() if "released" in name)
    merged = next(folder for name, folder in folders.items() if "merged" in name)
    (trunk,) = {*folders.values()} - {released, merged}
    assert len(metrics(trunk, "step")) == 8
    assert [record["lr"] for record in metrics(released, "step")][-1] == 0.1 * 3e-3
    assert [(record["phase"], record["step"]) for record in metrics(merged, "evaluation")] == [("release", 8)]
    results = json.dumps(json.loads((out / "results.json").read_text()))
    for run in (trunk, released, merged):
        loss = metrics(run, "evaluation")[-1]["sources"]["english"]["loss"]
        assert repr(loss)[:8] in results


@pytest.mark.parametrize(
    ("schedule", "ending", "words"),
    [
        ({}, {"release": {"anneal": 10}}, "arm 'a': its release: phases[0].tokens is 10"),
        ({}, {"release": {"anneal": 768, "min_lr": 1.0}}, "arm 'a': its release: min_lr is 1; it must lie between"),
        (
            {},
            {"release": {"anneal": 768, "shape": "exponential", "min_lr": 0.0}},
            "arm 'a': its release: phases[0].schedule.min_lr is 0, which an exponential anneal never reaches",
        ),
        (
            {},
            {"merge": {"last": 2, "every_steps": 2, "min_lr": 1.0}},
            "arm 'a': its merge: min_lr is 1; it must lie between",
        ),
        (
            {},
            {"merge": {"last": 2, "every_steps": 2, "shape": "exponential", "min_lr": 0.0}},
            "arm 'a': its merge: min_lr is 0, which an exponential decay never reaches",
        ),
        (
            {},
            {"merge": {"last": 2, "every_steps": 2, "shape": "mean", "min_lr": 1e-5}},
            "arm 'a': its merge: shape is mean",
        ),
        ({"warmup": "5 steps"}, {"merge": {"last": 3, "every_steps": 2}}, "arm 'a': merge begins at step 2"),
        (
            {"kind": "wsd", "decay": "3 steps"},
            {"merge": {"last": 3, "every_steps": 2}},
            "arm 'a': merge ends at step 6 of phase 't', whose schedule, wsd, holds one from 1 to 3",
        ),
        ({"warmup": "5 steps"}, {"release": {"anneal": 768, "at": 3}}, "arm 'a': release is at step 3"),
    ],
)
def test_a_release_that_would_be_refused_is_one_line_before_anything_is_trained(
    prepared: Prepared, tmp_path: Path, capsys: Capture, schedule: Any, ending: Any, words: str
) -> None:
    trunk = {"mixture": {"english": 1}, "steps": 6, "schedule": {**TRUNK, **schedule}}
    tree = study_of(prepared, seeds=[0], phases={"t": trunk}, arms={"a": {"phases": ["t"], **ending}}, bars=[])
    file = write_study(tmp_path / "s.yaml", tree)
    status, _, err = command_line(capsys, "study", file, "--out", str(tmp_path / "out"))
    assert (status, len(err.splitlines())) == (2, 1), err
    assert words in err
    assert not (tmp_path / "out" / "runs").exists()


def test_a_run_that_will_keep_many_checkpoints_is_named_before_it_is_trained(
    prepared: Prepared, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = {"mixture": {"english": 1}, "steps": 60, "schedule": TRUNK}
    odd = {"phases": ["t"], "release": {"anneal": 768, "at": 7}}
    arms = {"odd": odd, "even": {"phases": ["t"], "merge": {"last": 2, "every_steps": 20}}}
    file = write_study(tmp_path / "s.yaml", study_of(prepared, phases={"t": trunk}, arms=arms, bars=[]))
    monkeypatch.setattr("megacl.study.Jobs.run", lambda jobs, stop: "stopped")
    status, _, err = command_line(capsys, "study", file, "--out", str(tmp_path / "out"))
    assert status == 75
    assert "keeps 60 checkpoints, one every 1 steps" in err
