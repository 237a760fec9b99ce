"""SwiGLU by swiglu.c: a CPU's, in fp32. It keeps gate_up alone, and computes silu(gate) again for its gradient."""

from typing import Any

import torch
from torch import Tensor

from megacl.kernels import c_library, lean

# Not torch.library.custom_op: its first call imports the compiler, which takes two seconds.
torch.library.define("megacl::c_swiglu", "(Tensor gate_up) -> Tensor")
torch.library.define("megacl::c_swiglu_backward", "(Tensor dy, Tensor gate_up) -> Tensor")


@torch.library.impl("megacl::c_swiglu", "CPU")
def _swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 F] -> [..., F], in fp32. ValueError where the last size is odd."""
    gate_up = gate_up.contiguous()
    y: Tensor = _swiglu_shape(gate_up)
    tensors = c_library.pointers(gate_up, y)
    c_library.load().swiglu_forward(*c_library.rows_and_width(y), *tensors, torch.get_num_threads())
    return y


@torch.library.register_fake("megacl::c_swiglu")  # type: ignore[untyped-decorator]
def _swiglu_shape(gate_up: Tensor) -> Tensor:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up are the halves of the last dimension, and of {[*gate_up.shape]} it is odd")
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.impl("megacl::c_swiglu_backward", "CPU")
def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """dy [..., F] and gate_up [..., 2 F] -> its gradient, in fp32."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    dgate_up: Tensor = _swiglu_backward_shape(dy, gate_up)
    tensors = c_library.pointers(dy, gate_up, dgate_up)
    c_library.load().swiglu_backward(*c_library.rows_and_width(dy), *tensors, torch.get_num_threads())
    return dgate_up


@torch.library.register_fake("megacl::c_swiglu_backward")  # type: ignore[untyped-decorator]
def _swiglu_backward_shape(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    dgate_up: Tensor = torch.ops.megacl.c_swiglu_backward(dy, gate_up)
    return dgate_up


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("SwiGLU by megacl::c_swiglu has no second derivative")


torch.library.register_autograd("megacl::c_swiglu", _differentiate, setup_context=_keep)
torch.library.register_autograd("megacl::c_swiglu_backward", _refuse)


def swiglu(gate_up: Tensor) -> Tensor:
    """`Kernels.swiglu`; what is not in fp32 is PyTorch's."""
    if gate_up.dtype != torch.float32:
        return lean.swiglu(gate_up)
    y: Tensor = torch.ops.megacl.c_swiglu(gate_up)
    return y
