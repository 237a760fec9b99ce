"""RMSNorm and LayerNorm in Triton against their twins: with and without a residual, in every width."""

import pytest
import torch
from twins import DTYPES, assert_matches_twin, drawn, needs_triton, on_grid

from megacl.kernels import reference

needs_triton()
from megacl.kernels import triton_norms  # noqa: E402

EPS = 1e-5
NORMS = ["rms_norm", "layer_norm"]


def weights(name: str, width: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [drawn(width, dtype=dtype, seed=seed) for seed in ((1,) if name == "rms_norm" else (1, 2))]


def check(name: str, x: torch.Tensor, residual: torch.Tensor | None, parameters: list[torch.Tensor], **options) -> None:
    ours, twin = getattr(triton_norms, name), getattr(reference, name)
    if residual is None:  # total is x, and its gradient that of the function that gave x
        assert_matches_twin(
            lambda x, *p: ours(x, *p, EPS)[0], lambda x, *p: twin(x, *p, EPS)[0], [x, *parameters], **options
        )
    else:
        assert_matches_twin(
            lambda x, r, *p: ours(x, *p, EPS, r),
            lambda x, r, *p: twin(x, *p, EPS, r),
            [x, residual, *parameters],
            **options,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_results_and_gradients_are_the_definitions(name, with_residual, dtype):
    for shape in [(3,), (1, 3), (17, 64), (2, 5, 100), (33, 128)]:
        x = on_grid(*shape, dtype=dtype, seed=3)
        residual = on_grid(*shape, dtype=dtype, seed=4) if with_residual else None
        check(name, x, residual, weights(name, shape[-1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_what_is_normalised_is_the_total_as_it_was_rounded(name, dtype):
    x, residual = (drawn(5, 40, dtype=dtype, seed=seed).detach() for seed in (3, 4))
    ours, parameters = getattr(triton_norms, name), weights(name, 40)
    y, total = ours(x, *parameters, EPS, residual)
    assert torch.equal(y, ours(total, *parameters, EPS)[0])


@pytest.mark.parametrize("name", NORMS)
def test_a_half_wide_residual_is_added_to_a_wide_stream(name):
    check(name, drawn(6, 40, seed=3), drawn(6, 40, dtype=torch.bfloat16, seed=4), weights(name, 40))


@pytest.mark.parametrize("name", NORMS)
def test_views_and_gradients_with_any_strides_are_read_as_they_are_meant(name):
    x = drawn(24, 6, 4, seed=3).detach().permute(1, 2, 0).requires_grad_()
    residual = drawn(6, 4, 48, seed=4).detach()[..., ::2].requires_grad_()
    coming = [drawn(1, 24, seed=5).detach().expand(6, 4, 24), drawn(4, 6, 24, seed=6).detach().transpose(0, 1)]
    check(name, x, residual, weights(name, 24), coming=coming)


@pytest.mark.parametrize("name", NORMS)
def test_empty_tensors_pass(name):
    check(name, drawn(0, 16, seed=3), drawn(0, 16, seed=4), weights(name, 16))
    check(name, drawn(2, 0, 16, seed=3), None, weights(name, 16))


@pytest.mark.parametrize("scale", [1e-12, 1e4, 1e17])
@pytest.mark.parametrize("name", NORMS)
def test_very_small_and_large_values_are_normalised(name, scale):
    check(name, drawn(5, 64, seed=3, scale=scale), None, weights(name, 64))


@pytest.mark.parametrize("name", NORMS)
def test_values_far_from_zero_with_little_between_them_keep_their_deviation(name):
    x = (1000 + drawn(5, 64, seed=3).detach()).requires_grad_()
    # a mean of 1000 is off by 1000 epsilons where a deviation of 1 is off by one
    check(name, x, None, weights(name, 64), epsilons=4000)


@pytest.mark.parametrize("name", NORMS)
def test_a_result_that_is_not_used_has_no_part_in_the_gradient(name):
    ours = getattr(triton_norms, name)
    x, residual, parameters = drawn(4, 8, seed=3), drawn(4, 8, seed=4), weights(name, 8)
    _, total = ours(x, *parameters, EPS, residual)
    dx, dresidual, *others = torch.autograd.grad(total.sum(), [x, residual, *parameters], allow_unused=True)
    assert dx.eq(1).all()
    assert dresidual.eq(1).all()
    assert others == [None] * len(parameters)


def test_under_autocast_y_has_the_dtype_that_the_product_behind_it_wants():
    x, weight = drawn(4, 8, seed=3), drawn(8, seed=1)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, total = triton_norms.rms_norm(x, weight, EPS, drawn(4, 8, dtype=torch.bfloat16, seed=4))
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", NORMS)
def test_values_of_64_bits_are_refused(name):
    with pytest.raises(ValueError, match="fp64"):
        getattr(triton_norms, name)(drawn(4, 8, dtype=torch.float64), *weights(name, 8), EPS)
