"""silu(gate) * up in Triton: gate_up is read once and alone kept for backward, which computes the sigmoid again.

y = swiglu(gate_up)  # [..., 2 F] -> [..., F]
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacl.kernels.tiles import any_part, refuse_fp64


@triton.jit
def _forward(gate_up, y, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < width)
    gate = tl.load(gate_up + row * 2 * width + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
    tl.store(y + row * width + column, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(gate_up, dy, dgate_up, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < width)
    gate = tl.load(gate_up + row * 2 * width + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
    coming = tl.load(dy + row * width + column, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = coming * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dgate_up + row * 2 * width + column, dgate.to(dgate_up.dtype.element_ty), inside)
    tl.store(dgate_up + row * 2 * width + width + column, (coming * silu).to(dgate_up.dtype.element_ty), inside)


def _launch(kernel: Any, *tensors: Tensor, width: int) -> None:
    rows = tensors[0].numel() // max(1, 2 * width)
    if not rows:
        return
    tiles = any_part(rows, width)
    grid = triton.cdiv(rows, tiles.rows), triton.cdiv(width, tiles.columns)
    kernel[grid](*tensors, rows, width, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.warps)


@torch.library.custom_op("megacl::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    y: Tensor = _swiglu_shape(gate_up)
    _launch(_forward, gate_up.contiguous(), y, width=y.shape[-1])
    return y


@_swiglu.register_fake
def _swiglu_shape(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("megacl::swiglu_backward", mutates_args=())
def _swiglu_backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    dgate_up: Tensor = _swiglu_backward_shape(gate_up, dy)
    _launch(_backward, gate_up.contiguous(), dy.contiguous(), dgate_up, width=dy.shape[-1])
    return dgate_up


@_swiglu_backward.register_fake
def _swiglu_backward_shape(gate_up: Tensor, dy: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    dgate_up: Tensor = _swiglu_backward(*ctx.saved_tensors, dy)
    return dgate_up


_swiglu.register_autograd(_differentiate, setup_context=_keep)


def swiglu(gate_up: Tensor) -> Tensor:
    """`Kernels.swiglu`; ValueError for fp64."""
    refuse_fp64(gate_up)
    y: Tensor = _swiglu(gate_up)
    return y
