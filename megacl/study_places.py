"""Where a study's runs can go: parts of this machine, or the nodes of a SLURM allocation.

    places = find_places(jobs=None)      # one run at a time in each

In an allocation of several nodes, the study itself runs on the first of them, in the batch script and not under srun;
each node is given one run at a time, with all of its allocated CPUs.
"""

import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from megacl.errors import ConfigError, LaunchError
from megacl.parallel.place import counts_of, hosts_of


@dataclass(frozen=True)
class Place:
    """Where one run at a time can go."""

    launcher: tuple[str, ...] = ()
    """The words before a run's command."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What its runs have in theirs, beside what the study has."""

    @property
    def stop_signal(self) -> signal.Signals:
        """What tells a run there to stop: srun hands on SIGUSR1, and ends the run at once at a SIGTERM."""
        return signal.SIGUSR1 if self.launcher else signal.SIGTERM


def find_places(jobs: int | None) -> list[Place]:
    """`jobs` places; by default one a node of an allocation of several, one a GPU of this machine, or one a core.

    Raises LaunchError where this process is one of several ranks, or SLURM does not say which nodes there are, and
    ConfigError where there are fewer nodes than jobs.
    """
    ranks = os.environ.get("WORLD_SIZE") or (os.environ.get("SLURM_NTASKS") if "SLURM_STEP_ID" in os.environ else None)
    if ranks is not None and ranks != "1":
        raise LaunchError(f"a study starts its runs itself, and this is one of {ranks} ranks; start it once, as it is.")
    if "SLURM_JOB_ID" in os.environ and int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
        return _nodes(jobs)
    cores, gpus = len(os.sched_getaffinity(0)), _gpus()
    jobs = jobs or len(gpus) or cores
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))} if jobs > 1 else {}
    devices = [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {} for index in range(jobs)]
    return [Place(environment=threads | device) for device in devices]


def _gpus() -> list[str]:
    """How CUDA knows the GPUs that this process may use."""
    import torch

    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def _nodes(jobs: int | None) -> list[Place]:
    """One place on each node of the SLURM allocation."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        hosts = hosts_of(nodes)
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"scontrol show hostnames {nodes}: {error}; a study needs it to find its nodes.") from None
    if jobs is not None and jobs > len(hosts):
        raise ConfigError(f"--jobs is {jobs}, and the allocation has {len(hosts)} nodes, each for one run at a time.")
    listed = os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1")
    cpus = counts_of(listed)
    if not cpus:
        raise LaunchError(f"SLURM_JOB_CPUS_PER_NODE is {listed!r}, which is not a list of counts such as 2(x3),4.")
    return [
        Place(
            launcher=(
                *("srun", "--nodes=1", "--ntasks=1", "--exclusive", f"--cpus-per-task={count}"),
                *(f"--nodelist={host}", "--export=ALL", "--kill-on-bad-exit=0"),
            ),
            environment={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(count)},
        )
        for host, count in list(zip(hosts, cpus * len(hosts), strict=False))[:jobs]
    ]
