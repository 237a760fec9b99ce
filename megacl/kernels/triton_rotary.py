"""Rotary position in Triton: all heads of queries and keys in one launch, rotated in whole or in part.

    rotated_BHTE = rotary(x_BHTE, cos_PR, sin_PR)

x may be a view with any strides, such as what a matrix product left behind, seen by heads. Each value is read and
written once. Nothing is kept for backward but the tables: the gradient is rotated back, with the sine negated.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacl.kernels.tiles import refuse_fp64, whole_rows


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    y,
    heads,
    length,
    width,
    x_batch,
    x_head,
    x_place,
    x_element,
    y_batch,
    y_head,
    y_place,
    y_element,
    table_batch,
    table_place,
    HALF: tl.constexpr,
    DIRECTION: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # A program takes one token and some of its heads, which share a row of the tables.
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // length, token % length
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    element = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (element < width)
    turned = element < 2 * HALF
    partner = tl.where(element < HALF, element + HALF, element - HALF)
    angle = batch * table_batch + place * table_place + element % HALF
    cosine = tl.load(cos + angle, turned, 1.0).to(tl.float32)
    sine = tl.load(sin + angle, turned, 0.0).to(tl.float32)
    sine *= tl.where(element < HALF, -DIRECTION, DIRECTION)  # y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin
    begin = x + batch * x_batch + place * x_place + head * x_head
    values = tl.load(begin + element * x_element, inside, 0.0)
    # The partners come from the same lines of the cache.
    partners = tl.load(begin + partner * x_element, inside & turned, 0.0).to(tl.float32)
    rotated = (values.to(tl.float32) * cosine + partners * sine).to(y.dtype.element_ty)
    y_at = y + batch * y_batch + place * y_place + head * y_head + element * y_element
    tl.store(y_at, tl.where(turned, rotated, values), inside)


@torch.library.custom_op("megacl::rotary", mutates_args=())
def _rotary(x_BHTE: Tensor, cos_PR: Tensor, sin_PR: Tensor, back: bool) -> Tensor:
    y_BHTE = torch.empty_like(x_BHTE)  # dense, its dimensions in the order in which x has them in memory
    batch, heads, length, width = x_BHTE.shape
    half = cos_PR.shape[-1]
    if not x_BHTE.numel() or not half:
        return y_BHTE.copy_(x_BHTE)
    cos_PR, sin_PR = cos_PR.contiguous(), sin_PR.contiguous()
    tiles = whole_rows(heads, width)
    _rotate[(batch * length, triton.cdiv(heads, tiles.rows))](
        x_BHTE,
        cos_PR,
        sin_PR,
        y_BHTE,
        heads,
        length,
        width,
        *x_BHTE.stride(),
        *y_BHTE.stride(),
        0 if cos_PR.ndim == 2 else cos_PR.stride(0),
        cos_PR.stride(-2),
        HALF=half,
        DIRECTION=-1 if back else 1,
        HEADS=tiles.rows,
        WIDTH=tiles.columns,
        num_warps=tiles.warps,
    )
    return y_BHTE


@_rotary.register_fake
def _rotary_shape(x_BHTE: Tensor, cos_PR: Tensor, sin_PR: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x_BHTE)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos_PR, sin_PR, ctx.back = inputs
    ctx.save_for_backward(cos_PR, sin_PR)


def _differentiate(ctx: Any, dy_BHTE: Tensor) -> tuple[Tensor | None, ...]:
    dx_BHTE: Tensor = _rotary(dy_BHTE, *ctx.saved_tensors, not ctx.back)
    return dx_BHTE, None, None, None


_rotary.register_autograd(_differentiate, setup_context=_keep)


def rotary(x_BHTE: Tensor, cos_PR: Tensor, sin_PR: Tensor) -> Tensor:
    """`Kernels.rotary`; ValueError for fp64."""
    refuse_fp64(x_BHTE)
    rotated_BHTE: Tensor = _rotary(x_BHTE, cos_PR, sin_PR, False)
    return rotated_BHTE
