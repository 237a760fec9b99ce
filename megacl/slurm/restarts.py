"""What follows on the end of an attempt: the job ends, the ranks start again where it is, or SLURM is to requeue it.

    decision = decide(attempts, saved=1200, max_restarts=5, nodes=4)
    print(decision)                 # "end 2", "again 60", "requeue 30 node7"

A pure function of the attempts so far. Progress is a step that was saved: where none was since the attempt before, a
failure counts towards the limit, and the wait doubles. A job that makes no progress ends, whatever its ranks die of.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megacl.attempts import Outcome

LONGEST_WAIT = 600
"""Seconds before a restart, at most."""
_STOPS = 3
"""Stretches without a saved step after which a job that is only stopped gives up."""
_MEMORY = 5
"""Failures back, within which a node that lost ranks is remembered."""
_OF_NODES = ("lost_rank", "hung", "no_rendezvous")
"""What a node may be the cause of."""
_FINAL = ("done", "wrong_input", "fenced", "diverged")


@dataclass(frozen=True)
class Ended:
    """An attempt that has ended."""

    began: int
    """The step at which it began."""
    outcome: Outcome


@dataclass(frozen=True)
class Decision:
    """What the job script does next. As text it is one line of words."""

    action: Literal["end", "again", "requeue"]
    status: int
    """With which the job ends, if it does."""
    wait: int
    """Seconds before the ranks start again, or before the requeue."""
    without: tuple[str, ...]
    """Nodes that the requeued job is to keep away from."""
    why: str

    def __str__(self) -> str:
        if self.action == "end":
            return f"end {self.status}"
        return " ".join([self.action, str(self.wait), *([",".join(self.without)] if self.without else [])])


def decide(attempts: Sequence[Ended], *, saved: int, max_restarts: int, nodes: int, first_wait: int = 30) -> Decision:
    """What follows on the last of the attempts, of which there is at least one.

    saved: the step of the newest checkpoint now. max_restarts: restarts in a row without progress. nodes: of the job.
    first_wait: seconds before the first restart without progress; they double with each.
    """
    last = attempts[-1].outcome
    if last.outcome in _FINAL:
        return _end(last, last.message)
    idle = _without_progress(attempts, saved)
    if last.outcome == "stopped":
        stops = sum(each.outcome.outcome == "stopped" for each in idle)
        if stops >= _STOPS:
            return _end(last, f"stopped {stops} times without a new step saved: each stretch is too short to save one")
        return Decision("requeue", last.exit_status, 0, (), "told to stop: goes on when SLURM starts it again")
    failures = max(1, sum(each.outcome.outcome != "stopped" for each in idle))
    before = [each.outcome for each in attempts[:-1] if each.outcome.outcome != "stopped"]
    if before and _same(before[-1], last):
        return _end(last, f"the same failure at the same step twice, step {last.step}: {last.message}")
    if failures > max_restarts:
        return _end(last, f"{failures} failures in a row without a new step saved; at last: {last.message}")
    wait = min(first_wait * 2 ** (failures - 1), LONGEST_WAIT)
    said = f"failure {failures} without a new step saved, of {max_restarts} that may be: {last.message}"
    if without := _bad_nodes(last, before, nodes):
        return Decision("requeue", last.exit_status, wait, without, f"{said}; without {', '.join(without)}")
    return Decision("again", last.exit_status, wait, (), said)


def _end(last: Outcome, why: str) -> Decision:
    return Decision("end", last.exit_status, 0, (), why)


def _without_progress(attempts: Sequence[Ended], saved: int) -> Sequence[Ended]:
    """The attempts at the end of the list during which no new step was saved."""
    reached = [*(each.began for each in attempts[1:]), saved]
    count = 0
    while count < len(attempts) and reached[-1 - count] <= attempts[-1 - count].began:
        count += 1
    return attempts[len(attempts) - count :]


def _same(one: Outcome, other: Outcome) -> bool:
    """Whether two failures are one and the same: a program's, which will come again. Networks, nodes and stores may
    recover."""
    if one.outcome != other.outcome or one.outcome in ("unhealthy", "no_rendezvous", "unreachable"):
        return False
    return one.step is not None and one.step == other.step and _normalised(one) == _normalised(other)


def _normalised(outcome: Outcome) -> str:
    """The message without what differs from time to time: nodes and numbers."""
    text = outcome.message
    for node in outcome.nodes:
        text = text.replace(node, "NODE")
    return re.sub(r"\d+(\.\d+)?", "#", text)


def _bad_nodes(last: Outcome, before: Sequence[Outcome], nodes: int) -> tuple[str, ...]:
    """Nodes to leave out: those that failed their check, and one of several that was at fault twice."""
    if last.outcome == "unhealthy":
        return last.nodes
    if last.outcome not in _OF_NODES or not 0 < len(last.nodes) < nodes:
        return ()
    earlier = {node for each in before[-_MEMORY:] if each.outcome in _OF_NODES for node in each.nodes}
    return tuple(node for node in last.nodes if node in earlier)
