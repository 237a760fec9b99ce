"""How an attempt ended, worked out of the last words of its ranks, of who left none, and of the launcher's status.

A rank that has lost another one is not at fault, and what it says counts only where nobody says more. Then the silent
ranks are: one that was killed leaves no words. Of ranks that all hang, the one at fault is the one that does not wait
for others: it says nothing at all, or it stood still, or it is busy with something of its own, or it is behind.
"""

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from megacl.attempts import Attempt, Outcome, Result, Words, read_outcome, read_words, write_outcome
from megacl.errors import StoppedError

HUNG = 76
"""The exit status of a rank on which nothing moved on."""
STOPPED = StoppedError.exit_status
_EARLY_USR1 = 128 + signal.SIGUSR1
"""Of a command that the signal found before it listened: it had done nothing yet that could be lost."""
_NAMED = 8
"""Ranks that a message names; of more, it says how many."""


def conclude(run_dir: Path, attempt: Attempt, status: int | None = None) -> Outcome:
    """Works out how an attempt ended, and records it. status: the launcher's, where it has ended.

    What rank 0 recorded of an end on all ranks alike stays. Raises DataError where the disk refuses.
    """
    known = read_outcome(run_dir, attempt.number)
    if known is not None and known.outcome in ("done", "stopped"):
        return known
    outcome = verdict(attempt, read_words(run_dir, attempt.number), status)
    write_outcome(run_dir, outcome)
    return outcome


def verdict(attempt: Attempt, words: Sequence[Words], status: int | None) -> Outcome:
    """How an attempt ended. words: of those ranks that left some. status: the launcher's, if it is known."""
    causes = sorted((each for each in words if each.kind != "lost_peer"), key=lambda each: each.time)
    if causes and causes[0].kind == "hung":
        return _hung(attempt, words, [each for each in causes if each.kind == "hung"])
    if causes:
        return _said(attempt, causes[0])
    if words:
        return _lost(attempt, words, status)
    return _unsaid(attempt, status)


def _said(attempt: Attempt, words: Words) -> Outcome:
    """A rank says why."""
    assert words.kind != "lost_peer"
    where = f"rank {words.rank} on {words.node}, {words.doing}: " if words.kind == "failed" else ""
    at = f" ({words.where})" if words.kind == "failed" and words.where else ""
    return _outcome(
        attempt,
        words.kind,
        words.exit_status,
        f"{where}{words.message}{at}",
        step=words.step,
        # What says that data cannot be reached names the node; rank 0 may speak for another one.
        ranks=[] if words.kind == "unreachable" else [words.rank],
        nodes=words.nodes,
    )


def _hung(attempt: Attempt, words: Sequence[Words], hung: Sequence[Words]) -> Outcome:
    step, seconds = min(each.step for each in hung), max(each.silent for each in hung)
    silent, missed = _silent(attempt, words), sorted({rank for each in hung for rank in each.missed})
    others = next((each.doing for each in hung if each.waiting), hung[0].doing)
    stopped = [each for each in hung if each.stopped > each.silent / 2]
    busy = [each for each in hung if not each.waiting]
    behind = [each for each in hung if each.step == step]
    gone = "stopped, or its node is gone"
    if missed:
        ranks, what = missed, f"gave no sign of life for {seconds:.0f} s: {gone}; the others: {others}"
    elif silent:
        ranks, what = silent, f"left no word in {seconds:.0f} s: {gone}; the others: {others}"
    elif culprits := next((found for found in (stopped, busy, behind) if 0 < len(found) < len(attempt.ranks)), None):
        ranks, first = [each.rank for each in culprits], culprits[0]
        still = f", and stood still for {first.stopped:.0f} s of them" if culprits is stopped else ""
        what = f"did not move on for {first.silent:.0f} s{still}: {first.doing}, at {first.where}"
    elif len(hung) == 1:
        ranks, what = [hung[0].rank], f"did not move on for {seconds:.0f} s: {hung[0].doing}, at {hung[0].where}"
    else:
        message = f"no rank moved on for {seconds:.0f} s ({others}), and none can be told from the others"
        return _outcome(attempt, "hung", HUNG, f"{message}; {_stacks(attempt)}", step=step)
    return _outcome(
        attempt, "hung", HUNG, f"{_names(attempt, ranks)} {what}; {_stacks(attempt)}", step=step, ranks=ranks
    )


def _lost(attempt: Attempt, words: Sequence[Words], status: int | None) -> Outcome:
    """Ranks have lost others, and nobody says why."""
    first, step = words[0], max(each.step for each in words)
    silent = _silent(attempt, words)
    died = status if status is not None and status > 128 else 1
    if not silent:
        message = f"the connections between the ranks broke ({first.doing}): {first.message}"
        return _outcome(attempt, "lost_rank", died, message, step=step)
    if "Timed out" in first.message and status in (None, HUNG, 1):
        message = f"{_names(attempt, silent)} did not answer ({first.doing}): {first.message}"
    else:
        message = f"{_names(attempt, silent)} died{_by(status)} ({first.doing})"
    return _outcome(attempt, "lost_rank", died, message, step=step, ranks=silent)


def _unsaid(attempt: Attempt, status: int | None) -> Outcome:
    """No rank has left a word."""
    if status == 0:
        return _outcome(attempt, "done", 0, "the command ended well")
    if status in (STOPPED, _EARLY_USR1):
        return _outcome(attempt, "stopped", STOPPED, "told to stop before training began")
    if status == 2:
        return _outcome(attempt, "wrong_input", 2, "the command refused its input; its line stands in the log")
    ranks = [0] if len(attempt.ranks) == 1 else []
    who = "the rank" if ranks else "all ranks"
    if status is None or status > 128:
        message = f"{who} died{_by(status)}, without a word"
        return _outcome(attempt, "lost_rank", status or 1, message, ranks=ranks)
    return _outcome(attempt, "failed", status, f"the command ended with status {status}; the log says why")


def _silent(attempt: Attempt, words: Sequence[Words]) -> list[int]:
    spoken = {each.rank for each in words}
    return [rank for rank in range(len(attempt.ranks)) if rank not in spoken]


def _by(status: int | None) -> str:
    """The signal that an exit status tells of."""
    if status is None or status <= 128:
        return ""
    try:
        name = signal.Signals(status - 128).name
    except ValueError:
        return f" with status {status}"
    return f" by {name}" + (", often for want of memory" if name == "SIGKILL" else "")


def _names(attempt: Attempt, ranks: Sequence[int]) -> str:
    """`rank 3 on n2`, `ranks 2, 3 on n2`."""
    nodes = list(dict.fromkeys(str(attempt.where(rank)) for rank in ranks))
    numbers = ", ".join(map(str, ranks[:_NAMED])) + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")
    where = ", ".join(nodes[:_NAMED]) + (f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {numbers} on {where}"


def _stacks(attempt: Attempt) -> str:
    return f"stacks: attempts/{attempt.number:04d}/stacks-*.txt"


def _outcome(
    attempt: Attempt,
    outcome: Result,
    status: int,
    message: str,
    *,
    step: int | None = None,
    ranks: Sequence[int] = (),
    nodes: Sequence[str] = (),
) -> Outcome:
    at_fault = list(nodes) or list(dict.fromkeys(node for rank in ranks if (node := attempt.where(rank))))
    return Outcome(
        outcome=outcome,
        exit_status=status,
        step=attempt.step if step is None else step,
        message=message,
        rank=ranks[0] if ranks else None,
        node=at_fault[0] if at_fault else None,
        nodes=tuple(at_fault),
        attempt=attempt.number,
        job=attempt.job,
        time=time.time(),
    )
