"""The ops in plain PyTorch, written as their definitions read: what every faster form is compared with."""

import torch
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


def attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, bounds_D: Tensor) -> Tensor:
    """`kernels.attention` through a mask of B x T x T: causal, and block-diagonal by document."""
    batch, heads, length, _ = q_BHTE.shape
    places_N = torch.arange(batch * length, device=q_BHTE.device, dtype=bounds_D.dtype)
    document_BT = torch.searchsorted(bounds_D, places_N, right=True).view(batch, length)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    mask_B1TT = same_BTT.tril()[:, None]
    return F.scaled_dot_product_attention(
        q_BHTE, k_BKTE, v_BKTE, attn_mask=mask_B1TT, enable_gqa=k_BKTE.shape[1] != heads
    )
