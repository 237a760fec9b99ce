"""Attention inside documents that lie end to end, by their bounds: no score across a bound is computed.

A batch is laid flat, its rows end to end, so that the documents of all rows are one list. Two functions of one
signature go through it: flash attention in one call, for a GPU in 16 bits, and a loop over the documents, for a CPU.
Flash attention is tested on a GPU by tests/kernels/test_attention.py alone, where there is one; that was not done yet.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def flash(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, bounds_D: Tensor, scale: float) -> Tensor:
    """`Kernels.document_attention` by flash attention: on a GPU, in 16 bits."""
    return _over_flat(_flash, q_BHTE, k_BKTE, v_BKTE, bounds_D, scale)


def one_by_one(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, bounds_D: Tensor, scale: float) -> Tensor:
    """`Kernels.document_attention`, one document after another."""
    return _over_flat(_one_by_one, q_BHTE, k_BKTE, v_BKTE, bounds_D, scale)


def _over_flat(
    attend: Callable[..., Tensor], q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, bounds_D: Tensor, scale: float
) -> Tensor:
    """attend: (q_NHE, k_NKE, v_NKE, bounds_D, longest=, scale=) -> mixed_NHE, N = B T; no document exceeds longest."""
    batch, heads, length, width = q_BHTE.shape
    # Flash attention takes widths that are multiples of 8; added zeros change neither scores nor what is mixed.
    flat = (F.pad(x.transpose(1, 2).flatten(0, 1), (0, -width % 8)) for x in (q_BHTE, k_BKTE, v_BKTE))
    mixed_NHE = attend(*flat, bounds_D, longest=length, scale=scale)[..., :width]
    return mixed_NHE.reshape(batch, length, heads, width).transpose(1, 2)


def _flash(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, bounds_D: Tensor, *, longest: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # brings the compiler with it, which takes a second

    grouped = q_NHE.shape[1] != k_NKE.shape[1]
    causal = (-1, 0)
    mixed_NHE = varlen_attn(
        q_NHE, k_NKE, v_NKE, bounds_D, bounds_D, longest, longest, scale=scale, window_size=causal, enable_gqa=grouped
    )
    assert isinstance(mixed_NHE, Tensor), "no auxiliary output was asked for"
    return mixed_NHE


def _one_by_one(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, bounds_D: Tensor, *, longest: int, scale: float) -> Tensor:
    lengths = bounds_D.diff().tolist()
    grouped = q_NHE.shape[1] != k_NKE.shape[1]
    by_document = zip(*(torch.split(x.transpose(0, 1), lengths, dim=1) for x in (q_NHE, k_NKE, v_NKE)), strict=True)
    mixed_HNE = torch.cat(
        [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=grouped)
            for q, k, v in by_document
        ],
        dim=2,
    )[0]
    return mixed_HNE.transpose(0, 1)
