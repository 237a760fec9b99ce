"""Who was at fault, worked out of the last words of ranks and of those that left none."""

import dataclasses
import time

import pytest

from megacl.attempts import Attempt, Words
from megacl.verdict import verdict

ATTEMPT = Attempt(
    number=2, job=None, restart=0, ranks=("n1", "n1", "n2", "n2"), step=5, started=0.0, time=0.0, first_step=None
)
LOST = Words(
    rank=0, node="n1", kind="lost_peer", message="gloo: Connection closed by peer", exit_status=1, step=8,
    doing="step 9", time=10.0,
)  # fmt: skip
HUNG = dataclasses.replace(
    LOST,
    kind="hung",
    message="nothing moved on",
    exit_status=76,
    silent=30.0,
    waiting=True,
    where="c10d.py:1 in all_reduce",
)


def of_rank(words: Words, rank: int, **changes: object) -> Words:
    return dataclasses.replace(words, rank=rank, node=ATTEMPT.ranks[rank], **changes)  # type: ignore[arg-type]


def test_an_error_of_one_rank_is_the_cause_though_its_peers_spoke_of_connections() -> None:
    failed = of_rank(LOST, 2, kind="failed", message="ValueError: no", time=11.0, where="base.py:7 in step")
    found = verdict(ATTEMPT, [of_rank(LOST, 0), of_rank(LOST, 1), failed, of_rank(LOST, 3)], 1)
    assert (found.outcome, found.rank, found.node, found.step) == ("failed", 2, "n2", 8)
    assert found.message == "rank 2 on n2, step 9: ValueError: no (base.py:7 in step)"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (137, "ranks 2, 3 on n2 died by SIGKILL, often for want of memory (step 9)"),
        (139, "ranks 2, 3 on n2 died by SIGSEGV (step 9)"),
        (None, "ranks 2, 3 on n2 died (step 9)"),
    ],
)
def test_ranks_without_words_are_those_that_died(status: int | None, words: str) -> None:
    found = verdict(ATTEMPT, [of_rank(LOST, 0), of_rank(LOST, 1)], status)
    assert (found.outcome, found.rank, found.nodes, found.message) == ("lost_rank", 2, ("n2",), words)
    assert found.exit_status == (status or 1)


def test_connections_that_break_between_living_ranks_name_nobody() -> None:
    found = verdict(ATTEMPT, [of_rank(LOST, rank) for rank in range(4)], 1)
    assert (found.outcome, found.rank, found.nodes) == ("lost_rank", None, ())
    assert "the connections between the ranks broke (step 9)" in found.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"waiting": False, "where": "train.py:3 in f"}, "did not move on for 30 s: step 9, at train.py:3 in f"),
        ({"stopped": 29.0}, "did not move on for 30 s, and stood still for 29 s of them: step 9"),
        ({"step": 7, "doing": "step 8"}, "did not move on for 30 s: step 8"),
    ],
)
def test_of_ranks_that_all_hang_the_one_that_does_not_wait_for_others_is_named(
    changes: dict[str, object], words: str
) -> None:
    found = verdict(ATTEMPT, [of_rank(HUNG, rank, **(changes if rank == 3 else {})) for rank in range(4)], 76)
    assert (found.outcome, found.exit_status, found.rank, found.node) == ("hung", 76, 3, "n2")
    assert found.step == changes.get("step", 8)
    assert found.message.startswith(f"rank 3 on n2 {words}")
    assert found.message.endswith("stacks: attempts/0002/stacks-*.txt")


def test_a_rank_that_is_silent_while_others_hang_is_named() -> None:
    found = verdict(ATTEMPT, [of_rank(HUNG, rank) for rank in (0, 1, 3)], 76)
    assert (found.rank, found.node) == (2, "n2")
    assert "left no word in 30 s: stopped, or its node is gone; the others: step 9" in found.message


def test_a_rank_that_others_miss_is_named_and_not_those_that_had_no_time_for_words() -> None:
    found = verdict(ATTEMPT, [of_rank(HUNG, 0, missed=(2,), silent=450.0, waiting=True)], 76)
    assert (found.outcome, found.rank, found.nodes) == ("hung", 2, ("n2",))
    assert found.message.startswith("rank 2 on n2 gave no sign of life for 450 s: stopped, or its node is gone")


def test_ranks_that_all_wait_for_one_another_cannot_be_told_apart() -> None:
    found = verdict(ATTEMPT, [of_rank(HUNG, rank) for rank in range(4)], 76)
    assert (found.outcome, found.rank) == ("hung", None)
    assert "none can be told from the others" in found.message


@pytest.mark.parametrize(
    ("status", "outcome", "exit_status"),
    [
        (0, "done", 0),
        (75, "stopped", 75),
        (138, "stopped", 75),
        (2, "wrong_input", 2),
        (1, "failed", 1),
        (143, "lost_rank", 143),
    ],
)
def test_where_nobody_says_a_word_the_status_does(status: int, outcome: str, exit_status: int) -> None:
    found = verdict(ATTEMPT, [], status)
    assert (found.outcome, found.exit_status, found.step, found.attempt) == (outcome, exit_status, 5, 2)
    assert found.time <= time.time()
