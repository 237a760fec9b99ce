"""Whether a run and a cluster fit, before anything waits in a queue for days only to fail.

for line in plan_lines(config, cluster):      # raises at what does not fit
    print(line)
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from megacl.checkpoint import step_folders, step_of
from megacl.config import RunConfig
from megacl.config_cluster import ClusterConfig
from megacl.data.provide import missing_sources
from megacl.engine import Device, check_engine
from megacl.errors import ConfigError, DataError
from megacl.log import last_records
from megacl.model.gpt import flops_per_token
from megacl.plan import check_batches, check_ranks, plan_text
from megacl.plan_memory import Machine, host_of_rank, largest_phase

_MEASURED_STEPS = 50
_EARLY = 60
"""Seconds by which SLURM may signal early: it looks at the clock every 30."""


def check_fit(config: RunConfig, cluster: ClusterConfig) -> None:
    """Raises ConfigError or LaunchError where the ranks share no batch, or a model does not fit; no data is needed."""
    check_engine(config.engine, device=_device(cluster))
    _check_ranks(config, cluster)
    _check_memory(config, cluster)


def plan_lines(config: RunConfig, cluster: ClusterConfig, *, only_plan: bool = False) -> Iterator[str]:
    """Lines on what the job would do, its memory and its time.

    only_plan: nothing is to be queued yet, so that data which is still to be prepared is said, and no error.
    Raises ConfigError, LaunchError or DataError where it would fail, or could not reach its end: ranks that share no
    batch, a model that does not fit, a step longer than a stretch of time, data that nobody can make.
    """
    _check_ranks(config, cluster)
    _check_run_dir(config)
    waited_for = _waited_for(config, cluster)
    if waited_for is not None and not only_plan:
        raise DataError(waited_for)
    ranks, device = _ranks(cluster), _device(cluster)
    least, most = cluster.node_range
    nodes = f"{least} to {most} nodes" if most > least else f"{least} node{'s' if least > 1 else ''}"
    yield f"{nodes} x {cluster.ranks_per_node} ranks on {'GPUs' if device == 'cuda' else 'CPUs'}"
    machine = Machine("a GPU there" if device == "cuda" else "a rank there", _memory_of_rank(cluster))
    yield from plan_text(config, ranks=ranks, device=device, machine=machine)
    if waited_for is not None:
        yield f"warning: {waited_for}"
    _check_memory(config, cluster)
    yield from _time_lines(config, cluster)


def _device(cluster: ClusterConfig) -> Device:
    return "cuda" if cluster.gpus_per_node else "cpu"


def _ranks(cluster: ClusterConfig) -> int:
    """The fewest ranks that there may be: then each has most to do, and to hold."""
    return cluster.node_range[0] * cluster.ranks_per_node


def _check_ranks(config: RunConfig, cluster: ClusterConfig) -> None:
    if cluster.gpus_per_node and cluster.ranks_per_node > cluster.gpus_per_node:
        raise ConfigError(
            f"cluster.tasks_per_node is {cluster.tasks_per_node}, and a node has {cluster.gpus_per_node} GPUs, one for "
            "each rank at most; make it less, or leave it out."
        )
    group = config.engine.tensor_parallel * config.engine.sequence_parallel
    least, most = cluster.node_range
    for nodes in range(least, most + 1):
        ranks = nodes * cluster.ranks_per_node
        check_ranks(config, ranks)
        try:
            check_batches(config, ranks // group)
        except ConfigError as error:
            raise ConfigError(f"{nodes} nodes x {cluster.ranks_per_node} ranks: {error}") from None


def _check_run_dir(config: RunConfig) -> None:
    run_dir = Path(os.path.abspath(config.run_dir))
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    if not there.is_dir():
        raise DataError(f"{there}: is a file, and run_dir is {config.run_dir}; name another run_dir.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"{there}: cannot be written, and run_dir is {config.run_dir}; name another run_dir.")


def _waited_for(config: RunConfig, cluster: ClusterConfig) -> str | None:
    """A source that many ranks, or GPUs, would wait for while one rank prepares it, in words; None where none is."""
    ranks = _ranks(cluster)
    if ranks == 1 and not cluster.gpus_per_node:
        return None
    for name in missing_sources(config.sources):
        return (
            f"sources.{name} is not prepared, and {ranks} rank{'s' if ranks > 1 else ''} would wait for it; run "
            f"`megacl prepare` with --out {config.sources[name].path} first, or begin with a chain's prepare step."
        )
    return None


def _memory_of_rank(cluster: ClusterConfig) -> int | None:
    """Bytes that a rank has for what it trains: of its GPU, or of its share of a node."""
    if cluster.gpus_per_node:
        return int(cluster.gpu_memory * 1e9) if cluster.gpu_memory else None
    return cluster.memory_bytes // cluster.ranks_per_node if cluster.memory_bytes else None


def _check_memory(config: RunConfig, cluster: ClusterConfig) -> None:
    """Raises ConfigError where a step needs more than the cluster file says there is. Files may say nothing."""
    ranks, device = _ranks(cluster), _device(cluster)
    phase, estimate = largest_phase(config, ranks, device)
    needed = estimate.peak.total
    has = _memory_of_rank(cluster)
    on_node = cluster.ranks_per_node * host_of_rank(config, estimate, ranks, device)
    if device == "cuda" and has is not None and needed > has:
        raise ConfigError(
            f"phase {phase!r} takes {needed / 1e9:.1f} GB on each of {ranks} GPUs, and cluster.gpu_memory is "
            f"{cluster.gpu_memory:g}; docs/parallelism.md says what makes it less: a higher engine.zero_stage, a "
            "smaller engine.micro_batch_size, engine.activation_checkpointing, more nodes."
        )
    if cluster.memory_bytes is not None and on_node > cluster.memory_bytes:
        raise ConfigError(
            f"phase {phase!r} takes {on_node / 1e9:.1f} GB of each node's memory, and cluster.memory is "
            f"{cluster.memory}, {cluster.memory_bytes / 1e9:.1f} GB; ask for more, or have fewer ranks on a node."
        )


# ---------------------------------------------------------------------------------------------- time


def _time_lines(config: RunConfig, cluster: ClusterConfig) -> Iterator[str]:
    """How long the run takes, and in how many stretches. Raises ConfigError where a stretch holds no step."""
    stretch = cluster.time_seconds - cluster.signal_seconds
    found = _seconds_left(config, cluster)
    if found is None:
        yield f"time: not known before a step has been measured; a job has {_clock(stretch)} until it is told to save"
        return
    seconds, longest_step, how = found
    if longest_step > stretch - _EARLY:
        raise ConfigError(
            f"a step takes {_clock(longest_step)} ({how}), and cluster.time less cluster.signal_seconds is "
            f"{_clock(stretch)}, so that no job would reach its second step; give it more time, or more ranks."
        )
    if longest_step > cluster.signal_seconds / 2:
        yield (
            f"warning: a step takes {_clock(longest_step)}, and its save follows; cluster.signal_seconds is "
            f"{cluster.signal_seconds}, so that SLURM may end the job before: raise it"
        )
    restarts = math.ceil(seconds / stretch) - 1 if seconds else 0
    yield (
        f"time: about {_clock(seconds)} ({how}), a job has {_clock(stretch)} until it is told to save: "
        f"{restarts or 'no'} restart{'' if restarts == 1 else 's'}"
    )


def _seconds_left(config: RunConfig, cluster: ClusterConfig) -> tuple[float, float, str] | None:
    """Seconds for the steps that are left, those of the longest step, and how they are known; None where they are not.

    The run's own last steps say it best; else the cluster file's TFLOP/s.
    """
    run_dir = Path(config.run_dir)
    done = max((step_of(folder) for folder in step_folders(run_dir)), default=0)
    left: list[tuple[int, float]] = []  # (steps, FLOPs of one) of each phase
    for phase in config.phases:
        steps = config.steps_of(phase)
        passed = min(done, steps)
        done -= passed
        flops = config.tokens_per_step(phase) * flops_per_token(config.model, config.seq_length_of(phase))
        left.append((steps - passed, flops))
    total = sum(steps * flops for steps, flops in left)
    most = max((flops for steps, flops in left if steps), default=0.0)
    records = [r for r in last_records(run_dir / "metrics.jsonl") if r.get("kind") == "step"][-_MEASURED_STEPS:]
    rates = sorted(r["flops_per_second"] for r in records if r.get("flops_per_second"))
    if rates:
        rate, how = rates[len(rates) // 2], "as its last steps took"
    elif cluster.tflops is not None:
        rate, how = cluster.tflops * 1e12 * _ranks(cluster), f"at {cluster.tflops:g} TFLOP/s a rank"
    else:
        return None
    return total / rate, most / rate, how


def _clock(seconds: float) -> str:
    """ "2 d 3 h", "5 h 10 min", "3 min", "12 s": two units at most."""
    for unit, size, below, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            rest = int(seconds % size) // smaller
            return f"{int(seconds) // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{seconds:.3g} s"
