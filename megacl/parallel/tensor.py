"""Tensor parallelism: what of a parameter lies on which rank, and the collectives between layers, with gradients.

    shard = Shard(dim=0, sections=(heads, kv_heads, kv_heads), rank=1, size=2)
    shard.join([shard.take(whole) for each rank])        # is whole again

    column_parallel(mlp.up, (mlp_size,), ranks)          # each rank has some of the outputs
    mlp.down = RowParallel(mlp.down, ranks)              # each rank takes those as inputs; outputs are added up

After Shoeybi et al. 2019, arXiv 1909.08053: into a pair of a column-parallel and a row-parallel layer goes what every
rank holds alike, and out of it comes what every rank holds alike; between them each works on its own part. So a pair
costs one sum over the group forward, of what comes out, and one backward, of the gradient of what went in, in the
dtype of the activations.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# How torch's own operators find a group by its name.
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group  # type: ignore[attr-defined]

from megacl.parallel.ranks import Ranks


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter: along `dim`, the rank-th of `size` equal parts of each section.

    sections: their lengths in the whole, each a multiple of `size`; queries, keys and values in one matrix are three.
    """

    dim: int
    sections: tuple[int, ...]
    rank: int
    size: int

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of `whole`, in memory of its own."""
        sections = torch.split(whole, list(self.sections), self.dim)
        return torch.cat([section.chunk(self.size, self.dim)[self.rank] for section in sections], self.dim)

    def join(self, parts: list[Tensor], out: Tensor | None = None) -> Tensor:
        """The whole of the parts of ranks 0, 1, ..., in `out` where it is given."""
        lengths = [section // self.size for section in self.sections]
        by_rank = [torch.split(part, lengths, self.dim) for part in parts]
        return torch.cat([part for section in zip(*by_rank, strict=True) for part in section], self.dim, out=out)

    def whole_shape(self, part: torch.Size) -> torch.Size:
        """The shape of the whole of which `part` is a part's."""
        return torch.Size([*part[: self.dim], sum(self.sections), *part[self.dim + 1 :]])


def shard_of(parameter: nn.Parameter) -> Shard | None:
    """How a parameter is cut among the ranks of a tensor-parallel group; None where each has all of it."""
    shard: Shard | None = getattr(parameter, "shard", None)
    return shard


def take_part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """What of a parameter's whole value this rank keeps."""
    shard = shard_of(parameter)
    return whole if shard is None else shard.take(whole)


def cut(module: nn.Module, name: str, *, dim: int, sections: tuple[int, ...], ranks: Ranks) -> None:
    """Leaves of a module's parameter this rank's part, and marks it as one; a parameter on "meta" stays there."""
    shard = Shard(dim, sections, ranks.tp_rank, ranks.tp_size)
    part: Any = nn.Parameter(shard.take(getattr(module, name).detach()))
    part.shard = shard
    part.tensor_model_parallel = True  # DeepSpeed's mark: counted on every rank of the group in the gradient's norm
    setattr(module, name, part)


# ---------------------------------------------------------------------------------------------- collectives


# An operator of its own, so that torch.compile and checkpointing by operator see one call, and its result.
@torch.library.custom_op("megacl::sum_over", mutates_args=())
def sum_over(x: Tensor, group: str) -> Tensor:
    """The sum of x over the ranks of the process group of that name."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_resolve_process_group(GroupName(group)))
    return total


@sum_over.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        total: Tensor = sum_over(x, group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def copy_to(x: Tensor, ranks: Ranks) -> Tensor:
    """x, which every rank of the tensor-parallel group has alike, on its way into what each computes a part of.

    Its gradient is the sum of theirs.
    """
    copied: Tensor = _Copy.apply(x, ranks.tp_group.group_name)  # type: ignore[no-untyped-call]
    return copied


def reduce_from(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of x over the tensor-parallel group, alike on every rank, as its gradient is."""
    reduced: Tensor = _Reduce.apply(x, ranks.tp_group.group_name)  # type: ignore[no-untyped-call]
    return reduced


def gather(x: Tensor, group: Any) -> list[Tensor]:
    """x of each rank of the group, in order; without gradients."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


# ---------------------------------------------------------------------------------------------- layers


def column_parallel(linear: nn.Linear, sections: tuple[int, ...], ranks: Ranks) -> None:
    """Leaves each rank its part of every section of a layer's outputs: rows of the weight, and of the bias."""
    for name, _ in list(linear.named_parameters()):
        cut(linear, name, dim=0, sections=sections, ranks=ranks)
    linear.register_forward_pre_hook(lambda _, inputs: (copy_to(inputs[0], ranks),))


class RowParallel(nn.Linear):
    """A linear layer of whose inputs each rank has its part: columns of the weight. The bias is added once."""

    def __init__(self, linear: nn.Linear, ranks: Ranks) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features // ranks.tp_size, linear.out_features, bias=bias, device="meta")
        self.ranks = ranks
        self.weight, self.bias = linear.weight, linear.bias
        cut(self, "weight", dim=1, sections=(linear.in_features,), ranks=ranks)

    def forward(self, x: Tensor) -> Tensor:
        total = reduce_from(F.linear(x, self.weight), self.ranks)
        return total if self.bias is None else total + self.bias
