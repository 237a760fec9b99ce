"""oneDNN's products in fp32 against the twins in fp64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import OF_A_CPU, assert_matches_twin, drawn

from megacl.kernels import FORMS, REFERENCE, c_library, onednn

pytestmark = [OF_A_CPU, pytest.mark.skipif(not onednn.available(), reason="needs a PyTorch with oneDNN")]


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (33, 64, 130), (0, 7, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_its_twin(shape, bias):
    rows, inputs, outputs = shape
    x, weight = drawn(rows, inputs), drawn(outputs, inputs, seed=1)
    tensors = (x, weight, drawn(outputs, seed=2)) if bias else (x, weight)
    assert_matches_twin(FORMS["linear"]["onednn"], REFERENCE.linear, tensors)


def test_a_linear_layer_with_gelu_is_its_twin():
    tensors = drawn(2, 5, 7), drawn(12, 7, seed=1), drawn(12, seed=2)
    assert_matches_twin(FORMS["linear_gelu"]["onednn"], REFERENCE.linear_gelu, tensors)


def test_views_that_are_not_contiguous_are_read_by_their_strides():
    x = drawn(4, 3, 10).detach().transpose(0, 1)[..., ::2].requires_grad_()
    weight = drawn(5, 6, seed=1).detach().t().requires_grad_()
    coming = [drawn(6, 3, 4, seed=3).detach().permute(1, 2, 0)]
    assert_matches_twin(FORMS["linear"]["onednn"], REFERENCE.linear, (x, weight), coming=coming)


def test_values_of_another_width_go_the_twins_way():
    x, weight = drawn(5, 7, dtype=torch.float64), drawn(3, 7, dtype=torch.float64, seed=1)
    assert torch.equal(FORMS["linear"]["onednn"](x, weight), REFERENCE.linear(x, weight))


def test_only_the_gradients_that_are_wanted_are_computed():
    x, weight = drawn(5, 7).detach(), drawn(3, 7, seed=1)
    FORMS["linear"]["onednn"](x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_a_whole_graph_with_it_goes_through_torch_compile():
    x, weight, bias = drawn(2, 5, 7), drawn(12, 7, seed=1), drawn(12, seed=2)
    torch._dynamo.reset()
    compiled = torch.compile(FORMS["linear_gelu"]["onednn"], fullgraph=True, backend="aot_eager")
    results = [op(x, weight, bias) for op in (compiled, FORMS["linear_gelu"]["onednn"])]
    gradients = [torch.autograd.grad(y.sin().sum(), [x, weight, bias]) for y in results]
    assert torch.equal(*results)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


SIDES = st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 255, 256, 257, 300]))


@settings(deadline=None)
@given(
    rows=SIDES, columns=SIDES, factor=st.sampled_from([None, -0.3]), strides=st.sampled_from(["own", "turned", "cut"])
)
def test_a_matrix_turned_and_scaled_lies_row_by_row(rows, columns, factor, strides):
    x_AB = drawn(rows, columns).detach()
    if strides == "turned":
        x_AB = x_AB.t().contiguous().t()
    if strides == "cut":
        x_AB = drawn(rows, columns + 1).detach()[:, 1:]
    y_BA = onednn.turned(x_AB, None if factor is None else torch.tensor(factor))
    assert y_BA.is_contiguous()
    assert torch.equal(y_BA, x_AB.t() if factor is None else factor * x_AB.t())


def test_without_a_compiler_a_matrix_is_turned_to_the_same_bits(monkeypatch):
    x_AB = drawn(300, 21).detach()
    factors = None, torch.tensor(-0.3)
    with_c = [onednn.turned(x_AB, factor) for factor in factors]
    monkeypatch.setattr(c_library, "unavailable", lambda: "no C compiler")
    for ours, factor in zip(with_c, factors, strict=True):
        assert torch.equal(onednn.turned(x_AB, factor), ours)
