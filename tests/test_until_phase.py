"""A run that is trained phase by phase, a command each, is the run that one command trains."""

from pathlib import Path

import pytest
from conftest import Prepared
from runs import command_line, last_state, losses, metrics

from megacl.checkpoint import list_checkpoints
from megacl.configfile import from_tree
from megacl.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


def what_was_evaluated(run_dir: Path) -> list[tuple[int, str, str, list[tuple[str, float]]]]:
    return [
        (each["step"], each["phase"], each["at"], [(name, found["loss"]) for name, found in each["sources"].items()])
        for each in metrics(run_dir, "evaluation")
    ]


def test_a_run_trained_a_phase_a_command_is_to_the_bit_the_run_of_one_command(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"  # of one name, which is in the lineage
    assert train(from_tree(prepared.tree(whole))) == "done"
    (tmp_path / "parts").mkdir()
    file = prepared.config_file(parts)
    status, _, err = command_line(capsys, "train", file, "--until-phase", "english")
    assert status == 0
    assert "20 steps, from the beginning, until the end of phase english" in err
    assert list_checkpoints(parts)[-1].name == "step-00000012"
    assert len(losses(parts)) == 12
    again, _, _ = command_line(capsys, "train", file, "--until-phase", "english")
    assert again == 0
    assert len(losses(parts)) == 12
    status, _, err = command_line(capsys, "train", file, "--until-phase", "german")
    assert status == 0
    assert losses(parts) == losses(whole)
    assert last_state(parts) == last_state(whole)
    assert what_was_evaluated(parts) == what_was_evaluated(whole)
    assert (parts / "lineage.json").read_text() == (whole / "lineage.json").read_text()


def test_a_phase_that_the_run_has_not_is_refused_and_the_nearest_named(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = command_line(capsys, "train", prepared.config_file(tmp_path / "run"), "--until-phase", "englisch")
    assert status == 2
    assert "--until-phase is 'englisch', which is no phase of the run; did you mean 'english'?" in err
    assert not (tmp_path / "run").exists()
