"""The ops in plain PyTorch, written as their definitions read: what every faster implementation is compared with.

Signatures and meanings stand in `kernels.Kernels`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The target of a token that has none: padding."""


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is wider."""
    return x.float() if x.itemsize < 4 else x


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """total / sqrt(mean(total^2) + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D
    return y.to(x.dtype), total


def layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(total - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016, arXiv 1607.06450)."""
    total = x if residual is None else x + residual
    centred = _wide(total) - _wide(total).mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight_D + bias_D
    return y.to(x.dtype), total


def rotary(x_BHTE: Tensor, cos_PR: Tensor, sin_PR: Tensor) -> Tensor:
    """What lies behind the first 2 R of a head stays (Su et al. 2021, arXiv 2104.09864, GPT-NeoX's pairing)."""
    half = cos_PR.shape[-1]
    first, second, rest = torch.split(x_BHTE, [half, half, x_BHTE.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos_PR - second * sin_PR, second * cos_PR + first * sin_PR)
    return torch.cat([*(part.to(x_BHTE.dtype) for part in turned), rest], dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x weight^T + bias."""
    return F.linear(x, weight_FD, bias_F)


def linear_gelu(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, *, tanh: bool = False) -> Tensor:
    """z Phi(z) of z = x weight^T + bias (Hendrycks & Gimpel 2016, arXiv 1606.08415).

    By tanh it is z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2, as section 2 there has it.
    """
    return F.gelu(F.linear(x, weight_FD, bias_F), approximate="tanh" if tanh else "none")


def attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, no place after one's own) v, the scores whole."""
    length = q_BHTE.shape[2]
    mask_TT = torch.ones(length, length, dtype=torch.bool, device=q_BHTE.device).tril()
    return _attend(q_BHTE, k_BKTE, v_BKTE, mask_TT, scale)


def document_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, bounds_D: Tensor, scale: float) -> Tensor:
    """The same through a mask of B x T x T: causal, and block-diagonal by document."""
    batch, _, length, _ = q_BHTE.shape
    places_N = torch.arange(batch * length, device=q_BHTE.device, dtype=bounds_D.dtype)
    document_BT = torch.searchsorted(bounds_D, places_N, right=True).view(batch, length)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return _attend(q_BHTE, k_BKTE, v_BKTE, same_BTT.tril()[:, None], scale)


def rotary_attention(
    qkv_BTHE: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    bounds_D: Tensor | None,
    kv_heads: int,
    scale: float,
    *,
    attention: Callable[..., Tensor] = attention,
    document_attention: Callable[..., Tensor] = document_attention,
) -> Tensor:
    """The queries and keys turned, then either attention."""
    heads = qkv_BTHE.shape[2] - 2 * kv_heads
    q_BHTE, k_BKTE, v_BKTE = torch.split(qkv_BTHE.transpose(1, 2), [heads, kv_heads, kv_heads], dim=1)
    q_BHTE, k_BKTE = (rotary(x_BHTE, cos_PR, sin_PR) for x_BHTE in (q_BHTE, k_BKTE))
    if bounds_D is None:
        return attention(q_BHTE, k_BKTE, v_BKTE, scale).transpose(1, 2)
    return document_attention(q_BHTE, k_BKTE, v_BKTE, bounds_D, scale).transpose(1, 2)


def _attend(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: Tensor, scale: float) -> Tensor:
    k_BKTE, v_BKTE, grouped = for_each_query(q_BHTE, k_BKTE, v_BKTE)
    return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, scale=scale, enable_gqa=grouped)


def for_each_query(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Keys and values as PyTorch's attention is to have them, and whether it still has to share them among queries.

    On a GPU only flash attention shares them, which is for 16 bits; else PyTorch would compute by all scores at once,
    whose memory grows with the square of the length. There each query head has its own copies.
    """
    group = q_BHTE.shape[1] // k_BKTE.shape[1]
    if group > 1 and repeats_keys(q_BHTE.device.type, q_BHTE.itemsize):
        return k_BKTE.repeat_interleave(group, 1), v_BKTE.repeat_interleave(group, 1), False
    return k_BKTE, v_BKTE, group > 1


def repeats_keys(device: str, itemsize: int) -> bool:
    """Whether values of so many bytes make `for_each_query` repeat keys and values that heads share."""
    return device == "cuda" and itemsize > 2


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int, z_loss: float) -> Tensor:
    """Over the whole matrix of logits at once; `chunk` is not used. z-loss: Chowdhery et al. 2022, arXiv 2204.02311."""
    logits_NV = _wide(F.linear(x_ND, weight_VD))
    counted_N = targets_N != IGNORED
    log_z_N = torch.logsumexp(logits_NV, dim=-1)
    at_target_N = logits_NV.gather(1, targets_N.where(counted_N, 0)[:, None]).squeeze(1)
    nats = (log_z_N - at_target_N).where(counted_N, 0).sum()
    squares = log_z_N.square().where(counted_N, 0).sum()
    return torch.stack([nats + z_loss * squares, nats.detach(), squares.detach()])
