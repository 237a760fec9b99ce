"""The chunked cross-entropy of a linear layer, whose softmax is a Triton kernel.

    sums = linear_cross_entropy(x_ND, weight_VD, targets_N, chunk=1024, z_loss=0.0)

The products are PyTorch's, as in chunked.py. Between them the kernel reads a chunk's logits twice, for the maximum and
the sum of the exponentials and then for the gradient, which it writes over them: no other matrix of their size exists,
and logits of 16 bits are never widened in memory. A program takes a row, so no sum is shared between programs. The
whole is one operator, which a graph does not look into.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacl.kernels.chunked import dtype_of_dx, dtype_of_products, gradient_scale, sums_and_gradients
from megacl.kernels.reference import IGNORED
from megacl.kernels.tiles import power_of_two, refuse_fp64

_BLOCK = 8192
"""Of a row's logits at a time: 16 for each of 512 threads."""


@triton.jit
def _softmax(
    logits,
    targets,
    nats,
    log_z,
    vocab,
    z_loss,
    scale,
    IGNORED: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    target = tl.load(targets + row)
    if target == IGNORED:
        tl.store(nats + row, 0.0)
        tl.store(log_z + row, 0.0)
        if DIFFERENTIATE:
            for start in range(0, vocab, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(logits + column, tl.zeros([BLOCK], logits.dtype.element_ty), column < vocab)
        return
    at_target = tl.load(logits + target).to(tl.float32)
    highest = float("-inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(logits + column, column < vocab, float("-inf")).to(tl.float32)
        before = highest
        highest = tl.maximum(before, tl.max(values, 0))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(values - highest), 0)
    z = highest + tl.log(total)
    tl.store(nats + row, highest - at_target + tl.log(total))
    tl.store(log_z + row, z)
    if DIFFERENTIATE:
        times = scale * (1.0 + 2.0 * z_loss * z) / total
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = tl.load(logits + column, column < vocab, float("-inf")).to(tl.float32)
            gradient = tl.exp(values - highest) * times - tl.where(column == target, scale, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), column < vocab)


def _launch(
    logits: Tensor, targets: Tensor, z_loss: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`chunked.Softmax`."""
    rows, vocab = logits.shape
    nats, log_z = logits.new_empty(2, rows, dtype=torch.float32)
    block = min(_BLOCK, power_of_two(vocab))
    _softmax[(rows,)](
        logits,
        targets,
        nats,
        log_z,
        vocab,
        z_loss,
        scale or 0.0,
        IGNORED=IGNORED,
        DIFFERENTIATE=scale is not None,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )
    return nats.sum(), log_z.square().sum(), None if scale is None else logits


@torch.library.custom_op("megacl::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk: int,
    z_loss: float,
    dtype: torch.dtype,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums, and the gradients that are wanted, scaled; empty where they are not."""
    sums, dx_ND, dweight_VD = sums_and_gradients(
        x_ND,
        weight_VD,
        targets_N.contiguous(),
        _launch,
        chunk=chunk,
        z_loss=z_loss,
        dtype=dtype,
        wants_x=wants_x,
        wants_weight=wants_weight,
    )
    nothing = sums.new_empty(0)
    return sums, nothing if dx_ND is None else dx_ND, nothing.clone() if dweight_VD is None else dweight_VD


@_linear_cross_entropy.register_fake
def _linear_cross_entropy_shapes(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk: int,
    z_loss: float,
    dtype: torch.dtype,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = x_ND.new_empty(3, dtype=torch.float32)
    dx_ND = x_ND.new_empty(x_ND.shape, dtype=dtype_of_dx(x_ND)) if wants_x else sums.new_empty(0)
    return sums, dx_ND, sums.new_empty(weight_VD.shape if wants_weight else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_ND, weight_VD, _, _, _, dtype, ctx.wants_x, ctx.wants_weight = inputs
    _, dx_ND, dweight_VD = output
    ctx.save_for_backward(dx_ND, dweight_VD)
    ctx.mark_non_differentiable(dx_ND, dweight_VD)
    ctx.scale, ctx.dtypes = gradient_scale(dtype), (x_ND.dtype, weight_VD.dtype)


def _differentiate(ctx: Any, scales: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx_ND, dweight_VD = ctx.saved_tensors
    x_dtype, weight_dtype = ctx.dtypes
    scale = scales[0] / ctx.scale
    dx = (dx_ND * scale).to(x_dtype) if ctx.wants_x else None
    dweight = (dweight_VD * scale).to(weight_dtype) if ctx.wants_weight else None
    return dx, dweight, None, None, None, None, None, None


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_keep)


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int, z_loss: float) -> Tensor:
    """`Kernels.linear_cross_entropy`, holding the logits of at most `chunk` tokens; ValueError for fp64."""
    refuse_fp64(x_ND, weight_VD)
    wants_x, wants_weight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x_ND, weight_VD))
    sums, _, _ = _linear_cross_entropy(
        x_ND, weight_VD, targets_N, chunk, z_loss, dtype_of_products(x_ND), wants_x, wants_weight
    )
    loss: Tensor = sums
    return loss
