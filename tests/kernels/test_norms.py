"""Every form of RMSNorm and LayerNorm against its twin: with and without a residual, in every width."""

import pytest
import torch
from twins import DTYPES, TRITON, assert_matches_twin, drawn, on_grid, param

from megacl import kernels

EPS = 1e-5
NORMS = pytest.mark.parametrize(
    ("name", "form"),
    [param(name, form=form) for name in ("rms_norm", "layer_norm") for form in kernels.FORMS[name]],
)


def weights(name: str, width: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [drawn(width, dtype=dtype, seed=seed) for seed in ((1,) if name == "rms_norm" else (1, 2))]


def check(
    name: str,
    form: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    parameters: list[torch.Tensor],
    *,
    epsilons: int = 64,
    coming: list[torch.Tensor] | None = None,
) -> None:
    ours, twin = kernels.FORMS[name][form], kernels.FORMS[name]["reference"]
    roundings = 1 if form == "triton" else 4  # the others round between their steps
    options = {"epsilons": epsilons, "roundings": roundings, "coming": coming}
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
@NORMS
def test_results_and_gradients_are_the_definitions(name, form, with_residual, dtype):
    for shape in [(3,), (1, 3), (17, 64), (2, 5, 100), (33, 128), (130, 20)]:
        x = on_grid(*shape, dtype=dtype, seed=3)
        residual = on_grid(*shape, dtype=dtype, seed=4) if with_residual else None
        check(name, form, x, residual, weights(name, shape[-1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NORMS
def test_what_is_normalised_is_the_total_as_it_was_rounded(name, form, dtype):
    x, residual = (drawn(5, 40, dtype=dtype, seed=seed).detach() for seed in (3, 4))
    ours, parameters = kernels.FORMS[name][form], weights(name, 40)
    y, total = ours(x, *parameters, EPS, residual)
    assert torch.equal(y, ours(total, *parameters, EPS)[0])


@NORMS
def test_a_half_wide_residual_is_added_to_a_wide_stream(name, form):
    check(name, form, drawn(6, 40, seed=3), drawn(6, 40, dtype=torch.bfloat16, seed=4), weights(name, 40))


@NORMS
def test_views_and_gradients_with_any_strides_are_read_as_they_are_meant(name, form):
    x = drawn(24, 6, 4, seed=3).detach().permute(1, 2, 0).requires_grad_()
    residual = drawn(6, 4, 48, seed=4).detach()[..., ::2].requires_grad_()
    coming = [drawn(1, 24, seed=5).detach().expand(6, 4, 24), drawn(4, 6, 24, seed=6).detach().transpose(0, 1)]
    check(name, form, x, residual, weights(name, 24), coming=coming)
    heads_BHTE = drawn(2, 3, 5, 8, seed=3).detach().transpose(1, 2)[..., :7].requires_grad_()
    coming_BHTE = drawn(2, 3, 5, 8, seed=5).detach().transpose(1, 2)[..., :7]
    check(name, form, heads_BHTE, None, weights(name, 7), coming=[coming_BHTE])


@NORMS
def test_empty_tensors_pass(name, form):
    check(name, form, drawn(0, 16, seed=3), drawn(0, 16, seed=4), weights(name, 16))
    check(name, form, drawn(2, 0, 16, seed=3), None, weights(name, 16))


@pytest.mark.parametrize("scale", [1e-12, 1e4, 1e12])
@NORMS
def test_very_small_and_large_values_are_normalised(name, form, scale):
    check(name, form, drawn(5, 64, seed=3, scale=scale), None, weights(name, 64))


@NORMS
def test_values_far_from_zero_with_little_between_them_keep_their_deviation(name, form):
    x = (1000 + drawn(5, 64, seed=3).detach()).requires_grad_()
    # a mean of 1000 is off by 1000 epsilons where a deviation of 1 is off by one
    check(name, form, x, None, weights(name, 64), epsilons=4000)


@NORMS
def test_a_result_that_is_not_used_has_no_part_in_the_gradient(name, form):
    ours = kernels.FORMS[name][form]
    x, residual, parameters = drawn(4, 8, seed=3), drawn(4, 8, seed=4), weights(name, 8)
    _, total = ours(x, *parameters, EPS, residual)
    dx, dresidual, *others = torch.autograd.grad(total.sum(), [x, residual, *parameters], allow_unused=True)
    assert dx.eq(1).all()
    assert dresidual.eq(1).all()
    assert others == [None] * len(parameters)


@TRITON
def test_under_autocast_y_has_the_dtype_that_the_product_behind_it_wants():
    x, weight = drawn(4, 8, seed=3), drawn(8, seed=1)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, total = kernels.FORMS["rms_norm"]["triton"](x, weight, EPS, drawn(4, 8, dtype=torch.bfloat16, seed=4))
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)


@TRITON
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_triton_refuses_values_of_64_bits(name):
    with pytest.raises(ValueError, match="fp64"):
        kernels.FORMS[name]["triton"](drawn(4, 8, dtype=torch.float64), *weights(name, 8), EPS)


@pytest.mark.parametrize("form", ["lean", "torch", "reference"])
def test_gradients_agree_with_finite_differences(form):
    x, residual, weight, bias = (
        drawn(*shape, dtype=torch.float64, seed=n) for n, shape in enumerate([(3, 5), (3, 5), (5,), (5,)])
    )
    for name, parameters in (("rms_norm", [weight]), ("layer_norm", [weight, bias])):
        if op := kernels.FORMS[name].get(form):
            assert torch.autograd.gradcheck(lambda x, r, *p, op=op: op(x, *p, EPS, r), (x, residual, *parameters))
