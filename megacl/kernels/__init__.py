"""The ops that have more than one form, and which form runs.

    nats = kernels.linear_cross_entropy(x_ND, weight_VD, targets_N, chunk=1024)
    mixed_BHTE = kernels.attention(q_BHTE, k_BKTE, v_BKTE, bounds_D)
    with kernels.using(linear_cross_entropy="reference"):   # a test runs both
        ...

Each op has a twin in reference.py with the same signature: the definition, which tests hold against every other form.
The form that runs is the fastest on the device, unless a test says otherwise (which torch.compile does not hear).
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from megacl.kernels import chunked, reference, varlen

IGNORED = -100
"""The target of a token that has none: padding."""

_FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "linear_cross_entropy": {
        "chunked": chunked.linear_cross_entropy,
        "reference": reference.linear_cross_entropy,
    },
    "attention": {"flash": varlen.flash, "one_by_one": varlen.one_by_one, "reference": reference.attention},
}
_overridden: ContextVar[dict[str, str]] = ContextVar("_overridden", default={})  # noqa: B039 - never changed in place


def _fastest(op: str, *, half: bool, compiled: bool) -> str:
    """The form of an op that is the fastest on this process's device."""
    if op == "linear_cross_entropy":
        return "chunked"
    if half and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return "flash"
    # A loop over the documents must know their number: a GPU would be waited for in each layer, and a graph compiled
    # for each number.
    return "reference" if compiled or torch.cuda.is_available() else "one_by_one"


def chosen(*, half: bool = False, compiled: bool = False) -> dict[str, str]:
    """The form of each op that runs now, to be printed where a run begins.

    half: on values of 16 bits. compiled: under torch.compile.
    """
    return {op: _fastest(op, half=half, compiled=compiled) for op in _FORMS} | _overridden.get()


def _form(op: str, values: Tensor) -> Callable[..., Tensor]:
    half = values.itemsize == 2
    if torch.compiler.is_compiling():  # a graph cannot read what was overridden
        return _FORMS[op][_fastest(op, half=half, compiled=True)]
    return _FORMS[op][chosen(half=half)[op]]


@contextlib.contextmanager
def using(**forms: str) -> Iterator[None]:
    """Runs the named ops in the named forms inside a `with` block; ValueError where there is no such op or form."""
    for op, form in forms.items():
        if form not in _FORMS.get(op, {}):
            raise ValueError(f"there is no form {form!r} of an op {op!r}; there are {_FORMS}")
    token = _overridden.set({**_overridden.get(), **forms})
    try:
        yield
    finally:
        _overridden.reset(token)


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int) -> Tensor:
    """Sum over tokens of -log softmax(weight x)[target], in nats.

    x_ND: floating, one row a token; weight_VD: floating, one row a vocabulary entry; targets_N: int64 in [0, V), or
    IGNORED, which adds nothing to the sum or to a gradient. Returns a scalar in fp32 (fp64 for fp64 inputs), also under
    autocast. chunk: how many tokens' logits exist at one time, at least 1. It changes memory and time, not the value
    beyond rounding. Differentiable once in x and weight.
    """
    return _form("linear_cross_entropy", x_ND)(x_ND, weight_VD, targets_N, chunk=chunk, ignore_index=IGNORED)


def attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, bounds_D: Tensor) -> Tensor:
    """Causal attention inside each document: softmax(q k / sqrt(E)) v over what stands before in the same document.

    q_BHTE: floating, H query heads; k_BKTE, v_BKTE: K key/value heads, K dividing H; query head h reads head h K // H.
    bounds_D: int32, ascending, where the documents begin in the B rows laid end to end, and B T at last. Every row
    begins a document. Returns [B, H, T, E] in the dtype of q. Differentiable in q, k and v.
    """
    return _form("attention", q_BHTE)(q_BHTE, k_BKTE, v_BKTE, bounds_D)
