"""Before a run's first step: whether its nodes are fit for it, measured on each at once, and a bad one named.

    line = check_health(ranks, Needs(...), run_dir=run_dir, cache=None, sources=opened)      # "healthy: 2 nodes, ..."

A rank of each node looks at its disk, memory, GPUs, clock, code and data; all ranks time a product of matrices and an
all-reduce. Who is out of line with the others is found by comparing what all have measured. What cannot be measured is
said, and no failure. Nothing is written anywhere.
"""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megacl.data.manifest import read_manifest
from megacl.data.source import Source
from megacl.data.store import ShardCache
from megacl.errors import DataError, MegaclError, UnhealthyError
from megacl.holders import node_here
from megacl.node import available_memory, code_versions, free_bytes, gpu_problems
from megacl.parallel.ranks import Ranks

_CLOCK_LIMIT = 60.0
"""Seconds by which a node's clock may be off: stores refuse requests, and times in logs mean nothing."""
_SENT = 1 << 20
"""Elements of the small all-reduce, fp32."""
_TIMES = 3
_GB = 1e9
_SHOWN = 8
"""How many nodes a message speaks of."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run takes, in bytes."""

    checkpoint: int
    """Of the run directory's disk."""
    host: int
    """Of a node's memory, by one rank."""
    device: int = 0
    """Of a GPU's memory, by one rank."""
    cached: int = 0
    """Of the disk of the shards' cache, in all."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rank has found. What belongs to the node is measured by its first rank, and empty on the others."""

    rank: int
    node: str
    clock: float
    """Seconds since 1970, read on all ranks at one moment."""
    cuda: bool
    first: bool = True
    """Whether it is its node's first rank."""
    problems: tuple[str, ...] = ()
    """What is wrong here, whatever the others find."""
    run_dir: tuple[str, ...] = ()
    """What is wrong with the run directory's disk, which nodes may share."""
    unknown: tuple[str, ...] = ()
    """What could not be measured."""
    facts: tuple[str, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)
    """Versions of what computes, by name; a hash for megacl."""
    data: Mapping[str, str] = field(default_factory=dict)
    """The fingerprint of each source as the node sees it."""
    product: float = 0.0
    """Seconds for a product of matrices."""
    sent: float = 0.0
    """Bytes a second of a small all-reduce."""


def check_health(
    ranks: Ranks, needs: Needs, *, run_dir: Path, cache: ShardCache | None, sources: Iterable[Source]
) -> str:
    """A line on what was found, the same on all ranks, which all must call it.

    sources: whose folders every node must see. Raises UnhealthyError with the names of bad nodes; without, where every
    node has the same problem.
    """
    ranks.gather(None)  # so that all read their clocks at one moment
    mine = measure(ranks, needs, run_dir=run_dir, cache=cache, sources=sources)
    return judge(ranks.gather(mine))


def measure(
    ranks: Ranks, needs: Needs, *, run_dir: Path, cache: ShardCache | None, sources: Iterable[Source]
) -> Measured:
    """What this rank finds; all must call it."""
    import torch

    clock, cuda = time.time(), torch.cuda.is_available()
    node = ranks.nodes[ranks.rank] if ranks.nodes else node_here()
    here = [rank for rank, other in enumerate(ranks.nodes) if other == node] or [0]
    problems: list[str] = []
    shared: list[str] = []
    unknown: list[str] = []
    facts: list[str] = []
    code: dict[str, str] = {}
    data: dict[str, str] = {}
    if cuda:
        _look_at_gpu_memory(needs, problems)
    if ranks.rank == here[0]:
        try:  # others wait for this rank, so what goes wrong here is told like all else
            _look_at_disk(run_dir, needs.checkpoint, "a checkpoint", shared, facts)
            if cache is not None and needs.cached:
                wanted = max(0, min(needs.cached, cache.size) - cache.held())
                _look_at_disk(cache.path, wanted, "what is still to be cached", problems, facts)
            _look_at_memory(needs.host * len(here), problems, unknown, facts)
            found = gpu_problems(os.environ)
            problems += found.problems
            unknown += found.unknown
            facts += found.facts
            code = code_versions()
            data = _fingerprints(sources)
        except (MegaclError, OSError) as error:
            problems.append(str(error))
    return Measured(
        rank=ranks.rank,
        node=node,
        clock=clock,
        cuda=cuda,
        first=ranks.rank == here[0],
        problems=tuple(problems),
        run_dir=tuple(shared),
        unknown=tuple(unknown),
        facts=tuple(facts),
        code=code,
        data=data,
        product=_time_product(cuda),
        sent=_time_all_reduce(ranks, cuda),
    )


def _look_at_disk(folder: Path, need: int, what: str, problems: list[str], facts: list[str]) -> None:
    try:
        free = free_bytes(folder)
    except OSError as error:
        problems.append(f"the disk of {folder} does not answer ({error.strerror})")
        return
    if free < need:
        problems.append(f"the disk of {folder} has {free / _GB:.2f} GB free, and {what} takes {need / _GB:.2f}")
    facts.append(f"{folder} has {free / _GB:.1f} GB free")


def _look_at_memory(need: int, problems: list[str], unknown: list[str], facts: list[str]) -> None:
    memory = available_memory()
    if memory is None:
        unknown.append("memory (no /proc/meminfo)")
        return
    # Where a node has not got it at all, the plan warns; here it is about what something else has taken.
    if memory.available < need <= memory.total:
        problems.append(f"{memory.available / _GB:.2f} GB of memory are available, and its ranks take {need / _GB:.2f}")
    facts.append(f"{memory.available / _GB:.1f} GB of memory available")


