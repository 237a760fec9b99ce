"""Runs whose mixture changes, whose sources run out and whose past is replayed: planned, trained, read back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Prepared
from runs import command_line, last_state, losses, metrics

from megacl.checkpoint import list_checkpoints
from megacl.configfile import from_tree
from megacl.data.packing import PADDING, PackedSequences
from megacl.data.source import open_source
from megacl.data.stream import PhaseStream, open_recorded
from megacl.data.tokenizer import load_tokenizer
from megacl.errors import ConfigError
from megacl.lineage import Lineage, load_lineage, save_lineage
from megacl.trainer import train

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("one_thread")


def sequences(prepared: Prepared, name: str) -> int:
    return (open_source(prepared.sources[name]).train.tokens - 1) // 32


def tree(prepared: Prepared, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Two phases: English and then ever more German until English runs out; German with all that was, fading."""
    schedule = {"kind": "linear", "max_lr": 1e-3, "warmup": "2 steps"}
    mixed = {
        "name": "mixed",
        "mixture": {"english": 1},
        "mixture_changes": [
            {"at": "50%", "mixture": {"english": 3, "german": 1}, "how": "linear"},
            {"at": "75%", "mixture": {"english": 1, "german": 1}},
        ],
        "when_exhausted": "stop",
        "steps": 60,
        "seq_length": 64,
        "schedule": dict(schedule),
    }
    replay = {"share": 0.25, "policy": "uniform", "max_times": 1}
    german = {"name": "german", "mixture": {"german": 1}, "steps": 4, "schedule": schedule, "replay": replay}
    return prepared.tree(
        run_dir, **{"phases": [mixed, german], "global_batch_size": 20, "evaluation": {"sequences": 2}, **changes}
    )


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(from_tree(tree(prepared, run_dir))) == "done"
    return run_dir


def test_a_phase_ends_with_the_last_batch_before_a_source_would_come_again(whole: Path, prepared: Prepared) -> None:
    mixed, german = load_lineage(whole).phases
    left = (open_source(prepared.sources["english"]).train.tokens - 1) // 64
    english = mixed.sources[0]
    assert mixed.budget_samples == mixed.samples == mixed.budget_steps * 20 < 60 * 20
    assert left - 20 < english.samples <= left
    assert english.runs_out is not None
    assert mixed.step_of(english.runs_out) == mixed.budget_steps + 1
    steps = metrics(whole, "step")
    assert [record["phase"] for record in steps] == ["mixed"] * mixed.budget_steps + ["german"] * 4
    assert steps[mixed.budget_steps - 1]["lr"] == 1e-4, "the schedule is laid over the steps that there are"
    assert german.replay is not None
    assert german.replay.samples == 20


