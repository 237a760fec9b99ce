"""The ops that have more than one implementation, and which of them runs: decided once, where a run begins.

    ops = choose_kernels(device="cuda", half=True, compiled=False, overrides={"rms_norm": "reference"})
    model.use(ops)
    y, total = ops.rms_norm(x, weight, 1e-5, residual)
    for choice in ops.choices:                  # (op, implementation, why): the table that a run prints
        print(choice)

Each op has a twin in reference.py with the same signature: the definition, which tests hold against every other
implementation. What runs is the fastest on the device, unless the configuration or a test says otherwise.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacl.errors import ConfigError
from megacl.kernels import (
    c_attention,
    c_cross_entropy,
    c_gelu,
    c_library,
    c_norms,
    c_swiglu,
    chunked,
    fused,
    lean,
    onednn,
    reference,
    varlen,
)
from megacl.kernels.reference import IGNORED, repeats_keys

__all__ = [
    "FORMS",
    "IGNORED",
    "LOSS_CHUNK",
    "REFERENCE",
    "Choice",
    "Kernels",
    "choices_of_kernels",
    "choose_kernels",
    "repeats_keys",
]

Op = Callable[..., Any]

LOSS_CHUNK = {"cpu": 256, "cuda": 1024}
"""Tokens whose logits exist at one time where nobody says how many. A CPU gains nothing by more; a GPU does."""


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
    linear: Callable[..., Tensor]
    """(x [..., D], weight_FD, bias_F=None) -> [..., F]: x weight^T + bias."""
    linear_gelu: Callable[..., Tensor]
    """(x [..., D], weight_FD, bias_F=None, *, tanh=False) -> [..., F]: GELU of x weight^T + bias, by erf or by tanh."""
    attention: Callable[..., Tensor]
    """(q_BHTE, k_BKTE, v_BKTE, scale) -> BHTE: causal; K divides H, and query head h reads head h K // H."""
    document_attention: Callable[..., Tensor]
    """(q_BHTE, k_BKTE, v_BKTE, bounds_D, scale) -> BHTE: causal, inside documents.

    bounds_D: int32, ascending, where the documents begin in the B rows laid end to end, and B T at last; every row
    begins one."""
    rotary_attention: Callable[..., Tensor] | None
    """(qkv_BTHE, cos_PR, sin_PR, bounds_D or None, kv_heads, scale) -> BTHE, in one op; None: rotary, then attention.

    qkv's heads are those of the queries, the keys and the values, in this order; R may be 0. With bounds it is
    document_attention, and a row of the tables is a token's, [B, 1, T, R], or a place's."""
    linear_cross_entropy: Callable[..., Tensor]
    """(x_ND, weight_VD, targets_N, *, chunk, z_loss) -> [3] in fp32, or fp64 for fp64, also under autocast.

    Sums over the tokens whose target is not IGNORED: nats + z_loss * squares, which alone has a gradient; nats, of -log
    softmax(weight x)[target]; squares, of (log Z)^2. chunk: how many tokens' logits exist at one time; it changes
    memory and time, not the value beyond rounding."""
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class _Triton:
    """An op of a module that imports Triton, which takes a second and is not everywhere: imported when needed."""

    module: str
    op: str

    def load(self) -> Op:
        op: Op = getattr(importlib.import_module(f"megacl.kernels.{self.module}"), self.op)
        return op

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.load()(*args, **options)


FORMS: dict[str, dict[str, Op | None]] = {
    "rms_norm": {
        "c": c_norms.rms_norm,
        "lean": lean.rms_norm,
        "triton": _Triton("triton_norms", "rms_norm"),
        "torch": fused.rms_norm,
        "reference": reference.rms_norm,
    },
    "layer_norm": {
        "c": c_norms.layer_norm,
        "triton": _Triton("triton_norms", "layer_norm"),
        "torch": fused.layer_norm,
        "reference": reference.layer_norm,
    },
    "rotary": {"triton": _Triton("triton_rotary", "rotary"), "reference": reference.rotary},
    "swiglu": {
        "c": c_swiglu.swiglu,
        "lean": lean.swiglu,
        "triton": _Triton("triton_swiglu", "swiglu"),
        "reference": reference.swiglu,
    },
    "linear": {"onednn": onednn.linear, "reference": reference.linear},
    "linear_gelu": {
        "c": c_gelu.linear_gelu,
        "triton": _Triton("triton_gelu", "linear_gelu"),
        "onednn": onednn.linear_gelu,
        "reference": reference.linear_gelu,
    },
    "attention": {"sdpa": fused.attention, "reference": reference.attention},
    "document_attention": {
        "flash": varlen.flash,
        "one_by_one": varlen.one_by_one,
        "reference": reference.document_attention,
    },
    "rotary_attention": {"c": c_attention.rotary_attention, "apart": None, "reference": reference.rotary_attention},
    "linear_cross_entropy": {
        "c": c_cross_entropy.linear_cross_entropy,
        "triton": _Triton("triton_cross_entropy", "linear_cross_entropy"),
        "onednn": chunked.linear_cross_entropy_by_onednn,
        "chunked": chunked.linear_cross_entropy,
        "reference": reference.linear_cross_entropy,
    },
}
"""Every implementation of every op, by name; None where other ops do its work."""


def _assemble(names: Mapping[str, str], choices: tuple[Choice, ...] = ()) -> Kernels:
    forms = {op: FORMS[op][name] for op, name in names.items()}
    ops: dict[str, Any] = {op: form.load() if isinstance(form, _Triton) else form for op, form in forms.items()}
    return Kernels(**ops, choices=choices)


