"""GELU with the bias of the layer before it, by gelu.c: a CPU's, in fp32.

One pass forward, and one backward that sums up the bias' gradient too. The product stands alone, so that selective
checkpointing keeps it and computes the rest again.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megacl.kernels import c_library, onednn, reference

_ROWS = 64
"""Whose part of the bias' gradient is summed up by one thread; the parts are added in their order."""


# Not torch.library.custom_op: its first call imports the compiler, which takes two seconds.
torch.library.define("megacl::c_gelu", "(Tensor x, Tensor bias, bool tanh) -> Tensor")
torch.library.define("megacl::c_gelu_backward", "(Tensor dy, Tensor x, Tensor bias, bool tanh) -> (Tensor, Tensor)")


@torch.library.impl("megacl::c_gelu", "CPU")
def _gelu(x_NF: Tensor, bias_F: Tensor, tanh: bool) -> Tensor:
    """x and bias contiguous, in fp32. ValueError where the bias is of another width."""
    if bias_F.shape != x_NF.shape[1:]:
        raise ValueError(f"a product of shape {[*x_NF.shape]} has no bias of {[*bias_F.shape]}")
    y_NF = torch.empty_like(x_NF)
    sizes = c_library.rows_and_width(x_NF)
    c_library.load().gelu_forward(*sizes, *c_library.pointers(x_NF, bias_F, y_NF), tanh, torch.get_num_threads())
    return y_NF


@torch.library.register_fake("megacl::c_gelu")  # type: ignore[untyped-decorator]
def _gelu_shape(x_NF: Tensor, bias_F: Tensor, tanh: bool) -> Tensor:
    return torch.empty_like(x_NF)


@torch.library.impl("megacl::c_gelu_backward", "CPU")
def _gelu_backward(dy_NF: Tensor, x_NF: Tensor, bias_F: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    dx_NF = torch.empty_like(x_NF)
    sums = x_NF.new_zeros(-(-x_NF.shape[0] // _ROWS), x_NF.shape[1])
    sizes = c_library.rows_and_width(x_NF)
    dy_NF = dy_NF.contiguous()
    tensors = c_library.pointers(x_NF, bias_F, dy_NF, dx_NF, sums)
    c_library.load().gelu_backward(*sizes, *tensors, ctypes.c_int64(_ROWS), tanh, torch.get_num_threads())
    return dx_NF, sums.sum(0)


@torch.library.register_fake("megacl::c_gelu_backward")  # type: ignore[untyped-decorator]
def _gelu_backward_shape(dy_NF: Tensor, x_NF: Tensor, bias_F: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NF), torch.empty_like(bias_F)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tanh = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy_NF: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.megacl.c_gelu_backward(dy_NF, *ctx.saved_tensors, ctx.tanh), None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("GELU by megacl::c_gelu has no second derivative")


torch.library.register_autograd("megacl::c_gelu", _differentiate, setup_context=_keep)
torch.library.register_autograd("megacl::c_gelu_backward", _refuse)


def linear_gelu(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, *, tanh: bool = False) -> Tensor:
    """`Kernels.linear_gelu`; what is not in fp32 is PyTorch's."""
    product = onednn.linear if onednn.is_faster() else reference.linear
    z = product(x, weight_FD)
    bias = z.new_zeros(z.shape[-1]) if bias_F is None else bias_F
    if z.dtype != torch.float32 or bias.dtype != torch.float32 or not z.numel():
        return F.gelu(z + bias, approximate="tanh" if tanh else "none")
    y: Tensor = torch.ops.megacl.c_gelu(z.reshape(-1, z.shape[-1]), bias.contiguous(), tanh)
    return y.view_as(z)
