"""The vocabulary over the ranks of a tensor-parallel group: the embedding, and the loss without whole rows of logits.

Rank r of n has the rows [r V / n, (r + 1) V / n) of the embedding and of the head.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megacl.kernels import IGNORED
from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import cut, reduce_from


class VocabularyParallelEmbedding(nn.Embedding):
    """An embedding of which each rank has some rows: the others' tokens are zeros there, and all are added up."""

    def __init__(self, embedding: nn.Embedding, ranks: Ranks) -> None:
        super().__init__(embedding.num_embeddings // ranks.tp_size, embedding.embedding_dim, device="meta")
        self.ranks = ranks
        self.weight = embedding.weight
        cut(self, "weight", dim=0, sections=(embedding.num_embeddings,), ranks=ranks)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        row_BT, here_BT = _own_row(tokens_BT, self.weight.shape[0], self.ranks)
        x_BTD = F.embedding(row_BT, self.weight) * here_BT.unsqueeze(-1)
        return reduce_from(x_BTD, self.ranks)


def _own_row(tokens: Tensor, rows: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """(the row of each token among this rank's, 0 where it is another's; whether it is this rank's)."""
    row = tokens - ranks.tp_rank * rows
    here = (row >= 0) & (row < rows)
    return row.where(here, 0), here


def linear_cross_entropy(
    x_ND: Tensor, weight_RD: Tensor, targets_N: Tensor, *, chunk: int, z_loss: float, ranks: Ranks
) -> Tensor:
    """`Kernels.linear_cross_entropy` of a weight of which each rank has R = V / tp_size rows; alike on every rank.

    Of each chunk the ranks tell one another the largest logit, the sum of the exponentials and the target's logit:
    three numbers a token. The gradient of x is added up once, for all chunks.
    """
    differentiate = torch.is_grad_enabled()  # inside forward it is always off
    sums: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_RD, targets_N, ranks, chunk, z_loss, differentiate
    )
    return sums


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are taken in the forward pass, where the logits still exist, as on one rank."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_RD: Tensor,
        targets_N: Tensor,
        ranks: Ranks,
        chunk: int,
        z_loss: float,
        differentiate: bool,
    ) -> Tensor:
        wants_x, wants_weight = (differentiate and wanted for wanted in ctx.needs_input_grad[:2])
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        sums = x_ND.new_zeros(2, dtype=wide)
        dx_ND = torch.empty_like(x_ND) if wants_x else None
        dweight_RD = torch.zeros_like(weight_RD, dtype=wide) if wants_weight else None
        for start in range(0, x_ND.shape[0], chunk):
            x, targets = x_ND[start : start + chunk], targets_N[start : start + chunk]
            of_chunk, gradient = _chunk(F.linear(x, weight_RD).to(wide), targets, z_loss, ranks)
            sums += of_chunk
            if dx_ND is not None:
                dx_ND[start : start + chunk] = gradient.to(x.dtype) @ weight_RD
            if dweight_RD is not None:
                dweight_RD += gradient.to(x.dtype).t() @ x
            del gradient  # it is as large as the next chunk's logits
        if dx_ND is not None:
            dist.all_reduce(dx_ND, group=ranks.tp_group)
        ctx.save_for_backward(dx_ND, dweight_RD)
        ctx.weight_dtype = weight_RD.dtype
        return torch.cat([sums[:1] + z_loss * sums[1:], sums])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dweight_RD = ctx.saved_tensors
        dx = None if dx_ND is None else (dx_ND * scales[0]).to(dx_ND.dtype)
        dweight = None if dweight_RD is None else (dweight_RD * scales[0]).to(ctx.weight_dtype)
        return dx, dweight, None, None, None, None, None


def _chunk(logits_NR: Tensor, targets_N: Tensor, z_loss: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """([nats, squares of log Z], gradient_NR), in the memory of the logits."""
    counted_N = targets_N != IGNORED
    row_N, here_N = _own_row(targets_N, logits_NR.shape[1], ranks)
    highest_N = logits_NR.amax(1)
    dist.all_reduce(highest_N, op=dist.ReduceOp.MAX, group=ranks.tp_group)
    logits_NR.sub_(highest_N.unsqueeze(1))
    at_target_N = logits_NR.gather(1, row_N.unsqueeze(1)).squeeze(1).where(here_N, 0)
    both_2N = torch.stack([logits_NR.exp_().sum(1), at_target_N])
    dist.all_reduce(both_2N, group=ranks.tp_group)
    total_N, at_target_N = both_2N
    nats_N = total_N.log() - at_target_N
    log_z_N = total_N.log() + highest_N
    sums = torch.stack([values.where(counted_N, 0).sum() for values in (nats_N, log_z_N.square())])
    # d nats / d logits = softmax - one-hot; d (log Z)^2 / d logits = 2 log Z softmax
    times_N = ((1 + 2 * z_loss * log_z_N) / total_N).where(counted_N, 0)
    logits_NR.mul_(times_N.unsqueeze(1))
    logits_NR.scatter_add_(1, row_N.unsqueeze(1), -here_N.unsqueeze(1).to(logits_NR.dtype))
    return sums, logits_NR
