"""Matrix products in fp32 on a CPU by oneDNN, which PyTorch's own linear layer asks for 16 bits alone.

PyTorch multiplies fp32 by MKL, which does not get all out of every maker's cores. tools/bench/kernels.py has both. The
op is the one that torch.compile puts into graphs for inference.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacl.kernels import c_library


def available() -> bool:
    """Whether this build of PyTorch has it."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_faster() -> bool:
    """Whether it is there and faster than what PyTorch multiplies by itself: not where MKL runs on its maker's cores.

    It goes by the maker, not by a measurement: one that came out otherwise in a later process would have a run that
    goes on there add up in another order.
    """
    return available() and not (torch._C.has_mkl and _vendor() == "GenuineIntel")


@functools.cache
def _vendor() -> str:
    """The maker of the CPU as Linux names it; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


# An operator of ours around PyTorch's, which does not say what shape it gives, so that no graph can hold it.
torch.library.define("megacl::onednn_product", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("megacl::onednn_product", "CPU")
def _product(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_FD, bias_F, "none", [], "")
    return y


@torch.library.register_fake("megacl::onednn_product")  # type: ignore[untyped-decorator]
def _product_shape(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_FD.shape[0])


def product(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x weight^T + bias, without a gradient; x [..., D]. In another dtype than fp32 it is PyTorch's own."""
    if x.dtype != torch.float32 or x.numel() == 0:
        return F.linear(x, weight_FD, bias_F)
    y: Tensor = torch.ops.megacl.onednn_product(x, weight_FD, bias_F)
    return y


# What it makes transposed is turned back by turned.c where that can be had: PyTorch copies on one thread, or slowly.
torch.library.define("megacl::turned", "(Tensor x, Tensor? factor) -> Tensor")


@torch.library.impl("megacl::turned", "CPU")
def _turned(x_AB: Tensor, factor: Tensor | None) -> Tensor:
    y_BA = x_AB.new_empty(x_AB.shape[::-1])
    if x_AB.dtype != torch.float32 or not x_AB.is_contiguous() or c_library.unavailable():
        return y_BA.copy_(x_AB.t()) if factor is None else torch.mul(x_AB.t(), factor, out=y_BA)
    rows, columns = (ctypes.c_int64(size) for size in x_AB.shape)
    x, y = c_library.pointers(x_AB, y_BA)
    scale = ctypes.c_float(1.0 if factor is None else factor.item())
    c_library.load().turned(rows, columns, x, scale, y, torch.get_num_threads())
    return y_BA


@torch.library.register_fake("megacl::turned")  # type: ignore[untyped-decorator]
def _turned_shape(x_AB: Tensor, factor: Tensor | None) -> Tensor:
    return x_AB.new_empty(x_AB.shape[::-1])


def turned(x_AB: Tensor, factor: Tensor | None = None) -> Tensor:
    """The transpose, row by row in memory, times a factor of no dimensions; without a gradient."""
    y_BA: Tensor = torch.ops.megacl.turned(x_AB, factor)
    return y_BA


def _transposed_product(a_NF: Tensor, b_ND: Tensor) -> Tensor:
    """a^T b, or b^T a transposed where that has fewer rows.

    oneDNN reads the second factor as it lies; the first, PyTorch would turn on one thread: the shorter one is turned.
    """
    if a_NF.shape[1] <= b_ND.shape[1]:
        return product(turned(a_NF), b_ND.t())
    return turned(product(turned(b_ND), a_NF.t()))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        return product(x, weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_FD = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dy_NF = dy.flatten(0, -2)
        # It copies a factor for this product; that is over before there is dx.
        dweight_FD = _transposed_product(dy_NF, x.flatten(0, -2)) if wants_weight else None
        dx = product(dy, weight_FD.t()) if wants_x else None
        return dx, dweight_FD, dy_NF.sum(0) if wants_bias else None


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`Kernels.linear`; what is not in fp32 goes the reference's way."""
    if x.dtype != torch.float32:
        return F.linear(x, weight_FD, bias_F)
    y: Tensor = _Linear.apply(x, weight_FD, bias_F)  # type: ignore[no-untyped-call]
    return y


def linear_gelu(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, *, tanh: bool = False) -> Tensor:
    """`Kernels.linear_gelu`."""
    return F.gelu(linear(x, weight_FD, bias_F), approximate="tanh" if tanh else "none")
