"""What follows on the end of an attempt: no job goes on for ever without progress, and with it any may."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import command_line

from megacl.attempts import (
    Attempt,
    Outcome,
    Words,
    begin_attempt,
    read_attempts,
    read_outcome,
    write_outcome,
    write_words,
)
from megacl.slurm.restarts import Decision, Ended, decide

STATUS = {"done": 0, "stopped": 75, "wrong_input": 2, "fenced": 2, "unhealthy": 2, "no_rendezvous": 2, "hung": 76}
FAILURES = ["lost_rank", "hung", "no_rendezvous", "unhealthy", "unreachable", "failed"]


def outcome(
    kind: str, step: int | None = 0, message: str = "why", nodes: tuple[str, ...] = (), **more: object
) -> Outcome:
    status = STATUS.get(kind, 1)
    return Outcome(outcome=kind, exit_status=status, step=step, message=message, nodes=nodes, **more)  # type: ignore[arg-type]


def next_of(*attempts: tuple[int, Outcome], saved: int, max_restarts: int = 5, nodes: int = 2) -> Decision:
    return decide([Ended(*each) for each in attempts], saved=saved, max_restarts=max_restarts, nodes=nodes)


@pytest.mark.parametrize(
    ("kind", "words"), [("done", "end 0"), ("wrong_input", "end 2"), ("fenced", "end 2"), ("diverged", "end 1")]
)
def test_what_no_restart_can_help_ends_the_job_with_its_status(kind: str, words: str) -> None:
    assert str(next_of((0, outcome(kind, 7)), saved=5)) == words


def test_the_waits_double_up_to_ten_minutes_and_begin_anew_with_progress() -> None:
    attempts: list[tuple[int, Outcome]] = []
    waits = []
    for failure in range(7):
        attempts.append((0, outcome("failed", failure)))
        waits.append(str(next_of(*attempts, saved=0, max_restarts=7)))
    assert waits == ["again 30", "again 60", "again 120", "again 240", "again 480", "again 600", "again 600"]
    assert str(next_of(*attempts, (0, outcome("failed", 8)), saved=0, max_restarts=7)) == "end 1"
    assert str(next_of(*attempts, (0, outcome("failed", 8)), saved=3, max_restarts=7)) == "again 30"


def test_the_same_failure_at_the_same_step_twice_ends_the_job_and_says_why() -> None:
    first = outcome("lost_rank", 17, "rank 1 on n1 died by SIGKILL", ("n1",))
    second = dataclasses.replace(first, message="rank 3 on n2 died by SIGKILL", nodes=("n2",))
    decision = next_of((10, first), (10, second), saved=10)
    assert str(decision) == "end 1"
    assert decision.why == "the same failure at the same step twice, step 17: rank 3 on n2 died by SIGKILL"
    assert str(next_of((10, first), (10, dataclasses.replace(second, step=18)), saved=10)) == "again 60"
    assert str(next_of((10, first), (10, outcome("stopped", 12)), (10, second), saved=10)) == "end 1"
    other = outcome("failed", 17, "ValueError: no")
    assert str(next_of((10, first), (10, other), saved=10)) == "again 60"
    lost = outcome("lost_rank", None, "the job was ended from outside, or lost a node")
    assert str(next_of((10, lost), (10, lost), saved=10)) == "again 60"


def test_a_store_that_gives_nothing_is_tried_again_as_often_as_there_are_restarts() -> None:
    gone = outcome("unreachable", 17, "reading source 'web': the store cannot be read, tried for 120 s")
    attempts: list[tuple[int, Outcome]] = []
    decisions = []
    for _ in range(4):
        attempts.append((17, gone))
        decisions.append(str(next_of(*attempts, saved=17, max_restarts=3)))
    assert decisions == ["again 30", "again 60", "again 120", "end 1"]


def test_a_node_that_is_unhealthy_or_lost_ranks_twice_is_left_out() -> None:
    assert str(next_of((0, outcome("unhealthy", 0, nodes=("n2", "n3"))), saved=0, nodes=4)) == "requeue 30 n2,n3"
    lost = outcome("lost_rank", 3, "rank 1 on n2 died", ("n2",))
    later = dataclasses.replace(lost, step=9)
    assert str(next_of((0, lost), (5, later), saved=5)) == "requeue 30 n2"
    assert str(next_of((0, lost), (5, later), saved=5, nodes=1)) == "again 30"
    assert str(next_of((0, lost), (5, dataclasses.replace(later, nodes=("n1",))), saved=5)) == "again 30"


def test_a_job_that_is_stopped_goes_on_unless_it_never_saves_a_step() -> None:
    stopped = outcome("stopped", 5)
    assert str(next_of((0, stopped), saved=0)) == "requeue 0"
    assert str(next_of((0, stopped), (0, stopped), saved=0)) == "requeue 0"
    decision = next_of((0, stopped), (0, stopped), (0, stopped), saved=0)
    assert str(decision) == "end 75"
    assert "each stretch is too short" in decision.why
    assert str(next_of((0, stopped), (0, stopped), (0, stopped), saved=1)) == "requeue 0"


@settings(max_examples=60)
@given(
    ends=st.lists(
        st.tuples(
            st.sampled_from([*FAILURES, "stopped"]),
            st.integers(0, 99),
            st.sampled_from(["n1", "n2", "n3"]),
            st.sampled_from("ab1"),
        ),
        min_size=9,
        max_size=20,
    ),
    max_restarts=st.integers(0, 5),
    progress=st.integers(0, 8),
)
def test_no_sequence_of_attempts_without_progress_goes_on_for_ever(
    ends: list[tuple[str, int, str, str]], max_restarts: int, progress: int
) -> None:
    """From any point on: with no step saved any more, a job ends within its restarts and two stops."""
    attempts: list[tuple[int, Outcome]] = []
    for index, (kind, step, node, message) in enumerate(ends):
        saved = min(index, progress)
        attempts.append((saved, outcome(kind, step, message, (node,))))
        decision = next_of(*attempts, saved=min(index + 1, progress), max_restarts=max_restarts, nodes=3)
        assert decision.wait <= 600
        if decision.action == "end":
            assert decision.why
            assert decision.status != 0
            break
        assert index - progress < max_restarts + 3


@settings(max_examples=20)
@given(steps=st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_a_job_that_saves_between_its_failures_goes_on_as_long_as_it_likes(steps: list[int]) -> None:
    saved, attempts = 0, []
    for advance in steps:
        attempts.append((saved, outcome("failed", saved + advance)))
        saved += advance
        assert str(next_of(*attempts, saved=saved, max_restarts=1)) == "again 30"


def begin(run_dir: Path, ranks: tuple[str, ...] = ("n1", "n2"), step: int = 0) -> Attempt:
    return begin_attempt(run_dir, ranks=ranks, step=step, started=time.time())


def job_end(capsys: pytest.CaptureFixture[str], run_dir: Path, status: int, since: float) -> tuple[str, str]:
    """What `megacl job-end` prints, and why."""
    arguments = ["--status", str(status), "--since", str(since), "--max-restarts", "3"]
    code, out, err = command_line(capsys, "job-end", str(run_dir), *arguments)
    assert code == 0, err
    return out.strip(), err.strip()


def test_job_end_names_the_rank_that_left_no_word_and_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    since = time.time()
    attempt = begin(tmp_path)
    lost = Words(
        rank=0, node="n1", kind="lost_peer", message="Connection closed by peer", exit_status=1, step=6, doing="step 7",
        time=time.time(),
    )  # fmt: skip
    write_words(tmp_path, attempt.number, lost)
    assert job_end(capsys, tmp_path, 137, since) == (
        "again 30",
        "lost_rank: failure 1 without a new step saved, of 3 that may be: "
        "rank 1 on n2 died by SIGKILL, often for want of memory (step 7)",
    )
    found = read_outcome(tmp_path)
    assert found is not None
    assert (found.outcome, found.exit_status, found.step, found.rank, found.node) == ("lost_rank", 137, 6, 1, "n2")
    assert (found.attempt, found.job) == (1, "5")


def test_job_end_reads_the_step_of_a_rank_that_was_alone_from_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    for _ in range(2):
        since = time.time()
        begin(tmp_path, ("n1",))
        (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 4}\n{"kind": "evaluation", "step": 4}\n{"ki')
        said = job_end(capsys, tmp_path, 137, since)
    assert said[0] == "end 137"
    assert "the same failure at the same step twice, step 4: the rank died by SIGKILL" in said[1]


def test_ranks_that_end_before_they_hold_the_run_count_as_an_attempt_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    first = begin(tmp_path)
    write_outcome(tmp_path, outcome("done", 9, attempt=first.number, job="4", time=time.time()))
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    since = time.time() + 10  # behind the first attempt, by more than the slack
    said = outcome("no_rendezvous", None, "rank 1 of 2 is missing, on n2", ("n2",), job="5", time=since + 1)
    write_outcome(tmp_path, said)
    assert job_end(capsys, tmp_path, 2, since)[0] == "again 30"
    assert job_end(capsys, tmp_path, 1, since + 20)[0] == "again 60"
    assert [attempt.ranks for attempt in read_attempts(tmp_path)] == [("n1", "n2"), (), ()]
    second, third = read_outcome(tmp_path, 2), read_outcome(tmp_path, 3)
    assert second is not None
    assert third is not None
    assert (second.outcome, second.nodes, second.attempt) == ("no_rendezvous", ("n2",), 2)
    assert (third.outcome, third.message) == ("failed", "the command ended with status 1; the log says why")
    assert read_outcome(tmp_path) == third


def test_what_rank_0_said_of_an_end_on_all_ranks_stands_whatever_srun_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    since = time.time()
    stopped = outcome("stopped", 3, attempt=begin(tmp_path).number, job="5", time=time.time())
    write_outcome(tmp_path, stopped)
    assert job_end(capsys, tmp_path, 1, since)[0] == "requeue 0"  # as torchrun says it
    assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == "stopped"


def test_attempts_of_earlier_jobs_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in ("5", "6"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        since = time.time()
        begin(tmp_path)
        assert job_end(capsys, tmp_path, 1, since)[0] == "again 30"
