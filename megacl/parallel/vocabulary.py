"""The vocabulary over the ranks of a tensor-parallel group: the embedding, and the loss without whole rows of logits.

Rank r of n has the rows [r V / n, (r + 1) V / n) of the embedding and of the head.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megacl.kernels import IGNORED, chunked
from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import copy_to, cut, reduce_from


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
    """`Kernels.linear_cross_entropy` of a weight of which each rank has R = V / tp_size rows; alike on every rank."""
    softmax = functools.partial(_softmax, ranks=ranks)
    return chunked.linear_cross_entropy(
        copy_to(x_ND, ranks), weight_RD, targets_N, chunk=chunk, z_loss=z_loss, softmax=softmax
    )


def _softmax(
    logits_NR: Tensor, targets_N: Tensor, z_loss: float, scale: float | None, *, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`chunked.Softmax` over the vocabulary of all ranks.

    They tell one another three numbers a token: the largest logit, the sum of the exponentials, the target's logit.
    """
    dtype = logits_NR.dtype
    logits_NR = logits_NR.to(torch.promote_types(dtype, torch.float32))
    counted_N = targets_N != IGNORED
    row_N, here_N = _own_row(targets_N, logits_NR.shape[1], ranks)
    highest_N = logits_NR.amax(1)
    dist.all_reduce(highest_N, op=dist.ReduceOp.MAX, group=ranks.tp_group)
    logits_NR.sub_(highest_N.unsqueeze(1))
    at_target_N = logits_NR.gather(1, row_N.unsqueeze(1)).squeeze(1).where(here_N, 0)
    both_2N = torch.stack([logits_NR.exp_().sum(1), at_target_N])
    dist.all_reduce(both_2N, group=ranks.tp_group)
    total_N, at_target_N = both_2N
    nats = (total_N.log() - at_target_N).where(counted_N, 0).sum()
    log_z_N = total_N.log() + highest_N
    squares = log_z_N.square().where(counted_N, 0).sum()
    if scale is None:
        return nats, squares, None
    # d nats / d logits = softmax - one-hot; d (log Z)^2 / d logits = 2 log Z softmax
    times_N = scale * counted_N if z_loss == 0 else scale * counted_N * (1 + 2 * z_loss * log_z_N)
    at_target_N1 = -scale * here_N.unsqueeze(1).to(logits_NR.dtype)
    gradient_NR = logits_NR.mul_((times_N / total_N).unsqueeze(1)).scatter_add_(1, row_N.unsqueeze(1), at_target_N1)
    return nats, squares, gradient_NR.to(dtype)