def _look_at_gpu_memory(needs: Needs, problems: list[str]) -> None:
    import torch

    free, total = torch.cuda.mem_get_info()
    if free < needs.device <= total:
        problems.append(
            f"GPU {torch.cuda.current_device()} has {free / _GB:.2f} GB free, and a rank takes {needs.device / _GB:.2f}"
        )


def _fingerprints(sources: Iterable[Source]) -> dict[str, str]:
    """What this node sees of the sources that lie in folders, one small file each."""
    found = {}
    for source in sources:
        folder = source.local
        if folder is not None:
            try:
                found[source.name] = read_manifest(folder).at(source.generation, folder).fingerprint[:12]
            except DataError as error:
                found[source.name] = str(error)
    return found


def _time_product(cuda: bool) -> float:
    """Seconds for a product of matrices on this rank's device: the best of a few."""
    import torch

    size = 4096 if cuda else 256
    device = torch.device("cuda" if cuda else "cpu")
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)

    def product() -> None:
        torch.mm(matrix, matrix)
        if cuda:
            torch.cuda.synchronize()

    return _best(product)


def _time_all_reduce(ranks: Ranks, cuda: bool) -> float:
    """Bytes a second of a small all-reduce over all ranks: the best of a few; 0 where there is one rank."""
    if ranks.world_size == 1:
        return 0.0
    import torch
    import torch.distributed as dist

    values = torch.zeros(_SENT, device="cuda" if cuda else "cpu")

    def reduce() -> None:
        dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()

    return values.nbytes / _best(reduce)


def _best(call: Callable[[], None]) -> float:
    call()  # the first time opens connections and loads libraries
    seconds = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return max(min(seconds), 1e-9)


# ---------------------------------------------------------------------------------------------- judging


def judge(measured: Sequence[Measured]) -> str:
    """The line on what all ranks have measured, [ranks]; UnhealthyError where a node is bad."""
    nodes = [each for each in measured if each.first]
    if all(each.run_dir for each in nodes):
        raise UnhealthyError(f"on every node: {'; '.join(nodes[0].run_dir)}. Put that right and run again.")
    bad: dict[str, list[str]] = {}
    for each in measured:
        for problem in (*each.problems, *each.run_dir):
            bad.setdefault(each.node, []).append(problem)
    for node, problem in _out_of_line(measured, nodes):
        bad.setdefault(node, []).append(problem)
    if bad:
        _refuse(bad, len(nodes))
    clocks = [each.clock for each in measured]
    # What rank 0's node has stands for all: the others have enough too.
    words = [f"{len(nodes)} node(s)", *nodes[0].facts, f"clocks within {max(clocks) - min(clocks):.2f} s"]
    if len(measured) > 1:
        words.append(f"all-reduce of {4 * _SENT / 1e6:.0f} MB at {min(each.sent for each in measured) / _GB:.2f} GB/s")
        slowest = max(measured, key=lambda each: each.product)
        usual = statistics.median(each.product for each in measured)
        words.append(f"slowest rank {slowest.rank} ({slowest.node}), {slowest.product / usual:.1f} x the median")
    unknown = sorted({each for one in nodes for each in one.unknown})
    return f"healthy: {', '.join(words)}{'; not measured: ' if unknown else ''}{', '.join(unknown)}"


def _refuse(bad: Mapping[str, Sequence[str]], nodes: int) -> None:
    shown = " | ".join(f"{node}: {'; '.join(problems)}" for node, problems in list(bad.items())[:_SHOWN])
    more = f", and {len(bad) - _SHOWN} more nodes" if len(bad) > _SHOWN else ""
    if len(bad) == nodes > 1:
        raise UnhealthyError(f"every node has a problem: {shown}{more}. Put that right and run again.")
    raise UnhealthyError(
        f"{shown}{more}. Leave out what cannot be put right: sbatch --exclude={','.join(bad)}", nodes=list(bad)
    )


def _out_of_line(measured: Sequence[Measured], nodes: Sequence[Measured]) -> Iterator[tuple[str, str]]:
    """(node, problem) of nodes that are not like most; where as many are like one another, like the first."""
    for each, name, value, usual in _unlike([each.code for each in nodes]):
        yield nodes[each].node, f"has {name} {value}, and others {usual}"
    for each, name, value, usual in _unlike([each.data for each in nodes]):
        yield nodes[each].node, f"sees source {name} as {value}, and others {usual}"
    if any(each.cuda for each in measured):
        for one in measured:
            if not one.cuda:
                yield one.node, f"rank {one.rank} finds no GPU, and others have one"
    clock = statistics.median_low(each.clock for each in measured)
    for one in nodes:
        if abs(one.clock - clock) > _CLOCK_LIMIT:
            yield one.node, f"its clock is off by {one.clock - clock:+.0f} s"


def _unlike(found: Sequence[Mapping[str, str]]) -> Iterator[tuple[int, str, str | None, str | None]]:
    """(which, name, its value, the usual value) where one of the tables is not like most."""
    for name in found[0]:
        values = [each.get(name) for each in found]
        counts = Counter(values)
        usual = max(values, key=lambda value: counts[value])  # the first of these, where several are as frequent
        yield from ((each, name, value, usual) for each, value in enumerate(values) if value != usual)
