"""A linear layer's bias and the GELU after it, in Triton.

    y = linear_gelu(x, weight_FD, bias_F)  # gelu(x weight^T + bias), gelu(u) = u (1 + erf(u / sqrt(2))) / 2

With tanh=True it is gelu(u) = u (1 + tanh(v)) / 2 = u sigmoid(2 v), v = sqrt(2 / pi) (u + 0.044715 u^3).

The product x weight^T is PyTorch's. It is kept for backward as it came, and y is computed from it in one pass; backward
reads it and y's gradient once, and adds up the bias's gradient as it goes: each program a part of the rows, in a row of
its own, so that no order of additions is left to chance.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megacl.kernels.tiles import any_part, programs_for, refuse_fp64

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi), of the normal distribution at 0
_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)
_FAR = tl.constexpr(12.0)  # from where on, by tanh, the sigmoid is 0 or 1 in fp32, and u^3 not yet infinite
_NAN = tl.constexpr(tl.PropagateNan.ALL)  # left to itself a GPU makes a number of it, which the interpreter does not


@triton.jit
def _forward(x, bias, y, rows, width, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < width)
    u = tl.load(x + row * width + column, inside, 0.0).to(tl.float32)
    u += tl.load(bias + column, column < width, 0.0).to(tl.float32)
    if TANH:
        near = tl.minimum(tl.maximum(u, -_FAR, _NAN), _FAR, _NAN)
        gelu = tl.maximum(u, -_FAR, _NAN) * tl.sigmoid(near * _SLOPE * (1.0 + near * near * _CUBIC))
    else:
        gelu = 0.5 * u * (1.0 + tl.erf(u * _SQRT_HALF))
    tl.store(y + row * width + column, gelu.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    x, bias, dy, dx, dbias, rows, width, rows_each, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    biases = tl.load(bias + column, column < width, 0.0).to(tl.float32)[None, :]
    part = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows_each, ROWS):
        row = (program * rows_each + start + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < width)[None, :]
        place = row * width + column[None, :]
        u = tl.load(x + place, inside, 0.0).to(tl.float32) + biases
        if TANH:
            near = tl.minimum(tl.maximum(u, -_FAR, _NAN), _FAR, _NAN)
            part_of_u = tl.sigmoid(near * _SLOPE * (1.0 + near * near * _CUBIC))
            rises = part_of_u * (1.0 - part_of_u) * _SLOPE * (1.0 + near * near * 3.0 * _CUBIC)
            slope = part_of_u + near * rises
        else:
            slope = 0.5 * (1.0 + tl.erf(u * _SQRT_HALF)) + u * _DENSITY * tl.exp(-0.5 * u * u)
        going = tl.load(dy + place, inside, 0.0).to(tl.float32) * slope
        part += going
        tl.store(dx + place, going.to(dx.dtype.element_ty), inside)
    tl.store(dbias + program * width + column, tl.sum(part, 0), column < width)


@torch.library.custom_op("megacl::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias_F: Tensor, tanh: bool) -> Tensor:
    y: Tensor = _bias_gelu_shape(x, bias_F, tanh)
    width = bias_F.numel()
    rows = x.numel() // max(1, width)
    if rows:
        tiles = any_part(rows, width)
        grid = triton.cdiv(rows, tiles.rows), triton.cdiv(width, tiles.columns)
        _forward[grid](
            x.contiguous(),
            bias_F.contiguous(),
            y,
            rows,
            width,
            TANH=tanh,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            num_warps=tiles.warps,
        )
    return y


@_bias_gelu.register_fake
def _bias_gelu_shape(x: Tensor, bias_F: Tensor, tanh: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("megacl::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(x: Tensor, bias_F: Tensor, dy: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias."""
    width = bias_F.numel()
    rows = x.numel() // max(1, width)
    tiles = any_part(rows, width)
    across = triton.cdiv(width, tiles.columns)
    work = triton.cdiv(rows, tiles.rows)
    programs = programs_for(work, x.device, beside=across)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = x.new_empty(programs, width, dtype=torch.float32)
    _backward[(programs, across)](
        x.contiguous(),
        bias_F.contiguous(),
        dy.contiguous(),
        dx,
        parts,
        rows,
        width,
        triton.cdiv(work, programs) * tiles.rows,
        TANH=tanh,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
    )
    return dx, parts.sum(0).to(bias_F.dtype)


@_bias_gelu_backward.register_fake
def _bias_gelu_backward_shapes(x: Tensor, bias_F: Tensor, dy: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias_F)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    x, bias_F, ctx.tanh = inputs
    ctx.save_for_backward(x, bias_F)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    dx, dbias = _bias_gelu_backward(*ctx.saved_tensors, dy, ctx.tanh)
    return dx, dbias, None


_bias_gelu.register_autograd(_differentiate, setup_context=_keep)


def linear_gelu(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, *, tanh: bool = False) -> Tensor:
    """`Kernels.linear_gelu`; ValueError for fp64. Without a bias the GELU is PyTorch's, one pass as well."""
    refuse_fp64(x)
    if bias_F is None:
        return F.gelu(F.linear(x, weight_FD), approximate="tanh" if tanh else "none")
    y: Tensor = _bias_gelu(F.linear(x, weight_FD), bias_F, tanh)
    return y
