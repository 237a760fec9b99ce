"""SwiGLU and the GELU of a linear layer in Triton against their twins."""

import pytest
import torch
from twins import DTYPES, assert_matches_twin, drawn, needs_triton, on_grid

from megacl.kernels import reference

needs_triton()
from megacl.kernels import triton_gelu, triton_swiglu  # noqa: E402

SHAPES = [(2,), (1, 6), (17, 1200), (2, 5, 100)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_and_its_gradient_are_the_definitions(dtype):
    for shape in SHAPES:
        assert_matches_twin(triton_swiglu.swiglu, reference.swiglu, [drawn(*shape, dtype=dtype, scale=3)])


def test_swiglu_reads_views_and_gradients_as_they_are_meant():
    gate_up = drawn(8, 3, 20).detach().permute(1, 2, 0).requires_grad_()
    coming = drawn(1, 4).detach().expand(3, 20, 4)
    assert_matches_twin(triton_swiglu.swiglu, reference.swiglu, [gate_up], coming=[coming])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's own, of what overflows to infinity
def test_swiglu_stands_huge_values():
    gate_up = torch.tensor([[3e38, -3e38, 1e4, -1e4, 88.0, -104.0, 0.25, 0.5, 0.25, 0.5, 0.25, 0.5]])
    assert_matches_twin(triton_swiglu.swiglu, reference.swiglu, [gate_up.requires_grad_()])


def linear(rows: tuple[int, ...], width: int, inner: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, weight and bias whose products are exact in 16 bits: one row of the weight picks one of x's values."""
    x, bias = on_grid(*rows, inner, dtype=dtype, seed=1), on_grid(width, dtype=dtype, seed=2)
    weight = torch.zeros(width, inner, dtype=dtype)
    weight[torch.arange(width), torch.arange(width) % inner] = 1
    return [x, weight.to(x.device), bias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gelu_of_a_linear_layer_and_its_gradients_are_the_definitions(dtype):
    for rows, width in [((1,), 1), ((33,), 64), ((2, 5), 700)]:
        # one value of x feeds as many of y's as there are rows of the weight with it: one, so that sums do not round
        assert_matches_twin(triton_gelu.linear_gelu, reference.linear_gelu, linear(rows, width, width, dtype))


def test_the_gelu_of_a_linear_layer_gives_the_weight_its_gradient():
    inputs = [drawn(9, 12, seed=1), drawn(20, 12, seed=2), drawn(20, seed=3)]
    coming = drawn(20, 9).detach().t()
    assert_matches_twin(triton_gelu.linear_gelu, reference.linear_gelu, inputs, coming=[coming])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bias", [1e4, 3e38, -3e38])
def test_gelu_stands_huge_values(bias):
    biases = torch.full((6,), bias, requires_grad=True)
    inputs = [drawn(4, 3, seed=1), drawn(6, 3, seed=2), biases]
    assert_matches_twin(triton_gelu.linear_gelu, reference.linear_gelu, inputs)


def test_empty_tensors_pass():
    assert_matches_twin(triton_swiglu.swiglu, reference.swiglu, [drawn(2, 0, 8)])
    inputs = [drawn(0, 3, seed=1), drawn(6, 3, seed=2), drawn(6, seed=3)]
    assert_matches_twin(triton_gelu.linear_gelu, reference.linear_gelu, inputs)


def test_under_autocast_the_product_is_in_its_dtype_and_the_bias_is_not_rounded():
    x, weight, bias = linear((4,), 6, 6, torch.float32)
    bias = (bias.detach() + 1e-3).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = triton_gelu.linear_gelu(x, weight, bias)
    (dbias,) = torch.autograd.grad(y.sum(), bias)
    assert (y.dtype, dbias.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), reference.linear_gelu(x, weight, bias), rtol=2**-7, atol=0)


def test_values_of_64_bits_are_refused():
    with pytest.raises(ValueError, match="fp64"):
        triton_swiglu.swiglu(drawn(4, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="fp64"):
        triton_gelu.linear_gelu(*(drawn(*shape, dtype=torch.float64) for shape in ((4, 8), (6, 8), (6,))))
