"""The ops as PyTorch's own kernels have them, which pick what is best on the device."""

import torch.nn.functional as F
from torch import Tensor

from megacl.kernels.reference import for_each_query


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`Kernels.rms_norm`."""
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight_D.shape, weight_D, eps), total


def layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`Kernels.layer_norm`."""
    total = x if residual is None else x + residual
    return F.layer_norm(total, weight_D.shape, weight_D, bias_D, eps), total


def attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, scale: float) -> Tensor:
    """`Kernels.attention`."""
    k_BKTE, v_BKTE, grouped = for_each_query(q_BHTE, k_BKTE, v_BKTE)
    return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, scale=scale, enable_gqa=grouped)
