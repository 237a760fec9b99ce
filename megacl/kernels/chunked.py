"""Cross-entropy of a linear layer, the logits of `chunk` tokens at a time.

    sums = linear_cross_entropy(x_ND, weight_VD, targets_N, chunk=1024, z_loss=0.0)

The logits of a batch, tokens x vocabulary, are the largest tensor of a language model by far; a chunk's share of them
is made, turned into its loss and its gradient, and overwritten by the next. The gradients are taken in the forward
pass, where the logits still exist, so that backward only scales them and nothing is computed twice.

Where products are in 16 bits, what they add up is kept in fp32. fp16 has no room for small numbers: there the gradient
of the logits is multiplied by 2^12, so that probabilities down to 1e-11 count, and what comes of it is held in fp32
until backward multiplies by the loss scale.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacl.kernels import onednn
from megacl.kernels.reference import IGNORED

Product = Callable[[Tensor, Tensor], Tensor]
"""(x_ND, weight_VD) -> x weight^T."""

Softmax = Callable[[Tensor, Tensor, float, float | None], tuple[Tensor, Tensor, Tensor | None]]
"""(logits, targets, z_loss, scale) -> the sums of nats and (log Z)^2, and scale times the gradient of nats + z_loss
(log Z)^2 in the logits, in their dtype; None where scale is None. It may overwrite the logits."""


def sums_and_gradients(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    softmax: Softmax,
    *,
    product: Product = F.linear,
    chunk: int,
    z_loss: float,
    dtype: torch.dtype,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The three sums, and `gradient_scale(dtype)` times the gradients of the first.

    dtype: of the products. The gradient of x is in its dtype, but in fp32 where that is fp16; the weight's is in fp32,
    or fp64 for fp64, and may be a view of its transpose.
    """
    wide = torch.promote_types(dtype, torch.float32)
    scale = gradient_scale(dtype) if wants_x or wants_weight else None
    with torch.autocast(x_ND.device.type, enabled=False):
        weight = weight_VD.to(dtype)
        sums = x_ND.new_zeros(2, dtype=wide)
        dx_ND = x_ND.new_empty(x_ND.shape, dtype=dtype_of_dx(x_ND)) if wants_x else None
        # oneDNN adds to nothing that was there before, and is twice as fast where what it makes has long rows.
        turned = product is onednn.product and dtype == torch.float32
        dweight_VD = None
        if wants_weight:
            shape_DV = weight.shape[::-1]
            dweight_VD = weight.new_zeros(shape_DV).t() if turned else weight.new_zeros(weight.shape, dtype=wide)
        for start in range(0, x_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            x = x_ND[rows].to(dtype)
            nats, squares, gradient = softmax(product(x, weight), targets_N[rows], z_loss, scale)
            sums += torch.stack([nats, squares])
            if gradient is None:
                continue
            if dx_ND is not None:
                dx_ND[rows] = _product(gradient, weight, dx_ND.dtype, product)
            if dweight_VD is not None and turned:
                dweight_VD += product(onednn.turned(x), gradient.t()).t()
            elif dweight_VD is not None:
                _add_product(dweight_VD, gradient.t(), x)
            del gradient  # before there are the next chunk's logits
    nats, squares = sums
    objective = nats + z_loss * squares if z_loss else nats  # squares that overflow are nobody's loss then
    return torch.stack([objective, nats, squares]), dx_ND, dweight_VD


def gradient_scale(dtype: torch.dtype) -> float:
    """What gradients of logits are multiplied by, a power of two."""
    return 4096.0 if dtype == torch.float16 else 1.0


def dtype_of_dx(x: Tensor) -> torch.dtype:
    """In which x's gradient waits for backward."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, product: Product) -> Tensor:
    """a @ b, added up and returned in dtype: that of a, or a wider one."""
    if a.dtype == dtype:
        return product(a, b.t())
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)  # a CPU has no such product, and those of 16 bits are slow there anyway


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than a and b."""
    if a.dtype != total.dtype and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def softmax(
    logits: Tensor, targets: Tensor, z_loss: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Softmax` in plain PyTorch."""
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    counted = targets != IGNORED
    at = targets.where(counted, 0).unsqueeze(1)
    highest, at_target = logits.amax(1, keepdim=True), logits.gather(1, at)
    # All in the logits' own memory: softmax in one pass, then d nats / d logits = softmax - one-hot.
    torch.softmax(logits, 1, out=logits)
    above_highest = -logits.amax(1, keepdim=True).log()  # softmax of the highest is 1 / sum(exp(logits - highest))
    nats = (above_highest + (highest - at_target)).squeeze(1).where(counted, 0).sum()
    log_z = above_highest + highest
    squares = log_z.square().squeeze(1).where(counted, 0).sum()
    if scale is None:
        return nats, squares, None
    once = scale * counted.unsqueeze(1).to(logits.dtype)
    # d (log Z)^2 / d logits = 2 log Z softmax
    times = once if z_loss == 0 else once * (1 + 2 * z_loss * log_z)
    return nats, squares, logits.mul_(times).scatter_add_(1, at, -once).to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        softmax: Softmax,
        product: Product,
        chunk: int,
        z_loss: float,
        differentiate: bool,
    ) -> Tensor:
        wants_x, wants_weight = (differentiate and wanted for wanted in ctx.needs_input_grad[:2])
        dtype = dtype_of_products(x_ND)
        sums, dx_ND, dweight_VD = sums_and_gradients(
            x_ND,
            weight_VD,
            targets_N,
            softmax,
            product=product,
            chunk=chunk,
            z_loss=z_loss,
            dtype=dtype,
            wants_x=wants_x,
            wants_weight=wants_weight,
        )
        ctx.save_for_backward(dx_ND, dweight_VD)
        ctx.scale, ctx.dtypes = gradient_scale(dtype), (x_ND.dtype, weight_VD.dtype)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: Tensor) -> tuple[Tensor | None, ...]:
        scale = scales[0] / ctx.scale
        gradients = (
            None if gradient is None else _scaled(gradient, scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None, None, None


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """Row by row in memory, as its parameter is: also where oneDNN made it transposed."""
    return gradient * scale if gradient.is_contiguous() else onednn.turned(gradient.t(), scale)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """Autocast's, where it is on; else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    chunk: int,
    z_loss: float,
    softmax: Softmax = softmax,
    product: Product = F.linear,
) -> Tensor:
    """`Kernels.linear_cross_entropy`, holding the logits of at most `chunk` tokens."""
    differentiate = torch.is_grad_enabled()  # inside forward it is always off
    sums: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, targets_N, softmax, product, chunk, z_loss, differentiate
    )
    return sums


def linear_cross_entropy_by_onednn(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int, z_loss: float
) -> Tensor:
    """The same, with the products that onednn.py is for."""
    return linear_cross_entropy(x_ND, weight_VD, targets_N, chunk=chunk, z_loss=z_loss, product=onednn.product)
