"""The ranks of a run: how the processes find one another, and the few things that they say to one another.

    ranks = start_ranks(timeout=600, rendezvous_timeout=180).arrange(tensor_parallel=2, sequence_parallel=1)
    stop = ranks.any(signal_received)
    stop_ranks()

Processes come from torchrun, from srun (one task a rank; MASTER_ADDR and MASTER_PORT are derived where the job script
does not set them), or there is just one. With one rank there is no process group, and nothing to wait for.
"""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacl.errors import LaunchError, MegaclError
from megacl.parallel.place import find_place
from megacl.parallel.rendezvous import meet

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
    nodes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Each rank's machine, by rank; empty for one rank alone."""

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


def start_ranks(*, timeout: float, rendezvous_timeout: float | None = None) -> Ranks:
    """Finds this process's place and joins the others; raises LaunchError where they do not come together.

    timeout: seconds, for every collective that a silent rank holds up. rendezvous_timeout: seconds for the meeting
    itself, by default the same; RendezvousError names who did not come.
    """
    place = find_place(os.environ)
    if place is None:
        return Ranks()

    import torch
    import torch.distributed as dist

    # Gloo serves what the ranks say to one another in host memory, also where gradients travel by NCCL.
    backend, problem = "gloo", None
    if torch.cuda.is_available():
        if place.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(place.local_rank)
        else:  # said to all, who would else wait for this rank
            problem = (
                f"local rank {place.local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}; "
                "start at most that many ranks on it."
            )
        backend = "cpu:gloo,cuda:nccl"
    met = meet(place, timeout=rendezvous_timeout or timeout, problem=problem)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    limit = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(backend, store=met.store, rank=place.rank, world_size=place.world_size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LaunchError(
            f"rank {place.rank} of {place.world_size} ({place.node}) met the others at {place.address}, and cannot "
            f"talk to all of them: {reason}; see whether every node reaches every other one (GLOO_SOCKET_IFNAME)."
        ) from None
    return Ranks(
        place.rank,
        place.world_size,
        place.local_rank,
        timeout=limit,
        nodes=met.nodes,
        patient=dist.new_group(backend="gloo", timeout=_PATIENCE),
    )


def stop_ranks() -> None:
    """Leaves the process group, where there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
