"""A study that is killed or stopped again and again ends as if it had never been, and leaves no run behind."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import Prepared
from runs import last_state, start
from studies import study_of, write_study

ROUNDS = 10

pytestmark = pytest.mark.long


def numbers(folder: Path) -> dict[str, object]:
    """results.json without what says when it was made."""
    tree: dict[str, object] = json.loads((folder / "results.json").read_text())
    del tree["made"]
    return tree


def runs_of(folder: Path) -> list[int]:
    """The processes whose command names a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder / "runs") in (process / "cmdline").read_text():
                found.append(int(process.name))
    return found


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while runs_of(folder):
        assert time.monotonic() < deadline, "a run has outlived its study"
        time.sleep(0.1)


def test_killed_and_stopped_at_random_moments_a_study_ends_as_if_undisturbed(
    prepared: Prepared, tmp_path: Path
) -> None:
    tree = study_of(prepared)
    for phase in tree["phases"].values():
        phase["steps"] = 60
    file = write_study(tmp_path / "study.yaml", tree)
    whole = start("study", file, "--out", str(tmp_path / "whole"), "--jobs", "2")
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err

    draw = random.Random(0)
    status, rounds = None, 0
    while status != 0:
        process = start("study", file, "--out", str(tmp_path / "study"), "--jobs", "2")
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        if rounds < ROUNDS:
            time.sleep(draw.uniform(2.0, 9.0))
            process.send_signal(number)
        _, err = process.communicate(timeout=300)
        status = process.returncode
        # Before a study listens, while it imports, a signal ends it by itself; Ctrl-C as 130, through typer.
        assert status in (0, 75, -number, *([128 + number] if number == signal.SIGINT else [])), err
        if status == 75:
            assert not runs_of(tmp_path / "study")  # it has waited for them
        rounds += 1
        assert rounds <= ROUNDS + 1
    wait_until_gone(tmp_path / "study")
    assert numbers(tmp_path / "study") == numbers(tmp_path / "whole")
    for run in (tmp_path / "whole" / "runs").glob("*/*"):
        assert last_state(tmp_path / "study" / run.relative_to(tmp_path / "whole")) == last_state(run)


def test_runs_end_with_a_study_that_is_killed_and_have_saved(prepared: Prepared, tmp_path: Path) -> None:
    tree = study_of(prepared, seeds=[0])
    tree["phases"]["english"]["steps"] = 100_000
    tree["base"]["checkpoint"] = {"every_steps": None}
    file = write_study(tmp_path / "study.yaml", tree)
    process = start("study", file, "--out", str(tmp_path / "study"))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "study" / "runs").glob("*/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_until_gone(tmp_path / "study")
    assert list((tmp_path / "study" / "runs").glob("*/*/checkpoints/step-*"))
