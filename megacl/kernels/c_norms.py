"""LayerNorm and RMSNorm by norms.c: a CPU's, in fp32, with the sum before them in the same pass, forward and backward.

They keep the total and a number or two a row.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from megacl.kernels import c_library, fused, lean

_ROWS = 64
"""Whose part of the parameters' gradients is summed up by one thread; the parts are added in their order."""


# Not torch.library.custom_op: its first call imports the compiler, which takes two seconds. What an operator gives may
# not be what it was given, so that a norm without a residual is another one.
torch.library.define("megacl::c_norm", "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)")
torch.library.define(
    "megacl::c_add_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "megacl::c_norm_backward",
    "(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor statistics) -> (Tensor, Tensor)",
)


@torch.library.impl("megacl::c_norm", "CPU")
def _norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (y [..., D], statistics [rows, 2], 1 / deviation and mean, or [rows, 1] of an RMSNorm, which has no
    bias), all in fp32. ValueError where shapes do not fit."""
    y, _, statistics = _run_forward(x, None, weight_D, bias_D, eps)
    return y, statistics


@torch.library.impl("megacl::c_add_norm", "CPU")
def _add_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, total, statistics), as `_norm`."""
    return _run_forward(x, residual, weight_D, bias_D, eps)


def _run_forward(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight_D = x.contiguous(), weight_D.contiguous()
    residual = None if residual is None else residual.contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    if residual is None:
        total, (y, statistics) = x, _norm_shapes(x, weight_D, bias_D, eps)
    else:
        y, total, statistics = _add_norm_shapes(x, residual, weight_D, bias_D, eps)
    c_library.load().norm_forward(
        *c_library.rows_and_width(x),
        *c_library.pointers(x, residual, weight_D, bias_D),
        ctypes.c_float(eps),
        *c_library.pointers(total, y, statistics),
        torch.get_num_threads(),
    )
    return y, total, statistics


@torch.library.register_fake("megacl::c_norm")  # type: ignore[untyped-decorator]
def _norm_shapes(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    for parameter in (weight_D, bias_D):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(f"a norm of x of shape {[*x.shape]} has no weight or bias of {[*parameter.shape]}")
    rows = x.numel() // max(1, x.shape[-1])
    return x.new_empty(x.shape), x.new_empty(rows, 1 if bias_D is None else 2)


@torch.library.register_fake("megacl::c_add_norm")  # type: ignore[untyped-decorator]
def _add_norm_shapes(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if residual.shape != x.shape:
        raise ValueError(f"x of shape {[*x.shape]} has no residual of {[*residual.shape]}")
    y, statistics = _norm_shapes(x, weight_D, bias_D, eps)
    return y, x.new_empty(x.shape), statistics


@torch.library.impl("megacl::c_norm_backward", "CPU")
def _norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight_D: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """(the gradient of x, which is that of the residual, and [1 or 2, D], those of weight and bias), in fp32."""
    dy, total, weight_D = dy.contiguous(), total.contiguous(), weight_D.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    statistics = statistics.contiguous()
    rows, kept = statistics.shape
    dx = torch.empty_like(dy)
    sums = dy.new_zeros(-(-rows // _ROWS), kept, dy.shape[-1])
    c_library.load().norm_backward(
        *c_library.rows_and_width(dy),
        *c_library.pointers(dy, dtotal, total, weight_D, statistics),
        kept == 2,
        *c_library.pointers(dx, sums),
        ctypes.c_int64(_ROWS),
        torch.get_num_threads(),
    )
    return dx, sums.sum(0)


@torch.library.register_fake("megacl::c_norm_backward")  # type: ignore[untyped-decorator]
def _norm_backward_shapes(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight_D: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(statistics.shape[1], dy.shape[-1])


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight_D, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight_D, output[1])


def _differentiate_norm(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight_D, dbias_D = _gradients(ctx, dy, None)
    return dx, dweight_D, dbias_D, None


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight_D, _, _ = inputs
    _, total, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(total, weight_D, statistics)


def _differentiate_add_norm(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    dx, dweight_D, dbias_D = _gradients(ctx, dy, dtotal)
    return dx, dx, dweight_D, dbias_D, None


def _gradients(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the total, the weight and the bias; of a y that is not used there is none."""
    total, weight_D, statistics = ctx.saved_tensors
    if dy is None:
        return dtotal, None, None
    dx, (dweight_D, *dbias_D) = torch.ops.megacl.c_norm_backward(dy, dtotal, total, weight_D, statistics)
    return dx, dweight_D, dbias_D[0] if dbias_D else None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("a norm by megacl::c_norm has no second derivative")


torch.library.register_autograd("megacl::c_norm", _differentiate_norm, setup_context=_keep_norm)
torch.library.register_autograd("megacl::c_add_norm", _differentiate_add_norm, setup_context=_keep_add_norm)
torch.library.register_autograd("megacl::c_norm_backward", _refuse)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`Kernels.rms_norm`; what is not all in fp32 is PyTorch's."""
    if not _in_fp32(x, weight_D, residual):
        return lean.rms_norm(x, weight_D, eps, residual)
    return _norm_of(x, weight_D, None, eps, residual)


def layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`Kernels.layer_norm`; what is not all in fp32 is PyTorch's."""
    if not _in_fp32(x, weight_D, bias_D, residual):
        return fused.layer_norm(x, weight_D, bias_D, eps, residual)
    return _norm_of(x, weight_D, bias_D, eps, residual)


def _in_fp32(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


def _norm_of(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    if residual is None:
        return torch.ops.megacl.c_norm(x, weight_D, bias_D, eps)[0], x
    y, total, _ = torch.ops.megacl.c_add_norm(x, residual, weight_D, bias_D, eps)
    return y, total
