"""Attention with rotary position by attention.c: a CPU's, in fp32.

PyTorch's attention on a CPU runs at a third of the rate of its products where sequences are short, and turning queries
and keys, cutting them out of what qkv gave and putting their gradients together again are some ten passes over memory
beside it. Here a head is read where qkv left it, turned while it is packed, and its gradient written where qkv wants
it; what autograd keeps is qkv itself and what comes out. `tools/bench/kernels.py` has both.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from megacl.kernels import c_library, fused, reference, varlen


class _Arguments(ctypes.Structure):
    """`call` of attention.c."""

    _fields_ = (
        ("documents", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("bounds", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("qkv", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("half", ctypes.c_int64),
        ("by_place", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


def _run(
    function: str,
    qkv_BTHE: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds_D: Tensor | None,
    kv_heads: int,
    scale: float,
    *more: Tensor,
) -> None:
    batch, length, all_heads, width = qkv_BTHE.shape
    if bounds_D is None:
        bounds_D = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32)
    arguments = _Arguments(
        documents=bounds_D.numel() - 1,
        heads=all_heads - 2 * kv_heads,
        kv_heads=kv_heads,
        width=width,
        bounds=bounds_D.data_ptr(),
        scale=scale,
        qkv=qkv_BTHE.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        half=cos.shape[-1],
        by_place=cos.ndim == 2,
        threads=torch.get_num_threads(),
    )
    compute = getattr(c_library.load(), function)
    if compute(ctypes.byref(arguments), *c_library.pointers(*more)):
        raise MemoryError("no memory for the attention of one head")


# Not torch.library.custom_op: its first call imports the compiler, which takes two seconds.
torch.library.define(
    "megacl::c_attention",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor? bounds, int kv_heads, float scale) -> (Tensor, Tensor)",
)
torch.library.define(
    "megacl::c_attention_backward",
    "(Tensor dmixed, Tensor qkv, Tensor cos, Tensor sin, Tensor? bounds, Tensor mixed, Tensor log_sum, int kv_heads, "
    "float scale) -> Tensor",
)


@torch.library.impl("megacl::c_attention", "CPU")
def _attention(
    qkv_BTHE: Tensor, cos_PR: Tensor, sin_PR: Tensor, bounds_D: Tensor | None, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(mixed_BTHE, log_sum_BTH); qkv and the tables contiguous, in fp32."""
    batch, length, all_heads, width = qkv_BTHE.shape
    mixed_BTHE = qkv_BTHE.new_empty(batch, length, all_heads - 2 * kv_heads, width)
    log_sum_BTH = qkv_BTHE.new_empty(mixed_BTHE.shape[:3])
    _run("attention_forward", qkv_BTHE, cos_PR, sin_PR, bounds_D, kv_heads, scale, mixed_BTHE, log_sum_BTH)
    return mixed_BTHE, log_sum_BTH


@torch.library.register_fake("megacl::c_attention")  # type: ignore[untyped-decorator]
def _attention_shape(
    qkv_BTHE: Tensor, cos_PR: Tensor, sin_PR: Tensor, bounds_D: Tensor | None, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, length, all_heads, width = qkv_BTHE.shape
    heads = all_heads - 2 * kv_heads
    return qkv_BTHE.new_empty(batch, length, heads, width), qkv_BTHE.new_empty(batch, length, heads)


@torch.library.impl("megacl::c_attention_backward", "CPU")
def _attention_backward(
    dmixed_BTHE: Tensor,
    qkv_BTHE: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    bounds_D: Tensor | None,
    mixed_BTHE: Tensor,
    log_sum_BTH: Tensor,
    kv_heads: int,
    scale: float,
) -> Tensor:
    dqkv_BTHE = torch.empty_like(qkv_BTHE)
    more = (mixed_BTHE, log_sum_BTH, dmixed_BTHE.contiguous(), dqkv_BTHE)
    _run("attention_backward", qkv_BTHE, cos_PR, sin_PR, bounds_D, kv_heads, scale, *more)
    return dqkv_BTHE


@torch.library.register_fake("megacl::c_attention_backward")  # type: ignore[untyped-decorator]
def _attention_backward_shape(dmixed_BTHE: Tensor, qkv_BTHE: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv_BTHE)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_BTHE, cos_PR, sin_PR, ctx.bounds, ctx.kv_heads, ctx.scale = inputs
    ctx.save_for_backward(qkv_BTHE, cos_PR, sin_PR, *output)


def _differentiate(ctx: Any, dmixed_BTHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv_BTHE, cos_PR, sin_PR, *output = ctx.saved_tensors
    dqkv_BTHE = torch.ops.megacl.c_attention_backward(
        dmixed_BTHE, qkv_BTHE, cos_PR, sin_PR, ctx.bounds, *output, ctx.kv_heads, ctx.scale
    )
    return dqkv_BTHE, None, None, None, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("attention by megacl::c_attention has no second derivative")


torch.library.register_autograd("megacl::c_attention", _differentiate, setup_context=_keep)
torch.library.register_autograd("megacl::c_attention_backward", _refuse)


def rotary_attention(
    qkv_BTHE: Tensor, cos_PR: Tensor, sin_PR: Tensor, bounds_D: Tensor | None, kv_heads: int, scale: float
) -> Tensor:
    """`Kernels.rotary_attention`; what is not in fp32 is computed by parts."""
    batch, length, _, width = qkv_BTHE.shape
    half = cos_PR.shape[-1]
    if qkv_BTHE.dtype != torch.float32 or not qkv_BTHE.numel():
        return reference.rotary_attention(
            qkv_BTHE,
            cos_PR,
            sin_PR,
            bounds_D,
            kv_heads,
            scale,
            attention=fused.attention,
            document_attention=varlen.one_by_one,
        )
    if bounds_D is not None:
        bounds_D = bounds_D.int().contiguous()
    by_place = bounds_D is None and cos_PR.ndim == 2
    shape = (length, half) if by_place else (batch, 1, length, half)
    if 2 * half > width or any(table_PR.shape[-2] != length for table_PR in (cos_PR, sin_PR)):
        raise ValueError(f"tables of {tuple(cos_PR.shape)} for {length} places and heads of {width}")
    cos, sin = (table_PR.float().expand(shape).contiguous() for table_PR in (cos_PR, sin_PR))
    mixed_BTHE: Tensor
    mixed_BTHE, _ = torch.ops.megacl.c_attention(qkv_BTHE.contiguous(), cos, sin, bounds_D, kv_heads, scale)
    return mixed_BTHE
