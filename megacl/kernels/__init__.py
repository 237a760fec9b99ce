"""The ops that have more than one implementation, and which of them runs: decided once, where a run begins.

    ops = choose_kernels(device="cuda", half=True, compiled=False, overrides={"rms_norm": "reference"})
    model.use(ops)
    y, total = ops.rms_norm(x, weight, 1e-5, residual)
    for choice in ops.choices:                  # (op, implementation, why): the table that a run prints
        print(choice)

Each op has a twin in reference.py with the same signature: the definition, which tests hold against every other
implementation. What runs is the fastest on the device, unless the configuration or a test says otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacl.errors import ConfigError
from megacl.kernels import chunked, fused, reference, varlen
from megacl.kernels.reference import IGNORED

__all__ = ["FORMS", "IGNORED", "REFERENCE", "Choice", "Kernels", "choose_kernels"]

Op = Callable[..., Any]


@dataclass(frozen=True)
class Choice:
    """A line of the table."""

    op: str
    implementation: str
    why: str


@dataclass(frozen=True)
class Kernels:
    """An implementation of every op. The norms' inner arithmetic is in fp32 or wider; results are in x's dtype."""

    rms_norm: Callable[..., tuple[Tensor, Tensor]]
    """(x, weight_D, eps, residual=None) -> (y, total): total = x + residual, y = total / rms(total) * weight_D."""
    layer_norm: Callable[..., tuple[Tensor, Tensor]]
    """(x, weight_D, bias_D, eps, residual=None) -> (y, total), as rms_norm."""
    rotary: Callable[..., Tensor]
    """(x_BHTE, cos_PR, sin_PR) -> x_BHTE: turns the pairs (e, e + R), e < R, by their position's angles."""
    swiglu: Callable[..., Tensor]
    """gate_up [..., 2 F] -> [..., F]: silu(gate) * up; the first half is the gate."""
    linear_gelu: Callable[..., Tensor]
    """(x [..., D], weight_FD, bias_F) -> [..., F]: the exact (erf) GELU of x weight^T + bias."""
    attention: Callable[..., Tensor]
    """(q_BHTE, k_BKTE, v_BKTE, scale) -> BHTE: causal; K divides H, and query head h reads head h K // H."""
    document_attention: Callable[..., Tensor]
    """(q_BHTE, k_BKTE, v_BKTE, bounds_D, scale) -> BHTE: causal, inside documents.

    bounds_D: int32, ascending, where the documents begin in the B rows laid end to end, and B T at last; every row
    begins one."""
    linear_cross_entropy: Callable[..., Tensor]
    """(x_ND, weight_VD, targets_N, *, chunk, z_loss) -> [3] in fp32, or fp64 for fp64, also under autocast.

    Sums over the tokens whose target is not IGNORED: nats + z_loss * squares, which alone has a gradient; nats, of -log
    softmax(weight x)[target]; squares, of (log Z)^2. chunk: how many tokens' logits exist at one time; it changes
    memory and time, not the value beyond rounding."""
    choices: tuple[Choice, ...] = ()


FORMS: dict[str, dict[str, Op]] = {
    "rms_norm": {"torch": fused.rms_norm, "reference": reference.rms_norm},
    "layer_norm": {"torch": fused.layer_norm, "reference": reference.layer_norm},
    "rotary": {"reference": reference.rotary},
    "swiglu": {"reference": reference.swiglu},
    "linear_gelu": {"reference": reference.linear_gelu},
    "attention": {"sdpa": fused.attention, "reference": reference.attention},
    "document_attention": {
        "flash": varlen.flash,
        "one_by_one": varlen.one_by_one,
        "reference": reference.document_attention,
    },
    "linear_cross_entropy": {"chunked": chunked.linear_cross_entropy, "reference": reference.linear_cross_entropy},
}
"""Every implementation of every op, by name."""


def _assemble(names: Mapping[str, str], choices: tuple[Choice, ...] = ()) -> Kernels:
    ops: dict[str, Any] = {op: FORMS[op][name] for op, name in names.items()}
    return Kernels(**ops, choices=choices)


REFERENCE = _assemble(dict.fromkeys(FORMS, "reference"))
"""The definitions."""


def choose_kernels(*, device: str, half: bool, compiled: bool, overrides: Mapping[str, str]) -> Kernels:
    """The fastest implementation of each op, or the one that `overrides` names.

    device: "cpu" or "cuda". half: on values of 16 bits. compiled: inside graphs of torch.compile. Raises ConfigError
    where an override names what there is not.
    """
    for op, name in overrides.items():
        if op not in FORMS:
            raise ConfigError(f"engine.kernels names {op!r}, which is no op; there are {', '.join(FORMS)}.")
        if name not in FORMS[op]:
            raise ConfigError(f"engine.kernels.{op} is {name!r}; it must be one of {', '.join(FORMS[op])}.")
    choices = tuple(
        Choice(op, overrides[op], "engine.kernels")
        if op in overrides
        else Choice(op, *_fastest(op, device=device, half=half, compiled=compiled))
        for op in FORMS
    )
    return _assemble({choice.op: choice.implementation for choice in choices}, choices)


def _fastest(op: str, *, device: str, half: bool, compiled: bool) -> tuple[str, str]:
    """(implementation, why)."""
    match op:
        case "linear_cross_entropy":
            return "chunked", "all logits never exist at once"
        case "document_attention":
            if device == "cuda" and half and torch.cuda.get_device_capability() >= (8, 0):
                return "flash", "one call over all documents"
            # A loop over the documents must know their number: a GPU would be waited for in each layer, and a graph
            # compiled for each number.
            if compiled or device == "cuda":
                return "reference", "flash attention wants 16 bits on a GPU of capability 8.0"
            return "one_by_one", "no score across documents is computed"
        case "attention":
            return "sdpa", "PyTorch's kernel for the device"
        case "rms_norm" | "layer_norm":
            return "torch", "PyTorch's kernel for the device"
        case _:
            return "reference", "the only one"
