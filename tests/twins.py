"""An implementation of an op held against its twin, which computes in fp64 from the same values."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where implementations are tested: Triton's run in its interpreter where there is no GPU."""

_TRITON_RUNS = bool(importlib.util.find_spec("triton")) and (DEVICE == "cuda" or "TRITON_INTERPRET" in os.environ)
_NO_TRITON = "Triton is not installed, or has neither a GPU nor its interpreter here"

TRITON = pytest.mark.skipif(not _TRITON_RUNS, reason=_NO_TRITON)
OF_A_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="a kernel for CPUs, and this run is about a GPU")


def param(*values: Any, form: str) -> Any:
    """The parameters of a test that end in an implementation's name, skipped where that cannot run."""
    marks = {"triton": (TRITON,), "c": (OF_A_CPU,), "onednn": (OF_A_CPU,)}
    return pytest.param(*values, form, marks=marks.get(form, ()))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal values, always the same, that need a gradient."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * values).to(dtype).to(DEVICE).requires_grad_()


def on_grid(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Multiples of 1/16 in [-3, 3], two of which add up exactly in 16 bits too."""
    values = drawn(*shape, seed=seed).detach()
    return (values.clamp(-3, 3) * 16).round().div(16).to(dtype).requires_grad_()


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def results_and_gradients(
    op: Callable[..., Any], inputs: Sequence[Any], coming: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What op(*inputs) returns, and the gradients of its inputs where those of its results are `coming`."""
    results = as_tuple(op(*inputs))
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(results, wanted, [g.to(r.dtype) for g, r in zip(coming, results, strict=True)])
    return [*(r.detach() for r in results), *gradients]


def widened(value: Any) -> Any:
    """A tensor's values in fp64; whatever else as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def assert_matches_twin(
    ours: Callable[..., Any],
    twin: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    epsilons: int = 64,
    roundings: int = 1,
    coming: Sequence[torch.Tensor] | None = None,
) -> None:
    """Fails where a result or gradient is further from the exact one than rounding explains.

    Arithmetic is in fp32, whose errors are bounded by `epsilons` of the largest value. In 16 bits, what comes out is
    rounded besides: a unit in its last place, as the interpreter cuts off. With more `roundings` on the way, as many
    units of the largest value.
    """
    shapes = [r.shape for r in as_tuple(twin(*map(widened, inputs)))]
    dtypes = [r.dtype for r in as_tuple(ours(*inputs))]
    if coming is None:
        coming = [
            drawn(*shape, dtype=dtype, seed=9 + n).detach()
            for n, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]
    exact = results_and_gradients(twin, [widened(x) for x in inputs], coming)
    found = results_and_gradients(ours, inputs, coming)
    for value, expected in zip(found, exact, strict=True):
        assert value.shape == expected.shape
        unit = torch.finfo(value.dtype).eps if value.itemsize == 2 else 0.0
        of_largest = epsilons * torch.finfo(torch.float32).eps + (roundings - 1) * unit
        allowed = of_largest * expected.abs().amax() if expected.numel() else 0.0
        smallest = torch.finfo(value.dtype).smallest_normal
        difference = (value.double() - expected).abs()
        assert bool((difference <= unit * expected.abs() + allowed + smallest).all()), (
            f"off by {difference.max().item():.3g} of {expected.abs().max().item():.3g}"
        )


def needs_triton() -> None:
    """Skips a file of tests where the kernels cannot run."""
    if not _TRITON_RUNS:
        pytest.skip(_NO_TRITON, allow_module_level=True)
