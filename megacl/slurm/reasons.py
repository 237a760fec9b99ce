"""Why a job waits, in words: `explain("QOSMaxGRESPerUser")`.

SLURM's own list is in `man squeue`, JOB REASON CODES; the words are of version 22.05, and later ones add to them.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """Why a job waits, and what can be done."""

    why: str
    do: str | None = None
    """None where there is nothing to do but wait."""
    never: bool = False
    """Whether it waits for ever unless something is done."""
    nodes: bool = False
    """Whether nodes are missing, so that it could go on with fewer."""


_SHORTER = "a shorter cluster.time or fewer nodes may let it in earlier"
_AGAIN = "cancel it, and submit again with less"

_KNOWN: dict[str, Explanation] = {
    "None": Explanation("SLURM has not looked at it yet"),
    "Priority": Explanation("jobs of a higher priority are before it", _SHORTER),
    "Resources": Explanation("it is the next, as soon as enough nodes are free", _SHORTER),
    "Dependency": Explanation("it waits for other jobs to end"),
    "DependencyNeverSatisfied": Explanation(
        "a job that it waits for has failed or was cancelled", "cancel it, and submit again", never=True
    ),
    "BeginTime": Explanation("it may begin only later: SLURM pauses before it starts a requeued job anew"),
    "JobHeldUser": Explanation("somebody holds it", "scontrol release {job}", never=True),
    "JobHeldAdmin": Explanation("an administrator holds it", "ask the cluster's administrators", never=True),
    "JobArrayTaskLimit": Explanation("as many tasks of its array run as it allows at a time"),
    "ReqNodeNotAvail": Explanation("nodes that it needs are down, drained or reserved", nodes=True),
    "PartitionDown": Explanation("its partition starts no jobs now"),
    "PartitionInactive": Explanation("its partition takes no jobs", "submit to another cluster.partition", never=True),
    "PartitionNodeLimit": Explanation("it asks for more nodes than its partition allows", _AGAIN, never=True),
    "PartitionTimeLimit": Explanation("it asks for more time than its partition allows", _AGAIN, never=True),
    "BadConstraints": Explanation("no nodes have all that it asks for", _AGAIN, never=True),
    "NodeDown": Explanation("a node that it needs is down", nodes=True),
    "Reservation": Explanation("its reservation has not begun"),
    "ReservationDeleted": Explanation("its reservation is gone", "cancel it, and submit again", never=True),
    "Licenses": Explanation("licences that it asks for are in use"),
    "InvalidAccount": Explanation("its account is not known", "submit with another cluster.account", never=True),
    "InvalidQOS": Explanation("its QOS is not known", "submit with another cluster.qos", never=True),
    "Cleaning": Explanation("its last start is being cleaned up"),
    "Prolog": Explanation("its nodes are being prepared"),
}
_LIMIT = re.compile(r"(?P<whose>QOS|Assoc|Max|Association|Grp)(?P<what>[A-Z]\w*)")
_OWN_LIMIT = re.compile(r"PerJob|PerNode|WallDuration|MinCpuNotSatisfied|MinGRES|MinMemory|UsageThreshold")
"""Limits of a single job's size: other jobs' ends do not help."""


def explain(reason: str) -> Explanation:
    """What squeue's reason means; one that is not known is given as it is."""
    if "DOWN" in reason and "DRAINED" in reason:
        reason = "ReqNodeNotAvail"
    code, _, more = reason.partition(",")
    if found := _KNOWN.get(code.strip()):
        named = more.strip().removeprefix("UnavailableNodes:")
        return Explanation(f"{found.why} ({named})", found.do, found.never, found.nodes) if named else found
    if code.startswith(("launch failed", "job requeued in held state")):
        return Explanation(f"SLURM could not start it, and holds it ({reason})", "scontrol release {job}", never=True)
    if limit := _LIMIT.fullmatch(code):
        whose = "its QOS" if limit["whose"] == "QOS" else "its account"
        if "Minutes" in code or "Billing" in code:
            return Explanation(f"the time that {whose} has to spend is used up ({code})", "ask who grants it")
        if _OWN_LIMIT.search(code):
            return Explanation(f"it asks for more than {whose} allows a job ({code})", _AGAIN, never=True)
        return Explanation(f"jobs that run have reached a limit of {whose} ({code}); it starts when some end")
    return Explanation(f"SLURM says {reason}; see man squeue")