REFERENCE = _assemble({**dict.fromkeys(FORMS, "reference"), "rotary_attention": "apart"})
"""The definitions."""


def choose_kernels(*, device: str, half: bool, compiled: bool, overrides: Mapping[str, str]) -> Kernels:
    """What `choices_of_kernels` names, ready to run."""
    choices = choices_of_kernels(device=device, half=half, compiled=compiled, overrides=overrides)
    return _assemble({choice.op: choice.implementation for choice in choices}, choices)


def choices_of_kernels(*, device: str, half: bool, compiled: bool, overrides: Mapping[str, str]) -> tuple[Choice, ...]:
    """The fastest implementation of each op, or the one that `overrides` names.

    On a CPU that is what tools/bench/kernels.py measured to be the fastest there, by the CPU's maker where that
    decides. On a GPU it is our Triton kernels where Triton is installed. Under torch.compile, what the compiler fuses
    by itself (norms, rotary, activations) is left to it, as the reference; it does not see that the loss can be
    computed in chunks, so that stays a kernel.

    device: "cpu" or "cuda"; where there is no GPU, one of compute capability 8.0 with Triton is meant. half: on values
    of 16 bits. compiled: inside graphs of torch.compile. Raises ConfigError where an override names what there is not,
    or what cannot run there.
    """
    for op, name in overrides.items():
        if op not in FORMS:
            raise ConfigError(f"engine.kernels names {op!r}, which is no op; there are {', '.join(FORMS)}.")
        if name not in FORMS[op]:
            raise ConfigError(f"engine.kernels.{op} is {name!r}; it must be one of {', '.join(FORMS[op])}.")
        if missing := _missing(name, device=device, half=half):
            raise ConfigError(f"engine.kernels.{op} is {name!r}, which cannot run here: {missing}.")
    return tuple(_choose(op, device=device, half=half, compiled=compiled, overrides=overrides) for op in FORMS)


_PARTS = ("rotary", "attention", "document_attention")
"""Whose work rotary_attention does."""


def _choose(op: str, *, device: str, half: bool, compiled: bool, overrides: Mapping[str, str]) -> Choice:
    if op in overrides:
        return Choice(op, overrides[op], "engine.kernels")
    named = [part for part in _PARTS if part in overrides]
    if op == "rotary_attention" and named:
        return Choice(op, "apart", f"engine.kernels names {named[0]}")
    return Choice(op, *_fastest(op, device=device, half=half, compiled=compiled))


def _missing(name: str, *, device: str, half: bool) -> str | None:
    """What an implementation needs and does not have; None where it can run. Asked of those in C, it has them built."""
    imagined = device == "cuda" and not torch.cuda.is_available()
    match name:
        case "triton" if device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
            return "Triton runs on a GPU; on a CPU its kernels are interpreted, very slowly, with TRITON_INTERPRET=1"
        case "triton" if not imagined and importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install 'megacl[gpu]')"
        case "flash" if device == "cpu" or not half or not (imagined or torch.cuda.get_device_capability() >= (8, 0)):
            return "flash attention wants 16 bits on a GPU of capability 8.0"
        case "c" if device != "cpu" or half:
            return "the kernels in C are for fp32 on a CPU"
        case "c":
            return c_library.unavailable()
        case "onednn" if device != "cpu" or half or not onednn.available():
            return "oneDNN's products are for fp32 on a CPU, in a PyTorch that has them"
    return None


def _fastest(op: str, *, device: str, half: bool, compiled: bool) -> tuple[str, str]:
    """(implementation, why)."""
    triton = device == "cuda" and _missing("triton", device=device, half=half) is None
    onednn_runs = _missing("onednn", device=device, half=half) is None and onednn.is_faster()
    match op:
        case "linear_cross_entropy" if triton:
            return "triton", "all logits never exist at once, and one kernel does their softmax"
        case "linear_cross_entropy" if _missing("c", device=device, half=half) is None:
            return "c", "all logits never exist at once, and one pass does their softmax"
        case "linear_cross_entropy":
            return "onednn" if onednn_runs else "chunked", "all logits never exist at once"
        case "linear_gelu" if not compiled and _missing("c", device=device, half=half) is None:
            return "c", "one pass behind the product, and one back"
        case "linear" | "linear_gelu" if onednn_runs:
            return "onednn", "its products in fp32 are the faster ones"
        case "linear":
            return "reference", "PyTorch's product"
        case "linear_gelu" if device == "cpu" and not compiled:
            return "reference", "PyTorch's product"
        case "document_attention":
            if (missing := _missing("flash", device=device, half=half)) is None:
                return "flash", "one call over all documents"
            # A loop over the documents must know their number: a GPU would be waited for in each layer, and a graph
            # compiled for each number.
            if compiled or device == "cuda":
                return "reference", missing
            return "one_by_one", "no score across documents is computed"
        case "rotary_attention":
            if (missing := _missing("c", device=device, half=half)) is None:
                return "c", "compiled here; scores and turned heads stay in the cache"
            return "apart", missing
        case "attention":
            return "sdpa", "PyTorch's kernel for the device"
        case _ if compiled:
            return "reference", "the compiler fuses it"
        case _ if triton:
            return "triton", "one pass over memory"
        case "rms_norm" | "layer_norm" | "swiglu" if _missing("c", device=device, half=half) is None:
            return "c", "one pass over memory, and one back"
        case "rms_norm" if device == "cpu":
            return "lean", "half the time and half the memory of PyTorch's"
        case "swiglu":
            return "lean", "keeps gate and up alone"
        case "rms_norm" | "layer_norm":
            return "torch", "PyTorch's kernel for the device"
        case _:
            return "reference", "the only one without Triton"
