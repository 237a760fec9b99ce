"""Whether ranks that hold the same weights still hold the same bits, and which of them does not.

    compare_replicas(model, ranks)          # DivergedError on every rank where one has others

A device that computes or keeps something wrongly, once, makes a replica of its own, and training goes on without a
word. What is compared is a checksum of each weight that ranks hold alike: over all ranks where tensor parallelism
leaves the weight whole, else over those of one tp_rank. Under ZeRO-3 that is what is small enough for every rank to
keep whole, since of all else each rank holds its own shard.
"""

from collections import Counter

import torch
from torch import Tensor, nn

from megacl.errors import DivergedError
from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import shard_of

_CHUNK = 2**20
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare_replicas(model: nn.Module, ranks: Ranks) -> None:
    """Raises DivergedError, on every rank, where weights that ranks hold alike differ in a bit.

    A collective. It names the first parameter that differs, and the ranks that have others than most; where no majority
    has the same, all of them.
    """
    held = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.shape == getattr(parameter, "ds_shape", parameter.shape)
    ]
    mine = torch.stack([checksum(parameter) for _, parameter in held]).tolist() if held else []
    of_ranks = ranks.gather(mine)
    everyone = range(ranks.world_size)
    by_part = [everyone[part :: ranks.tp_size] for part in range(ranks.tp_size)]
    for index, (name, parameter) in enumerate(held):
        for members in by_part if shard_of(parameter) else [everyone]:
            sums = {rank: of_ranks[rank][index] for rank in members}
            (common, count), *others = Counter(sums.values()).most_common()
            if others:
                most = count > len(members) / 2
                odd = [rank for rank in members if not most or sums[rank] != common]
                raise DivergedError(
                    f"the replicas of the weights differ: {name} on rank {', '.join(map(str, odd))} "
                    f"{'is not what most ranks have' if most else 'is different on each'}; "
                    "look for a faulty device there, and go on from a checkpoint made before."
                )


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A sum of the tensor's bits, each element's times an odd number that belongs to its place, modulo 2^64.

    int64 [], on the tensor's device. Where one element is another it is another, always: an odd number has an inverse
    modulo 2^64. Where several are, it is the same with a chance of about 2^-64.
    """
    bits = tensor.detach().flatten().view(_BITS[tensor.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    places = torch.arange(1, 2 * min(_CHUNK, bits.numel()), 2, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        total += (chunk * (places[: chunk.numel()] + 2 * start)).sum()
    return total
