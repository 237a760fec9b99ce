"""The ops that have more than one form, and which form runs.

    nats = kernels.linear_cross_entropy(x_ND, weight_VD, targets_N, chunk=1024)
    with kernels.using(linear_cross_entropy="reference"):   # a test runs both
        ...

Each op has a twin in reference.py with the same signature: the definition, which tests hold against every other form.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

from megacl.kernels import chunked, reference

IGNORED = -100
"""The target of a token that has none: padding."""

_FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "linear_cross_entropy": {
        "chunked": chunked.linear_cross_entropy,
        "reference": reference.linear_cross_entropy,
    }
}
_chosen: ContextVar[dict[str, str]] = ContextVar("_chosen", default={"linear_cross_entropy": "chunked"})  # noqa: B039 - never changed in place


def chosen() -> dict[str, str]:
    """The form of each op that runs now, to be printed where a run begins."""
    return dict(_chosen.get())


@contextlib.contextmanager
def using(**forms: str) -> Iterator[None]:
    """Runs the named ops in the named forms inside a `with` block; ValueError where there is no such op or form."""
    for op, form in forms.items():
        if form not in _FORMS.get(op, {}):
            raise ValueError(f"there is no form {form!r} of an op {op!r}; there are {_FORMS}")
    token = _chosen.set({**_chosen.get(), **forms})
    try:
        yield
    finally:
        _chosen.reset(token)


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int) -> Tensor:
    """Sum over tokens of -log softmax(weight x)[target], in nats.

    x_ND: floating, one row a token; weight_VD: floating, one row a vocabulary entry; targets_N: int64 in [0, V), or
    IGNORED, which adds nothing to the sum or to a gradient. Returns a scalar in fp32 (fp64 for fp64 inputs), also under
    autocast. chunk: how many tokens' logits exist at one time, at least 1. It changes memory and time, not the value
    beyond rounding. Differentiable once in x and weight.
    """
    form = _FORMS["linear_cross_entropy"][_chosen.get()["linear_cross_entropy"]]
    return form(x_ND, weight_VD, targets_N, chunk=chunk, ignore_index=IGNORED)