def test_it_goes_on_bitwise_from_any_checkpoint(whole: Path, prepared: Prepared, tmp_path: Path) -> None:
    config = from_tree(tree(prepared, tmp_path / "run", checkpoint={"every_steps": 9, "keep_last": None}))
    assert train(config) == "done"
    for checkpoint in list_checkpoints(tmp_path / "run")[3:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    assert train(config) == "done"
    assert losses(tmp_path / "run") == losses(whole)
    assert last_state(tmp_path / "run") == last_state(whole)


def test_the_plan_says_what_runs_out_and_when_before_anything_is_trained(
    whole: Path, prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(tree(prepared, tmp_path / "run")))
    steps = load_lineage(whole).phases[0].budget_steps
    status, out, _ = command_line(capsys, "data", "plan", str(config))
    assert status == 0
    assert f"phases[0] mixed: {steps * 20 * 64:,} tokens = {steps} steps x 20 sequences x 64" in out
    assert f"warning: phase 'mixed' ends after step {steps} of 60, where english has been read to its end" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["reads", "tokens", "share", "times", "by", "then", "runs", "out"] in rows
    assert any(row[0] == "english" and row[-2:] == ["step", str(steps + 1)] for row in rows)
    assert any(row[:5] == ["replayed", "phase", "mixed", "640", "25.00%"] for row in rows)
    status, dry, _ = command_line(capsys, "train", str(config), "--dry-run")
    assert "  mixed from step 1 on english 1/1, on a straight line to english 3/4, german 1/4 at step 31" in dry
    assert f"  warning: phase 'mixed' ends after step {steps} of 60" in dry
    assert not (tmp_path / "run").exists()
    config.write_text(json.dumps(tree(prepared, whole)))
    status, out, _ = command_line(capsys, "data", "plan", str(config), "--json")
    planned = json.loads(out)["phases"]
    assert [(phase["phase"], phase["done"], phase["steps"]) for phase in planned] == [
        ("mixed", True, steps),
        ("german", True, 4),
    ]
    seen = load_lineage(whole).phases
    for phase, record in zip(planned, seen, strict=True):
        own = [reading for reading in phase["readings"] if reading["kind"] == "source"]
        assert [reading["samples"] for reading in own] == [source.samples for source in record.sources]
        assert sum(reading["share"] for reading in phase["readings"]) == pytest.approx(1)


def test_a_phase_that_comes_to_sources_with_nothing_left_names_them_and_the_changes_that_it_does_not_reach(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    alone = sequences(prepared, "german") * 10 // 9 // 20 + 2
    phase = {
        "name": "p",
        "mixture": {"english": 1, "german": 9},
        "mixture_changes": [
            {"at": f"{alone} steps", "mixture": {"german": 1}},
            {"at": f"{alone + 3} steps", "mixture": {"english": 1}},
        ],
        "when_exhausted": "renormalise",
        "steps": alone + 9,
        "schedule": {"kind": "constant", "max_lr": 1e-3},
    }
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(tree(prepared, tmp_path / "run", phases=[phase])))
    status, out, _ = command_line(capsys, "data", "plan", str(config))
    assert status == 0
    assert (
        f"warning: phase 'p' ends after step {alone} of {alone + 9}, where german has been read to its end; "
        f"what its mixture changes to from step {alone + 4} on is not reached\n"
    ) in out


def test_weights_that_no_float_can_add_or_divide_are_planned(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    phase = {
        "name": "p",
        "mixture": {"english": 1e30, "german": 1e-308},
        "steps": 1,
        "schedule": {"kind": "constant", "max_lr": 1e-3},
    }
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(tree(prepared, tmp_path / "run", phases=[phase])))
    status, out, _ = command_line(capsys, "data", "plan", str(config))
    assert status == 0
    assert "warning: phase 'p': 'german' gets 1.53e-05 of the samples, not the 0 asked for" in out


def test_the_plan_says_when_a_phase_has_been_replayed_as_often_as_it_may(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    schedule = {"kind": "constant", "max_lr": 1e-3}
    phases = [
        {"name": "short", "mixture": {"english": 1}, "steps": 1, "schedule": schedule},
        {"name": "long", "mixture": {"english": 1}, "steps": 9, "schedule": schedule},
        {
            "name": "last",
            "mixture": {"german": 1},
            "steps": 6,
            "schedule": schedule,
            "replay": {"share": 0.5, "policy": "power_law", "max_times": 1},
        },
    ]
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(tree(prepared, tmp_path / "run", phases=phases)))
    status, out, _ = command_line(capsys, "data", "plan", str(config), "--json")
    assert status == 0
    last = json.loads(out)["phases"][-1]
    # Of ten replayed samples a step, power_law gives a part of 0.449 to the older of two phases: 20 in 4.5 steps.
    assert {reading["name"]: reading["runs_out"] for reading in last["readings"] if "phase" in reading["kind"]} == {
        "short": 5,
        "long": None,
    }
    line = "phase 'last': replay.max_times is reached for phase 'short' at step 5; from there on the others share its"
    assert [line in notice for notice in last["notices"]] == [True]


def test_the_lineage_says_how_the_mixture_went(whole: Path, capsys: Capture) -> None:
    status, out, _ = command_line(capsys, "lineage", str(whole))
    assert status == 0
    assert "mixed from step 1 on english 1/1, on a straight line to english 3/4, german 1/4 at step 31" in out
    assert "; would run out at step " in out
    assert "policy uniform" in out


def test_others_take_the_places_of_a_source_that_runs_out(prepared: Prepared, tmp_path: Path) -> None:
    phase = {
        "name": "both",
        "mixture": {"english": 9, "german": 1},
        "weights_by": "tokens",
        "when_exhausted": "renormalise",
        "steps": 95,
        "schedule": {"kind": "constant", "max_lr": 1e-3},
    }
    config = from_tree(tree(prepared, tmp_path / "run", phases=[phase]))
    assert train(config) == "done"
    (record,) = load_lineage(tmp_path / "run").phases
    english, german = record.sources
    assert english.samples == sequences(prepared, "english")
    assert english.samples + german.samples == 95 * 20
    assert english.epochs <= 1


def test_a_schedule_too_long_for_what_is_left_of_its_phase_stops_the_run_before_it_writes(
    prepared: Prepared, tmp_path: Path
) -> None:
    changed = tree(prepared, tmp_path / "run")
    changed["phases"][0]["schedule"]["warmup"] = "56 steps"
    with pytest.raises(ConfigError, match=r"'mixed' ends after step \d+ of 60, .* phases\[0\].schedule is longer than"):
        train(from_tree(changed))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- what a step read


def test_the_text_of_a_step_is_what_the_model_read(whole: Path, prepared: Prepared, capsys: Capture) -> None:
    lineage, tokenizer = load_lineage(whole), load_tokenizer(prepared.tokenizer)
    first = lineage.phases[0].budget_steps
    status, out, err = command_line(capsys, "data", "sample", str(whole), "--steps", f"{first}:{first + 1}", "--json",
                                    "--limit", "40")  # fmt: skip
    assert (status, err) == (0, "")
    shown = [json.loads(line) for line in out.splitlines()]
    assert [read["step"] for read in shown] == [first] * 20 + [first + 1] * 20
    expected = []
    for phases, samples in ((1, np.arange(20) + (first - 1) * 20), (2, np.arange(20))):
        stream = PhaseStream(Lineage(phases=lineage.phases[:phases]), open_recorded)
        expected += [(phases - 1, sample, row) for sample, row in zip(samples, stream.read(samples), strict=True)]
    for read, (phase, sample, tokens) in zip(shown, expected, strict=True):
        assert (read["phase"], read["sample"]) == (lineage.phases[phase].name, sample)
        assert "".join(read["documents"]).replace(" ", "") == tokenizer.decode(tokens).replace(" ", "")
        if read["replayed_phase"] is None:
            stream_of = open_source(prepared.sources[read["source"]]).train
            assert stream_of.read(read["start"], len(tokens)).tolist() == tokens.tolist()
    again = [read for read in shown if read["replayed"]]
    assert len(again) == 5
    assert {read["replayed_phase"] for read in again} == {"mixed"}


def test_samples_are_shown_up_to_a_limit_with_where_they_begin(whole: Path, capsys: Capture) -> None:
    status, out, err = command_line(capsys, "data", "sample", str(whole), "--steps", "3", "--limit", "2")
    assert status == 0
    assert out.count("--- step 3, phase mixed, sample ") == 2
    assert ": english, token " in out
    assert err == "these steps have more samples than --limit 2\n"


def test_samples_that_the_run_passed_over_are_shown_as_such(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints"))
    mixed, later = load_lineage(whole).phases
    save_lineage(Lineage(phases=(replace(mixed, passed_over=((40, 60),)), later)), run)
    status, out, _ = command_line(capsys, "data", "sample", str(run), "--steps", "2:3", "--limit", "40")
    assert status == 0
    heads = [line for line in out.splitlines() if line.startswith("--- step ")]
    assert [line.endswith(", passed over") for line in heads] == [False] * 20 + [True] * 20


@pytest.mark.parametrize(
    ("steps", "message"),
    [("0:3", "there are no steps 0 to 3; the phases that have begun have steps 1 to "), ("x", "it must be two steps")],
)
def test_steps_that_a_run_does_not_have_are_one_line(whole: Path, capsys: Capture, steps: str, message: str) -> None:
    status, _, err = command_line(capsys, "data", "sample", str(whole), "--steps", steps)
    assert status == 2
    assert message in err


def test_a_folder_that_holds_no_run_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    status, _, err = command_line(capsys, "data", "sample", str(tmp_path), "--steps", "1")
    assert status == 2
    assert f"{tmp_path} is neither a run nor a checkpoint" in err


def test_the_padding_of_packed_rows_is_no_text(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    phase = {"name": "p", "mixture": {"english": 1}, "steps": 1, "schedule": {"kind": "constant", "max_lr": 1e-3}}
    assert train(from_tree(tree(prepared, tmp_path / "run", phases=[phase], packing="best_fit"))) == "done"
    capsys.readouterr()
    status, out, _ = command_line(capsys, "data", "sample", str(tmp_path / "run"), "--steps", "1", "--limit", "20")
    assert status == 0
    assert out.count("--- step 1, phase p, sample ") == 20
    assert out.count(": english, packed row ") == 20
    status, out, _ = command_line(capsys, "data", "sample", str(tmp_path / "run"), "--steps", "1", "--json")
    source = open_source(prepared.sources["english"])
    sequences = PackedSequences(source, 32, 0)
    for read in map(json.loads, out.splitlines()):
        assert read["start"] is None
        tokens = sequences.read(np.array([read["row"]]))[0]
        text = load_tokenizer(prepared.tokenizer).decode(tokens[tokens != PADDING])
        assert "".join(read["documents"]).replace(" ", "") == text.replace(" ", "")


def test_text_is_shown_where_a_source_that_was_not_read_is_gone(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    for name, path in prepared.sources.items():
        shutil.copytree(path, tmp_path / name)
    phase = {"name": "p", "mixture": {"english": 1}, "steps": 1, "schedule": {"kind": "constant", "max_lr": 1e-3}}
    sources = {name: {"path": str(tmp_path / name)} for name in prepared.sources}
    assert train(from_tree(tree(prepared, tmp_path / "run", phases=[phase], sources=sources))) == "done"
    shutil.rmtree(tmp_path / "german")
    capsys.readouterr()
    status, out, _ = command_line(capsys, "data", "sample", str(tmp_path / "run"), "--steps", "1")
    assert status == 0
    assert ": english, token " in out
    shutil.rmtree(tmp_path / "english")
    status, _, err = command_line(capsys, "data", "sample", str(tmp_path / "run"), "--steps", "1")
    assert status == 2
    assert "the model's history reads source 'english'" in err
