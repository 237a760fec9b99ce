"""Cross-entropy of a linear layer, the logits of `chunk` tokens at a time.

The logits of a batch, tokens x vocabulary, are the largest tensor of a language model by far; a chunk's share of them
is made, turned into its loss and its gradient, and overwritten by the next. The gradients are taken in the forward
pass, where the logits still exist, so that backward only scales them and nothing is computed twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacl.kernels.reference import IGNORED


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, z_loss: float, differentiate: bool
    ) -> Tensor:
        wants_x, wants_weight = (differentiate and wanted for wanted in ctx.needs_input_grad[:2])
        matmul_dtype, wide = _dtypes(x_ND)
        with torch.autocast(x_ND.device.type, enabled=False):
            weight = weight_VD.to(matmul_dtype)
            nats, squares = x_ND.new_zeros(2, dtype=wide)
            dx_ND = torch.empty_like(x_ND) if wants_x else None
            dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
            for start in range(0, x_ND.shape[0], chunk):
                rows = slice(start, start + chunk)
                x, targets = x_ND[rows].to(matmul_dtype), targets_N[rows]
                logits = F.linear(x, weight).to(wide)
                counted = targets != IGNORED
                at = targets.where(counted, 0).unsqueeze(1)
                # All in the logits' own memory: softmax's numerators, then d nats / d logits = softmax - one-hot.
                highest = logits.amax(1, keepdim=True)
                logits.sub_(highest)
                at_target = logits.gather(1, at)
                total = logits.exp_().sum(1, keepdim=True)
                nats += (total.log() - at_target).squeeze(1).where(counted, 0).sum()
                log_z = total.log() + highest
                squares += log_z.square().squeeze(1).where(counted, 0).sum()
                if not (wants_x or wants_weight):
                    continue
                once = counted.unsqueeze(1).to(wide)
                # d (log Z)^2 / d logits = 2 log Z softmax
                times = once if z_loss == 0 else once * (1 + 2 * z_loss * log_z)
                gradient = logits.mul_(times / total).scatter_add_(1, at, -once).to(matmul_dtype)
                if dx_ND is not None:
                    dx_ND[rows] = gradient @ weight
                if dweight_VD is not None and matmul_dtype == wide:
                    dweight_VD.addmm_(gradient.t(), x)
                elif dweight_VD is not None:
                    dweight_VD += gradient.t() @ x
        ctx.save_for_backward(dx_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return torch.stack([nats + z_loss * squares, nats, squares])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dweight_VD = ctx.saved_tensors
        scale = scales[0]
        dx = None if dx_ND is None else (dx_ND * scale).to(dx_ND.dtype)
        dweight = None if dweight_VD is None else (dweight_VD * scale).to(ctx.weight_dtype)
        return dx, dweight, None, None, None, None


def _dtypes(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the matrix products (autocast's, where it is on) and that of the logarithms: fp32, or wider."""
    device = x.device.type
    matmul = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return matmul, torch.promote_types(matmul, torch.float32)


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int, z_loss: float) -> Tensor:
    """`Kernels.linear_cross_entropy`, holding the logits of at most `chunk` tokens."""
    differentiate = torch.is_grad_enabled()  # inside forward it is always off
    sums: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, targets_N, chunk, z_loss, differentiate
    )
    return sums
