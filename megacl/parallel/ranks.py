"""The ranks of a run: how the processes find one another, and the few things that they say to one another.

    ranks = start_ranks(timeout=600).arrange(tensor_parallel=2, sequence_parallel=1)
    stop = ranks.any(signal_received)
    stop_ranks()

Processes come from torchrun, from srun (one task a rank; MASTER_ADDR and MASTER_PORT are derived where the job script
does not set them), or there is just one. With one rank there is no process group, and nothing to wait for.
"""

import contextlib
import dataclasses
import datetime
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacl.errors import LaunchError, MegaclError

_PATIENCE = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Its methods must be called by all ranks, in one order."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank on this machine: which of its devices is this process's."""
    patient: Any = field(default=None, repr=False, compare=False)
    """A process group whose collectives wait for days: for what one rank does while the others have nothing to do."""
    timeout: datetime.timedelta | None = field(default=None, repr=False, compare=False)
    """How long a collective waits for a silent rank, in every other group; None leaves it to PyTorch."""

    tp_rank: int = 0
    """Place among the ranks that share each layer."""
    tp_size: int = 1
    sp_rank: int = 0
    """Place among the ranks that share each sequence."""
    sp_size: int = 1
    tp_group: Any = field(default=None, repr=False, compare=False)
    """Process groups, each None where it would be this rank alone: the ranks that share each layer,"""
    sp_group: Any = field(default=None, repr=False, compare=False)
    """the ranks that share each sequence,"""
    replica_group: Any = field(default=None, repr=False, compare=False)
    """and those that hold the same part of the layers, over which gradients are averaged; None for all ranks."""

    @property
    def dp_rank(self) -> int:
        """Which part of the batch's sequences is this rank's: rank = (dp_rank sp_size + sp_rank) tp_size + tp_rank."""
        return self.rank // (self.tp_size * self.sp_size)

    @property
    def dp_size(self) -> int:
        """Into how many parts the batch's sequences are dealt."""
        return self.world_size // (self.tp_size * self.sp_size)

    @property
    def replica_size(self) -> int:
        """How many ranks hold the same part of the layers, and average their gradients: dp_size x sp_size."""
        return self.world_size // self.tp_size

    def arrange(self, *, tensor_parallel: int, sequence_parallel: int) -> "Ranks":
        """These ranks in groups that share each layer and each sequence; all of them must call it.

        The ranks of a tensor-parallel group are neighbours, so that they are on one machine. Raises LaunchError where
        the sizes do not divide the number of ranks.
        """
        tp, sp = tensor_parallel, sequence_parallel
        check_groups(self.world_size, tensor_parallel=tp, sequence_parallel=sp)
        if (tp, sp) == (1, 1):
            return self
        arranged = dataclasses.replace(
            self, tp_rank=self.rank % tp, tp_size=tp, sp_rank=self.rank // tp % sp, sp_size=sp
        )
        import torch.distributed as dist

        def group(ranks: range) -> Any:
            # Each rank makes its own groups alone; with thousands of ranks, all groups on all of them would take long.
            return dist.new_group(list(ranks), timeout=self.timeout, use_local_synchronization=True)

        first = self.rank - arranged.tp_rank
        return dataclasses.replace(
            arranged,
            tp_group=group(range(first, first + tp)) if tp > 1 else None,
            sp_group=group(range(self.rank - arranged.sp_rank * tp, self.rank + (sp - arranged.sp_rank) * tp, tp))
            if sp > 1
            else None,
            replica_group=group(range(arranged.tp_rank, self.world_size, tp)) if tp > 1 else None,
        )

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(np.array([float(flag)]))[0])

    def sum(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over all ranks, the same on each; the argument is left as it is."""
        return self._reduce(array, "SUM")

    def max(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """The largest of each element over all ranks; the argument is left as it is."""
        return self._reduce(array, "MAX")

    def _reduce(self, array: NDArray[np.float64], op: str) -> NDArray[np.float64]:
        if self.world_size == 1:
            return array.copy()
        import torch
        import torch.distributed as dist

        reduced = torch.tensor(array, dtype=torch.float64)
        dist.all_reduce(reduced, op=getattr(dist.ReduceOp, op))
        result: NDArray[np.float64] = reduced.numpy()
        return result

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's object on every rank; the argument is used on rank 0 alone. It is pickled on the way."""
        if self.world_size == 1:
            return obj
        import torch
        import torch.distributed as dist

        box = [obj if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that succeeds on all ranks or fails on all, with the first rank's MegaclError; no calls inside it.

        Without it, ranks would wait for one that found something wrong, and die of its silence. One rank may be at work
        in it for hours, writing a checkpoint, say: the others notice at once where it dies, and else wait.
        """
        error: MegaclError | None = None
        try:
            yield
        except MegaclError as raised:
            error = raised
        first = next((found for found in self.gather(error) if found is not None), None)
        if first is not None:
            first.on_every_rank = True
            raise first

    def gather(self, obj: Any) -> list[Any]:
        """Each rank's object, by rank, on every rank."""
        if self.world_size == 1:
            return [obj]
        import torch.distributed as dist

        objects = [None] * self.world_size
        dist.all_gather_object(objects, obj, group=self.patient)
        return objects


def check_groups(ranks: int, *, tensor_parallel: int, sequence_parallel: int) -> None:
    """Raises LaunchError where so many ranks do not fall into groups of these sizes."""
    if ranks % (tensor_parallel * sequence_parallel):
        raise LaunchError(
            f"the number of ranks is {ranks}; it must be a multiple of engine.tensor_parallel, {tensor_parallel}, x "
            f"engine.sequence_parallel, {sequence_parallel}."
        )


def start_ranks(*, timeout: float) -> Ranks:
    """Finds this process's place and joins the others; raises LaunchError where they do not come together.

    timeout: seconds, for the meeting itself and for every later collective that a silent rank holds up.
    """
    place = _place(os.environ)
    if place["WORLD_SIZE"] == "1":
        return Ranks()
    os.environ.update(place)
    ranks = Ranks(
        int(place["RANK"]),
        int(place["WORLD_SIZE"]),
        int(place["LOCAL_RANK"]),
        timeout=datetime.timedelta(seconds=timeout),
    )

    import torch
    import torch.distributed as dist

    # Gloo serves what the ranks say to one another in host memory, also where gradients travel by NCCL.
    backend = "gloo"
    if torch.cuda.is_available():
        if ranks.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"local rank {ranks.local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}; "
                "start at most that many ranks on it."
            )
        torch.cuda.set_device(ranks.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, init_method="env://", timeout=ranks.timeout)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} did not meet the others at "
            f"{place['MASTER_ADDR']}:{place['MASTER_PORT']} within {timeout:g} s: {reason}; see whether all ranks "
            "started, and whether the port is free and reachable."
        ) from None
    return dataclasses.replace(ranks, patient=dist.new_group(backend="gloo", timeout=_PATIENCE))


def stop_ranks() -> None:
    """Leaves the process group, where there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _place(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, from whoever started this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if environment["WORLD_SIZE"] == "1":
            return dict.fromkeys(names, "0") | {"WORLD_SIZE": "1"}
        missing = [name for name in names if name not in environment]
        if missing:
            raise LaunchError(f"{', '.join(missing)} not set beside RANK and WORLD_SIZE; start the run with torchrun.")
        return {name: environment[name] for name in names}
    # A batch script has SLURM_PROCID too, but only the tasks of a step have a step's id.
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment),
            # Below the ephemeral ports, and another one for each job on a node.
            "MASTER_PORT": environment.get("MASTER_PORT") or str(10000 + int(environment["SLURM_JOB_ID"]) * 7 % 20000),
        }
    return dict.fromkeys(names, "0") | {"WORLD_SIZE": "1"}


def _first_host(environment: Mapping[str, str]) -> str:
    """The node of rank 0."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        )
        return listed.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise LaunchError(
            f"scontrol cannot list the hosts of {nodes!r} ({error}); set MASTER_ADDR to the host of rank 0."
        ) from None
