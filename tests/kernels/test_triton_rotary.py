"""Rotary position in Triton against its twin: whole and partial, on the views that a model has."""

import pytest
import torch
from twins import DTYPES, assert_matches_twin, drawn, needs_triton

from megacl.kernels import reference

needs_triton()
from megacl.kernels import triton_rotary  # noqa: E402


def tables(length: int, half: int, batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 3 * drawn(*([] if batch is None else [batch, 1]), length, half, seed=7).detach()
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [0, 1, 3, 5])
@pytest.mark.parametrize("by_row", [False, True])
def test_results_and_gradients_are_the_definitions(by_row, half, dtype):
    x_BHTE = drawn(2, 3, 7, 10, dtype=dtype)
    cos, sin = tables(7, half, 2 if by_row else None)
    assert_matches_twin(triton_rotary.rotary, reference.rotary, [x_BHTE, cos, sin])


def test_queries_and_keys_are_read_where_a_product_left_them_and_written_in_the_same_order():
    qkv_BTHE = drawn(2, 5, 6, 8).detach()
    x_BHTE = qkv_BTHE.transpose(1, 2)[:, :4].requires_grad_()
    cos, sin = tables(5, 4)
    assert_matches_twin(triton_rotary.rotary, reference.rotary, [x_BHTE, cos, sin])
    y_BHTE = triton_rotary.rotary(x_BHTE, cos, sin)
    assert y_BHTE.transpose(1, 2).is_contiguous()


def test_a_gradient_with_any_strides_is_turned_back():
    x_BHTE = drawn(2, 3, 4, 8)
    cos, sin = tables(4, 2)
    for coming in (drawn(1, 8).detach().expand(2, 3, 4, 8), drawn(8, 2, 3, 4).detach().permute(1, 2, 3, 0)):
        assert_matches_twin(triton_rotary.rotary, reference.rotary, [x_BHTE, cos, sin], coming=[coming])


def test_many_heads_are_shared_between_programs():
    x_BHTE = drawn(1, 40, 2, 128)
    assert_matches_twin(triton_rotary.rotary, reference.rotary, [x_BHTE, *tables(2, 64)])


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8)])
def test_empty_tensors_pass(shape):
    assert_matches_twin(triton_rotary.rotary, reference.rotary, [drawn(*shape), *tables(shape[2], 4)])


def test_what_is_not_turned_passes_bit_by_bit_whatever_it_is():
    x_BHTE = drawn(1, 1, 3, 8).detach()
    x_BHTE[..., 4:] = torch.tensor([float("inf"), float("nan"), 3e38, -0.0])
    y_BHTE = triton_rotary.rotary(x_BHTE, *tables(3, 2))
    assert torch.equal(y_BHTE[..., 4:].view(torch.int32), x_BHTE[..., 4:].view(torch.int32))
    assert y_BHTE[..., :4].isfinite().all()


def test_huge_values_are_turned():
    assert_matches_twin(triton_rotary.rotary, reference.rotary, [drawn(1, 2, 3, 8, scale=3e37), *tables(3, 4)])


def test_values_of_64_bits_are_refused():
    with pytest.raises(ValueError, match="fp64"):
        triton_rotary.rotary(drawn(1, 1, 2, 4, dtype=torch.float64), *tables(2, 2))
