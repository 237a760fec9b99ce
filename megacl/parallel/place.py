"""Where a process stands among the ranks of a run, as whoever started it says: torchrun, srun, or a hand.

place = find_place(os.environ)             # of one rank among several; None where there is just one
node_of_ranks(place)                       # ["node1", "node1", "node2", "node2"], as SLURM has dealt them
described_ranks([2, 3], node_of_ranks(place))   # "ranks 2-3 (node2)"
"""

import datetime
import itertools
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megacl.errors import LaunchError
from megacl.holders import node_here

_LISTED = 8
"""How many groups of ranks a message names."""


class Agent:
    """torchrun's agent, whose store says where rank 0 listens. It has an address that all ranks know."""

    def __init__(self, address: str, port: int, attempt: str) -> None:
        self._address, self._port, self._key = address, port, f"megacl/rank-0/{attempt}"
        self._store: Any = None

    def announce(self, port: int) -> None:
        """Says at which port rank 0 listens. LaunchError where the agent is not there."""
        self._connected().set(self._key, str(port))

    def port_of_rank_0(self, seconds: float) -> int | None:
        """Where rank 0 listens, None where it has not said so within some seconds."""
        store = self._connected()
        try:
            store.wait([self._key], datetime.timedelta(seconds=max(0.1, seconds)))
            return int(store.get(self._key))
        except RuntimeError:
            return None

    def _connected(self) -> Any:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        if self._store is None:
            try:
                self._store = TCPStore(
                    self._address,
                    self._port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=datetime.timedelta(seconds=60),
                )
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise LaunchError(
                    f"torchrun's store at {self._address}:{self._port} does not answer: {reason}; start the run again."
                ) from None
        return self._store


@dataclass(frozen=True)
class Place:
    """One rank among several."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    """Host of rank 0."""
    port: int
    """Where rank 0 listens, or torchrun's agent."""
    identity: str
    """Of this start of the ranks: alike on all of them."""
    identified: bool
    """Whether no other start has this identity."""
    node: str
    """This rank's node, by its name in SLURM."""
    nodes: str = ""
    """SLURM's list of the nodes, "node[1-2]"; empty without SLURM."""
    tasks: str = ""
    """SLURM's counts of tasks on them, "2(x2)"."""
    distribution: str = ""
    """How SLURM has dealt the ranks to the nodes, "block"."""
    agent: Agent | None = field(default=None, compare=False)


def find_place(environment: Mapping[str, str]) -> Place | None:
    """This process's place, from the variables of whoever started it; None where it is alone.

    Raises LaunchError where some are missing, or where SLURM does not say which host is rank 0's.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return None if environment["WORLD_SIZE"] == "1" else _given(environment)
    # A batch script has SLURM_PROCID too, but only the tasks of a step have a step's id.
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        return _of_srun(environment)
    return None


def _given(environment: Mapping[str, str]) -> Place:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment]
    if missing:
        raise LaunchError(f"{', '.join(missing)} not set beside RANK and WORLD_SIZE; start the run with torchrun.")
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    identity, agent = f"{address}:{port}", None
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        identity = f"torchrun's run {environment.get('TORCHELASTIC_RUN_ID', 'none')}, attempt {attempt}, at {identity}"
        agent = Agent(address, port, attempt)
    return Place(
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        local_rank=int(environment["LOCAL_RANK"]),
        address=address,
        port=port,
        identity=identity,
        identified=agent is not None,
        node=node_here(environment),
        agent=agent,
    )


def _of_srun(environment: Mapping[str, str]) -> Place:
    job, step = environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"]
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    return Place(
        rank=int(environment["SLURM_PROCID"]),
        world_size=int(environment["SLURM_NTASKS"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        address=environment.get("MASTER_ADDR") or _first_host(nodes),
        # Below the ephemeral ports, and another one for each job on a node.
        port=int(environment.get("MASTER_PORT") or 10000 + int(job) * 7 % 20000),
        identity=f"job {job}, restart {restart}, step {step}",
        identified=True,
        node=node_here(environment),
        nodes=nodes,
        tasks=environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", ""),
        distribution=environment.get("SLURM_DISTRIBUTION", "block"),
    )


def hosts_of(nodes: str) -> list[str]:
    """The hosts of SLURM's list; OSError, SubprocessError where scontrol does not say."""
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
    )
    return listed.stdout.split()


def _first_host(nodes: str) -> str:
    """The node of rank 0."""
    try:
        return hosts_of(nodes)[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise LaunchError(
            f"scontrol cannot list the hosts of {nodes!r} ({error}); set MASTER_ADDR to the host of rank 0."
        ) from None


# ---------------------------------------------------------------------------------------------- who is where


def node_of_ranks(place: Place) -> list[str | None]:
    """The node of each rank as SLURM has dealt them, [world_size]; None where it does not say."""
    hosts = _known_hosts(place)
    counts = counts_of(place.tasks)
    dealt = place.distribution.split(":")[0].split(",")[0].lower()
    if len(counts) != len(hosts) or sum(counts) != place.world_size or dealt not in ("block", "cyclic"):
        return [None] * place.world_size
    if dealt == "block":
        return [host for host, count in zip(hosts, counts, strict=True) for _ in range(count)]
    rounds = range(max(counts))
    return [host for each in rounds for host, count in zip(hosts, counts, strict=True) if each < count]


def nodes_without(place: Place, missing: Sequence[int], present: Iterable[str]) -> list[str]:
    """The nodes of missing ranks; where it is not known who is where, those of which no rank is present."""
    where = node_of_ranks(place)
    known = {node for rank in missing if (node := where[rank]) is not None}
    return sorted(known or set(_known_hosts(place)) - set(present))


def described_ranks(ranks: Sequence[int], nodes: Sequence[str | None]) -> str:
    """Ranks and their nodes in a few words: "ranks 2-3 (node2), rank 7 (node4)". nodes: [ranks of the run]."""
    groups = []
    for node, members in itertools.groupby(sorted(ranks), key=lambda rank: nodes[rank] if rank < len(nodes) else None):
        for run in _in_a_row(list(members)):
            word = f"rank {run[0]}" if len(run) == 1 else f"ranks {run[0]}-{run[-1]}"
            groups.append(f"{word} ({node})" if node else word)
    more = f" and {len(groups) - _LISTED} more" if len(groups) > _LISTED else ""
    return ", ".join(groups[:_LISTED]) + more


def _in_a_row(ranks: list[int]) -> list[list[int]]:
    rows = itertools.groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])
    return [[rank for _, rank in row] for _, row in rows]


def _known_hosts(place: Place) -> list[str]:
    if not place.nodes:
        return []
    try:
        return hosts_of(place.nodes)
    except (OSError, subprocess.SubprocessError):
        return []


def counts_of(tasks: str) -> list[int]:
    """SLURM's "2(x3),1" as [2, 2, 2, 1]; empty where it is not such a list."""
    found: list[int] = []
    for part in tasks.split(",") if tasks else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return []
        found += [int(match[1])] * int(match[2] or 1)
    return found
