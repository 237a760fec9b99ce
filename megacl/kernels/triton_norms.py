"""RMSNorm and LayerNorm in Triton, with the addition that comes before them in a decoder block fused in.

    y, total = rms_norm(x, weight_D, eps, residual)
    y, total = layer_norm(x, weight_D, bias_D, eps, residual)

x and residual are read once, total and y are written once. For backward, total and two numbers a row are kept; it reads
total and the two gradients once and writes one. Under autocast y comes in autocast's dtype, to which the matrix product
behind it would cast it in a pass of its own. Everything is computed in fp32. Each program of the backward kernel
adds up its own rows' part of the weight's gradient and writes it to a row of its own, so that no order of additions is
left to chance. A row's squares must not overflow fp32: values up to some 1e18 / sqrt(D) are right.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacl.kernels.tiles import programs_for, refuse_fp64, whole_rows


@triton.jit
def _forward(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    mean,
    scale,
    rows,
    width,
    eps,
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    values = tl.load(x + place, inside, 0.0).to(tl.float32)
    if ADD:
        added = (values + tl.load(residual + place, inside, 0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + place, added, inside)
        values = added.to(tl.float32)  # what is normalised is what was kept
    if CENTRE:
        centre = tl.sum(values, 1) / width
        tl.store(mean + row, centre, row < rows)
        values = tl.where(inside, values - centre[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 1) / width + eps)
    tl.store(scale + row, inverse, row < rows)
    normal = values * inverse[:, None] * tl.load(weight + column, column < width, 0.0).to(tl.float32)[None, :]
    if CENTRE:
        normal += tl.load(bias + column, column < width, 0.0).to(tl.float32)[None, :]
    tl.store(y + place, normal.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    total,
    weight,
    mean,
    scale,
    dy,
    dtotal,
    dx,
    dweight,
    dbias,
    rows,
    width,
    rows_each,
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    weights = tl.load(weight + column, column < width, 0.0).to(tl.float32)[None, :]
    weight_part = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_part = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows_each, ROWS):
        row = program * rows_each + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        values = tl.load(total + place, inside, 0.0).to(tl.float32)
        inverse = tl.load(scale + row, row < rows, 0.0)[:, None]
        if CENTRE:
            values -= tl.load(mean + row, row < rows, 0.0)[:, None]
        normal = tl.where(inside, values * inverse, 0.0)
        coming = tl.load(dy + place, inside, 0.0).to(tl.float32)
        weight_part += coming * normal
        coming_in = coming * weights
        going = coming_in - normal * (tl.sum(coming_in * normal, 1) / width)[:, None]
        if CENTRE:
            bias_part += coming
            going -= (tl.sum(coming_in, 1) / width)[:, None]
        going *= inverse
        if ADD:
            going += tl.load(dtotal + place, inside, 0.0).to(tl.float32)
        tl.store(dx + place, going.to(dx.dtype.element_ty), inside)
    part = program * width + column
    tl.store(dweight + part, tl.sum(weight_part, 0), column < width)
    if CENTRE:
        tl.store(dbias + part, tl.sum(bias_part, 0), column < width)


@torch.library.custom_op("megacl::norm", mutates_args=())
def _norm(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in dtype; total, empty without a residual; each row's mean, empty without a bias, and inverse deviation."""
    y, total, mean, scale = _norm_shapes(x, residual, weight_D, bias_D, eps, dtype)
    width = weight_D.numel()
    rows = x.numel() // max(1, width)
    tiles = whole_rows(rows, width)
    if rows:
        _forward[(triton.cdiv(rows, tiles.rows),)](
            x.contiguous(),
            x if residual is None else residual.contiguous(),
            weight_D.contiguous(),
            weight_D if bias_D is None else bias_D.contiguous(),
            y,
            total,
            mean,
            scale,
            rows,
            width,
            eps,
            ADD=residual is not None,
            CENTRE=bias_D is not None,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            num_warps=tiles.warps,
        )
    return y, total, mean, scale


@_norm.register_fake
def _norm_shapes(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=dtype)
    if residual is None:
        total = x.new_empty(0)
    else:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean = x.new_empty(0 if bias_D is None else x.shape[:-1], dtype=torch.float32)
    return y, total, mean, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("megacl::norm_backward", mutates_args=())
def _norm_backward(
    total: Tensor,
    weight_D: Tensor,
    mean: Tensor,
    scale: Tensor,
    dy: Tensor,
    dtotal: Tensor | None,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of total, the weight and the bias (empty where there is none)."""
    width = weight_D.numel()
    rows = total.numel() // max(1, width)
    tiles = whole_rows(rows, width)
    work = triton.cdiv(rows, tiles.rows)
    programs = programs_for(work, total.device)
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    weight_parts = total.new_empty(programs, width, dtype=torch.float32)
    bias_parts = total.new_empty(programs if has_bias else 0, width, dtype=torch.float32)
    _backward[(programs,)](
        total.contiguous(),
        weight_D.contiguous(),
        mean,
        scale,
        dy.contiguous(),
        total if dtotal is None else dtotal.contiguous(),
        dx,
        weight_parts,
        bias_parts,
        rows,
        width,
        triton.cdiv(work, programs) * tiles.rows,
        ADD=dtotal is not None,
        CENTRE=has_bias,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
    )
    dbias = bias_parts.sum(0).to(weight_D.dtype) if has_bias else weight_D.new_empty(0)
    return dx, weight_parts.sum(0).to(weight_D.dtype), dbias


@_norm_backward.register_fake
def _norm_backward_shapes(
    total: Tensor,
    weight_D: Tensor,
    mean: Tensor,
    scale: Tensor,
    dy: Tensor,
    dtotal: Tensor | None,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight_D), weight_D.new_empty(weight_D.shape if has_bias else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight_D, bias_D, *_ = inputs
    _, total, mean, scale = output
    ctx.save_for_backward(x if residual is None else total, weight_D, mean, scale)
    ctx.mark_non_differentiable(mean, scale)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.has_bias = bias_D is not None
    ctx.set_materialize_grads(False)  # nobody has to fill memory with zeros for an output that is not used


def _differentiate(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    total, weight_D, mean, scale = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    if residual_dtype is None:
        dtotal = None  # that of the empty tensor
    if dy is None:
        dx, dweight, dbias = dtotal, None, None
    else:
        dx, dweight, dbias = _norm_backward(total, weight_D, mean, scale, dy, dtotal, ctx.has_bias)
    if dx is None:
        return (None,) * 6
    dresidual = None if residual_dtype is None else dx.to(residual_dtype)
    return dx.to(x_dtype), dresidual, dweight, dbias if ctx.has_bias else None, None, None


_norm.register_autograd(_differentiate, setup_context=_keep)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`Kernels.rms_norm`; ValueError for fp64."""
    return _normalise(x, residual, weight_D, None, eps)


def layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`Kernels.layer_norm`; ValueError for fp64."""
    return _normalise(x, residual, weight_D, bias_D, eps)


def _normalise(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    refuse_fp64(x, residual)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    y, total, _, _ = _norm(x, residual, weight_D, bias_D, eps, dtype)
    return y, x if residual is None else total
