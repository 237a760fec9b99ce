"""The ops in plain PyTorch, written as their definitions read: what every faster form is compared with."""

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int, ignore_index: int
) -> Tensor:
    """`kernels.linear_cross_entropy` over the whole matrix of logits at once; `chunk` is not used."""
    logits_NV = F.linear(x_ND, weight_VD)
    if logits_NV.itemsize < 4:
        logits_NV = logits_NV.float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="sum")
