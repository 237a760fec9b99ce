"""The schema of a cluster file (configs/cluster/*.yaml): what SLURM is asked for, and how ranks start there.

    load_cluster("h100x8", ["nodes=4"])      # configfile.py reads one

Frozen data. What a script makes of it stands in slurm/*.sbatch.j2.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from megacl.errors import ConfigError
from megacl.model.config import STRICT

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_SIZE = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)")
_NODES = re.compile(r"(?P<least>\d+)(?:-(?P<most>\d+))?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FOLDER = re.compile(r"(?:[^$\"`\\\n\0]|\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\})+")

CLUSTER = ConfigDict(**STRICT, coerce_numbers_to_str=True)
"""`time: 10` and `memory: 0` are texts that look like numbers."""

Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """The image that the ranks run in. It has the Python with what megacl needs; megacl itself is the frozen copy."""

    __pydantic_config__: ClassVar[ConfigDict] = CLUSTER

    image: Annotated[str, Field(min_length=1, description="the image: a path, or what the runtime can fetch")]
    mounts: tuple[Text, ...] = ()
    """FROM:TO, beside the folder that the job was submitted from and the run directory."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: srun --container-image. apptainer: apptainer exec."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One kind of job on one cluster. Every setting can be overridden on the command line: cluster.KEY=VALUE."""

    __pydantic_config__: ClassVar[ConfigDict] = CLUSTER

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    reservation: Text | None = None
    constraint: Text | None = None
    exclude: (
        Annotated[str, Field(min_length=1, description="nodes to keep away from, as SLURM writes lists")] | None
    ) = None
    sbatch: tuple[
        Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=.*)?$", description="an option, --NAME=VALUE")], ...
    ] = ()
    """Further options of sbatch."""

    nodes: Annotated[int, Field(ge=1, description="how many nodes")] | str = 1
    """A number, or FROM-TO: as many as are free."""
    tasks_per_node: Annotated[int, Field(ge=1, description="the ranks on a node")] | None = None
    """Null: one a GPU, or one."""
    gpus_per_node: Annotated[int, Field(ge=0, description="the GPUs of a node; 0: the ranks compute on its CPUs")] = 0
    gpu_type: Text | None = None
    """Where a node's GPUs must be named: --gpus-per-node=TYPE:NUMBER."""
    gpu_memory: Annotated[float, Field(gt=0, description="the GB of a GPU, against which a plan is checked")] | None = (
        None
    )
    tflops: Annotated[float, Field(gt=0, description="the model TFLOP/s that a rank trains at")] | None = None
    """For the time that a run takes, where it has not been measured yet."""
    cpus_per_task: Annotated[int, Field(ge=1, description="the CPUs of a rank")] | None = None
    memory: str | None = None
    """What a job gets of a node's memory, 512G; "0": all. Null: the site's default."""
    time: str = "24:00:00"
    """The time limit of one stretch, as SLURM writes it: minutes, H:M:S or D-H:M:S. A run may take many stretches."""
    signal_seconds: Annotated[int, Field(ge=10, description="how long before the limit the ranks are told to save")] = (
        120
    )
    max_restarts: Annotated[int, Field(ge=0, description="restarts in a row without a new step saved")] = 5
    restart_seconds: Annotated[int, Field(ge=0, description="the wait before the first of these restarts")] = 30
    """It doubles with each, up to ten minutes."""

    modules: tuple[Text, ...] = ()
    """Loaded with `module load`."""
    container: ContainerConfig | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job."""
    prologue: str = ""
    """Lines of bash that run on the first node before all else."""
    python: Text | None = None
    """The Python that has megacl's dependencies; null: the one that submits, in a container `python`."""

    launcher: Literal["srun", "torchrun"] = "srun"
    """srun starts a process a rank. torchrun: it starts one a node, which starts the ranks."""
    network_interface: Text | None = None
    """What the ranks meet and talk over, where nodes have several: for gloo and for NCCL."""
    cpu_bind: Literal["none", "cores", "sockets", "ldoms"] | None = None
    """srun's --cpu-bind; null: the site's."""
    numa_local: bool = False
    """Memory from the rank's own NUMA node alone: srun's --mem-bind=local."""
    scratch: Text | None = None
    """A folder on each node's own disk, which may name variables: /scratch/$SLURM_JOB_ID; MEGACL_SCRATCH in a job."""

    @property
    def ranks_per_node(self) -> int:
        """How many ranks a node has."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def node_range(self) -> tuple[int, int]:
        """The least and the most nodes that a job may get."""
        found = _NODES.fullmatch(str(self.nodes))
        assert found is not None, "check() was not called"
        least = int(found["least"])
        return least, int(found["most"] or least)

    @property
    def time_seconds(self) -> int:
        """The time limit. SLURM's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
        found = _TIME.fullmatch(self.time)
        assert found is not None, "check() was not called"
        parts = [int(part) for part in found["parts"].split(":")]
        if found["days"] is not None:
            hours, minutes, seconds = [*parts, 0, 0][:3]
            return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        return (hours * 60 + minutes) * 60 + seconds

    @property
    def memory_bytes(self) -> int | None:
        """What a job gets of a node's memory, or None where that is not said (all of it, or the site's default)."""
        found = _SIZE.fullmatch(self.memory or "0")
        assert found is not None, "check() was not called"
        return int(found["number"]) * 1024 ** (" KMGT".index(found["unit"] or "M")) or None

    def check(self) -> None:
        """Raises ConfigError at the first setting that SLURM would not understand, or that fits no other one."""
        found = _NODES.fullmatch(str(self.nodes))
        if found is None or not 1 <= int(found["least"]) <= int(found["most"] or found["least"]):
            raise ConfigError(f"cluster.nodes is {self.nodes!r}; it must be a number, or FROM-TO such as 2-4.")
        if _TIME.fullmatch(self.time) is None or not self.time_seconds:
            raise ConfigError(
                f"cluster.time is {self.time!r}; it must be minutes, H:M:S or D-H:M:S, such as 2-12:00:00."
            )
        if self.memory is not None and _SIZE.fullmatch(self.memory) is None:
            raise ConfigError(f"cluster.memory is {self.memory!r}; it must be a size such as 512G, or 0 for all.")
        for name in self.environment:
            if _VARIABLE.fullmatch(name) is None:
                raise ConfigError(f"cluster.environment names {name!r}, which is no name of a variable; rename it.")
        if self.scratch is not None and _FOLDER.fullmatch(self.scratch) is None:
            raise ConfigError(
                f"cluster.scratch is {self.scratch!r}; it may name variables, $NAME, but hold no quotes, no "
                "backslashes and nothing that runs."
            )
        # SLURM looks at the clock every 30 s, and signals up to 60 s early.
        if self.time_seconds - self.signal_seconds < 60:
            raise ConfigError(
                f"cluster.signal_seconds is {self.signal_seconds}, and cluster.time {self.time}, {self.time_seconds} "
                "s; ranks would be told to stop before they have begun, so leave them a minute and more."
            )
