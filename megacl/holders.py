"""Who is at work in a folder: a process, its machine and, under SLURM, its job. Locks say it, and refusals name it."""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


def node_here(environment: Mapping[str, str] = os.environ) -> str:
    """This machine's name: the one that SLURM has for it, where SLURM started this process or one before it."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def job_here(environment: Mapping[str, str] = os.environ) -> tuple[str | None, int]:
    """SLURM's number of the job that this process belongs to, if any, and how often it was requeued."""
    return environment.get("SLURM_JOB_ID"), int(environment.get("SLURM_RESTART_COUNT") or 0)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that holds something, as it said of itself."""

    node: str
    """The machine's name, or the node's in SLURM's words."""
    pid: int
    time: float
    """When it began to hold, in seconds since 1970."""
    job: str | None = None
    """SLURM's number of its job; None outside of SLURM."""
    restart: int = 0
    """How often SLURM had started that job again."""
    step: str | None = None
    """SLURM's number of the step, which is one srun."""
    cluster: str | None = None
    """SLURM's name of the cluster: two clusters may number jobs alike."""

    @staticmethod
    def here(environment: Mapping[str, str] = os.environ) -> "Holder":
        """This process, now."""
        job, restart = job_here(environment)
        return Holder(
            node=node_here(environment),
            pid=os.getpid(),
            time=time.time(),
            job=job,
            restart=restart if job else 0,
            step=environment.get("SLURM_STEP_ID") if job else None,
            cluster=environment.get("SLURM_CLUSTER_NAME") if job else None,
        )

    def __str__(self) -> str:
        restart = f" (restart {self.restart})" if self.restart else ""
        job = f"job {self.job}{restart} " if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        return f"{job}on {self.node}, process {self.pid}, since {since}"

    def tree(self) -> dict[str, Any]:
        """As it stands in a file."""
        return asdict(self)


def dump_holder(holder: Holder) -> bytes:
    """A lock's content."""
    return json.dumps(holder.tree()).encode() + b"\n"


def holder_of(tree: Any) -> Holder | None:
    """Who a parsed file says it is; None where it does not say so, being torn or of something else."""
    names = [field.name for field in fields(Holder)]
    if not (isinstance(tree, dict) and set(names) <= tree.keys()):
        return None
    kept = {name: tree[name] for name in names}
    texts = ("node", "job", "step", "cluster")
    right = all(isinstance(kept[name], str) or (kept[name] is None and name != "node") for name in texts)
    right = right and all(isinstance(kept[name], int) for name in ("pid", "restart"))
    return Holder(**kept) if right and isinstance(kept["time"], int | float) else None


def parse_holder(content: bytes) -> Holder | None:
    """Who a lock's content says holds it; None where it is torn or says nothing."""
    try:
        return holder_of(json.loads(content))
    except ValueError:
        return None
