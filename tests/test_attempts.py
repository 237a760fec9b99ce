"""The files that say how a run's ranks were started, and how that ended."""

import dataclasses
import time
from pathlib import Path

import pytest

from megacl.attempts import (
    Attempt,
    Outcome,
    Words,
    attempt_folder,
    begin_attempt,
    note_first_step,
    read_attempts,
    read_outcome,
    read_words,
    write_outcome,
    write_words,
)
from megacl.errors import CheckpointError, DataError

RANKS = ("n1", "n1", "n2", "n2")


def begin(run_dir: Path, step: int = 0) -> Attempt:
    return begin_attempt(run_dir, ranks=RANKS, step=step, started=time.time())


def test_attempts_are_numbered_and_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    first = begin(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    second = note_first_step(tmp_path, begin(tmp_path, step=5))
    assert read_attempts(tmp_path) == [first, second]
    assert (first.number, first.job, first.restart) == (1, None, 0)
    assert (second.number, second.job, second.restart) == (2, "17", 2)
    assert second.nodes == ("n1", "n2")
    assert (second.where(3), second.where(4)) == ("n2", None)
    assert first.first_step is None
    assert second.first_step is not None
    assert second.first_step >= second.time


def test_a_run_has_no_outcome_while_an_attempt_is_under_way(tmp_path: Path) -> None:
    attempt = begin(tmp_path)
    assert read_outcome(tmp_path) is None
    stopped = Outcome(outcome="stopped", exit_status=75, step=3, message="told to stop", attempt=attempt.number)
    write_outcome(tmp_path, stopped)
    assert read_outcome(tmp_path) == stopped
    begin(tmp_path, step=3)
    assert read_outcome(tmp_path) is None
    assert read_outcome(tmp_path, attempt.number) == stopped


def test_what_an_earlier_attempt_says_late_is_its_own_end_and_not_the_runs(tmp_path: Path) -> None:
    earlier, later = begin(tmp_path), begin(tmp_path)
    done = Outcome(outcome="done", exit_status=0, step=9, message="done", attempt=later.number)
    write_outcome(tmp_path, done)
    late = Outcome(outcome="fenced", exit_status=2, step=4, message="fenced", attempt=earlier.number)
    write_outcome(tmp_path, late)
    assert read_outcome(tmp_path) == done
    assert read_outcome(tmp_path, earlier.number) == late


def test_the_last_words_of_ranks_are_read_by_rank_and_torn_ones_are_passed_over(tmp_path: Path) -> None:
    attempt = begin(tmp_path)
    words = Words(
        rank=11, node="n2", kind="failed", message="ValueError: no", exit_status=1, step=4, doing="step 5", time=2.0
    )
    third = dataclasses.replace(words, rank=3, nodes=("n2",), stopped=1.5)
    for each in (words, third):
        write_words(tmp_path, attempt.number, each)
    (attempt_folder(tmp_path, attempt.number) / "rank-2.json").write_text('{"rank": 2, "no')
    assert read_words(tmp_path, attempt.number) == [third, words]


def test_a_disk_that_takes_no_attempt_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("no folder")  # refused to root too
    with pytest.raises(DataError, match="attempts/0001: cannot write an attempt's files"):
        write_outcome(tmp_path, Outcome(outcome="done", exit_status=0, step=9, message="done", attempt=1))
    (tmp_path / "outcome.json").mkdir()
    with pytest.raises(DataError, match=r"outcome.json: cannot write that the run is under way"):
        begin(tmp_path)


def test_a_damaged_outcome_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"outcome.json: cannot be read; delete it"):
        read_outcome(tmp_path)
