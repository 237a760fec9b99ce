"""Every form of SwiGLU and of a linear layer's GELU against its twin, in every width."""

import functools
from typing import Any

import pytest
import torch
from twins import DEVICE, DTYPES, TRITON, assert_matches_twin, drawn, on_grid, param

from megacl import kernels
from megacl.kernels import reference


def forms(op: str) -> Any:
    return pytest.mark.parametrize("form", [param(form=form) for form in kernels.FORMS[op]])


TANH = pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])


def check(
    op: str, form: str, inputs: list[torch.Tensor], coming: list[torch.Tensor] | None = None, **options: bool
) -> None:
    roundings = 1 if form == "triton" else 3  # the others round between their steps
    ours, twin = (functools.partial(kernels.FORMS[op][each], **options) for each in (form, "reference"))
    assert_matches_twin(ours, twin, inputs, roundings=roundings, coming=coming)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@forms("swiglu")
def test_swiglu_and_its_gradient_are_the_definitions(form, dtype):
    for shape in [(2,), (1, 6), (17, 1200), (2, 5, 100)]:
        check("swiglu", form, [drawn(*shape, dtype=dtype, scale=3)])


@forms("swiglu")
def test_swiglu_reads_views_and_gradients_as_they_are_meant(form):
    gate_up = drawn(8, 3, 20).detach().permute(1, 2, 0).requires_grad_()
    coming = drawn(1, 4).detach().expand(3, 20, 4)
    check("swiglu", form, [gate_up], [coming])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's own, of what overflows to infinity
@forms("swiglu")
def test_swiglu_stands_huge_values(form):
    # Each pair by itself: what is allowed is a part of the largest value, which would hide the others.
    for gate, up in [(3e38, 0.25), (-3e38, 0.5), (1e4, 0.25), (-1e4, 0.5), (88.0, 0.25), (-104.0, 0.5)]:
        check("swiglu", form, [torch.tensor([[gate, up]], device=DEVICE, requires_grad=True)])


def linear(rows: tuple[int, ...], width: int, inner: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, weight and bias whose products are exact in 16 bits: one row of the weight picks one of x's values."""
    x, bias = on_grid(*rows, inner, dtype=dtype, seed=1), on_grid(width, dtype=dtype, seed=2)
    weight = torch.zeros(width, inner, dtype=dtype)
    weight[torch.arange(width), torch.arange(width) % inner] = 1
    return [x, weight.to(x.device), bias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@TANH
@forms("linear_gelu")
def test_the_gelu_of_a_linear_layer_and_its_gradients_are_the_definitions(form, dtype, tanh):
    for rows, width in [((1,), 1), ((33,), 64), ((2, 5), 700), ((130,), 20)]:
        # one value of x feeds as many of y's as there are rows of the weight with it: one, so that sums do not round
        check("linear_gelu", form, linear(rows, width, width, dtype), tanh=tanh)


@TANH
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "without bias"])
@forms("linear_gelu")
def test_the_gelu_of_a_linear_layer_gives_the_weight_its_gradient(form, biased, tanh):
    inputs = [drawn(9, 12, seed=1), drawn(20, 12, seed=2), drawn(20, seed=3)]
    coming = drawn(20, 9).detach().t()
    check("linear_gelu", form, inputs if biased else inputs[:2], [coming], tanh=tanh)


@TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bias", [1e4, 1e38, -3e38])
def test_gelu_by_tanh_stands_huge_values_in_triton(bias):
    """PyTorch's own gradient there is NaN from 1e19 on, whose square is infinite."""
    biases = torch.full((6,), bias, device=DEVICE, requires_grad=True)
    check("linear_gelu", "triton", [drawn(4, 3, seed=1), drawn(6, 3, seed=2), biases], tanh=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bias", [1e4, 1e38, -3e38])
@forms("linear_gelu")
def test_gelu_stands_huge_values(form, bias):
    biases = torch.full((6,), bias, device=DEVICE, requires_grad=True)
    inputs = [drawn(4, 3, seed=1), drawn(6, 3, seed=2), biases]
    check("linear_gelu", form, inputs)


@forms("swiglu")
def test_empty_tensors_pass_swiglu(form):
    check("swiglu", form, [drawn(2, 0, 8)])


@forms("linear_gelu")
def test_empty_tensors_pass_gelu(form):
    check("linear_gelu", form, [drawn(0, 3, seed=1), drawn(6, 3, seed=2), drawn(6, seed=3)])


@pytest.mark.parametrize("form", ["lean", "reference"])
def test_swiglus_gradient_agrees_with_finite_differences(form):
    assert torch.autograd.gradcheck(kernels.FORMS["swiglu"][form], drawn(3, 8, dtype=torch.float64))


@TANH
def test_gelus_gradients_agree_with_finite_differences(tanh):
    inputs = [drawn(*shape, dtype=torch.float64, seed=n) for n, shape in enumerate([(4, 3), (5, 3), (5,)])]
    assert torch.autograd.gradcheck(functools.partial(reference.linear_gelu, tanh=tanh), inputs)


@TRITON
def test_under_autocast_the_product_is_in_its_dtype_and_the_bias_is_not_rounded():
    x, weight, bias = linear((4,), 6, 6, torch.float32)
    bias = (bias.detach() + 1e-3).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = kernels.FORMS["linear_gelu"]["triton"](x, weight, bias)
    (dbias,) = torch.autograd.grad(y.sum(), bias)
    assert (y.dtype, dbias.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), reference.linear_gelu(x, weight, bias), rtol=2**-7, atol=0)


@TRITON
def test_triton_refuses_values_of_64_bits():
    with pytest.raises(ValueError, match="fp64"):
        kernels.FORMS["swiglu"]["triton"](drawn(4, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="fp64"):
        kernels.FORMS["linear_gelu"]["triton"](
            *(drawn(*shape, dtype=torch.float64) for shape in ((4, 8), (6, 8), (6,)))
        )
