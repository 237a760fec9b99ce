"""Every form of rotary position against its twin: whole and partial, on the views that a model has."""

import pytest
import torch
from twins import DTYPES, TRITON, assert_matches_twin, drawn, param

from megacl import kernels

IMPLEMENTATIONS = kernels.FORMS["rotary"]
FORMS = pytest.mark.parametrize("form", [param(form=form) for form in IMPLEMENTATIONS])


def check(form: str, inputs: list[torch.Tensor], coming: list[torch.Tensor] | None = None) -> None:
    roundings = 1 if form == "triton" else 3  # autograd adds in 16 bits what comes from either half
    assert_matches_twin(IMPLEMENTATIONS[form], IMPLEMENTATIONS["reference"], inputs, roundings=roundings, coming=coming)


def tables(length: int, half: int, batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 3 * drawn(*([] if batch is None else [batch, 1]), length, half, seed=7).detach()
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [0, 1, 3, 5])
@pytest.mark.parametrize("by_row", [False, True])
@FORMS
def test_results_and_gradients_are_the_definitions(form, by_row, half, dtype):
    x_BHTE = drawn(2, 3, 7, 10, dtype=dtype)
    cos, sin = tables(7, half, 2 if by_row else None)
    check(form, [x_BHTE, cos, sin])


@FORMS
def test_queries_and_keys_are_read_where_a_product_left_them_and_written_in_the_same_order(form):
    qkv_BTHE = drawn(2, 5, 6, 8).detach()
    x_BHTE = qkv_BTHE.transpose(1, 2)[:, :4].requires_grad_()
    cos, sin = tables(5, 4)
    check(form, [x_BHTE, cos, sin])
    if form == "triton":
        assert IMPLEMENTATIONS[form](x_BHTE, cos, sin).transpose(1, 2).is_contiguous()


@FORMS
def test_a_gradient_with_any_strides_is_turned_back(form):
    x_BHTE = drawn(2, 3, 4, 8)
    cos, sin = tables(4, 2)
    for coming in (drawn(1, 8).detach().expand(2, 3, 4, 8), drawn(8, 2, 3, 4).detach().permute(1, 2, 3, 0)):
        check(form, [x_BHTE, cos, sin], [coming])


@FORMS
def test_many_heads_are_shared_between_programs(form):
    x_BHTE = drawn(1, 40, 2, 128)
    check(form, [x_BHTE, *tables(2, 64)])


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8)])
@FORMS
def test_empty_tensors_pass(form, shape):
    check(form, [drawn(*shape), *tables(shape[2], 4)])


@FORMS
def test_what_is_not_turned_passes_bit_by_bit_whatever_it_is(form):
    x_BHTE = drawn(1, 1, 3, 8).detach()
    x_BHTE[..., 4:] = torch.tensor([float("inf"), float("nan"), 3e38, -0.0])
    y_BHTE = IMPLEMENTATIONS[form](x_BHTE, *tables(3, 2))
    assert torch.equal(y_BHTE[..., 4:].view(torch.int32), x_BHTE[..., 4:].view(torch.int32))
    assert y_BHTE[..., :4].isfinite().all()


@FORMS
def test_huge_values_are_turned(form):
    check(form, [drawn(1, 2, 3, 8, scale=3e37), *tables(3, 4)])


def test_gradients_agree_with_finite_differences():
    tables_PR = [table.double() for table in tables(3, 2)]
    assert torch.autograd.gradcheck(IMPLEMENTATIONS["reference"], (drawn(1, 2, 3, 6, dtype=torch.float64), *tables_PR))


@TRITON
def test_triton_refuses_values_of_64_bits():
    with pytest.raises(ValueError, match="fp64"):
        IMPLEMENTATIONS["triton"](drawn(1, 1, 2, 4, dtype=torch.float64), *tables(2, 2))
