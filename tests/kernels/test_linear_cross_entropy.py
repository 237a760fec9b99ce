"""The chunked loss against the definition, forward and backward."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacl import kernels

FORMS = kernels.FORMS["linear_cross_entropy"]


def chunked(*inputs: torch.Tensor, chunk: int) -> torch.Tensor:
    """The sum of the nats."""
    return FORMS["chunked"](*inputs, chunk=chunk, z_loss=0.0)[0]


def draw(
    tokens: int, hidden: int, vocab: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """x, weight and targets, of which about a third are ignored."""
    rng = np.random.Generator(np.random.Philox(seed))
    x_ND = torch.from_numpy(rng.normal(size=(tokens, hidden))).to(dtype).requires_grad_()
    weight_VD = torch.from_numpy(rng.normal(size=(vocab, hidden))).to(dtype).requires_grad_()
    targets_N = torch.from_numpy(rng.integers(0, vocab, tokens))
    targets_N[torch.from_numpy(rng.random(tokens) < 0.3)] = kernels.IGNORED
    return x_ND, weight_VD, targets_N


def run(form: str, inputs: tuple[torch.Tensor, ...], chunk: int) -> tuple[torch.Tensor, ...]:
    """The loss, and the gradients of 3 x loss."""
    x_ND, weight_VD, targets_N = inputs
    objective, nats, _ = FORMS[form](x_ND, weight_VD, targets_N, chunk=chunk, z_loss=0.0)
    assert objective == nats
    return nats.detach(), *torch.autograd.grad(3 * objective, [x_ND, weight_VD])


@settings(deadline=None)
@given(
    tokens=st.integers(0, 23),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 19),
    chunk=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_any_chunk_gives_the_loss_and_gradients_of_the_definition(tokens, hidden, vocab, chunk, seed):
    inputs = draw(tokens, hidden, vocab, seed)
    for ours, expected in zip(run("chunked", inputs, chunk), run("reference", inputs, chunk), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_gradients_agree_with_finite_differences(form):
    x_ND, weight_VD, targets_N = draw(7, 3, 5, seed=1)
    assert torch.autograd.gradcheck(
        lambda x, weight: FORMS[form](x, weight, targets_N, chunk=3, z_loss=0.1)[0], (x_ND, weight_VD)
    )


@pytest.mark.parametrize("form", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inputs_of_16_bits_give_a_loss_in_fp32(form, dtype):
    inputs = draw(33, 16, 40, seed=2, dtype=dtype)
    nats, dx, dweight = run(form, inputs, 8)
    assert (nats.dtype, dx.dtype, dweight.dtype) == (torch.float32, dtype, dtype)
    wide = tuple(each.detach().double().requires_grad_(each.is_floating_point()) for each in inputs[:2])
    expected = run("reference", (*wide, inputs[2]), 8)
    torch.testing.assert_close(nats.double(), expected[0], rtol=2e-3, atol=0)
    for ours, exact in zip((dx, dweight), expected[1:], strict=True):
        assert (ours.double() - exact).norm() < 0.02 * exact.norm()


def test_autocast_multiplies_in_its_dtype_and_gives_gradients_in_the_weights():
    inputs = draw(33, 16, 40, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        nats, dx, dweight = run("chunked", inputs, 8)
    assert (nats.dtype, dx.dtype, dweight.dtype) == (torch.float32,) * 3
    exact = run("reference", inputs, 8)
    assert 0 < (dweight - exact[2]).norm() < 0.02 * exact[2].norm()


def test_one_input_alone_may_need_its_gradient():
    x_ND, weight_VD, targets_N = draw(10, 4, 6, seed=3)
    expected = run("reference", (x_ND, weight_VD, targets_N), 4)
    for ours in (x_ND, weight_VD):
        others = [each.detach() if each is not ours else each for each in (x_ND, weight_VD)]
        (gradient,) = torch.autograd.grad(3 * chunked(*others, targets_N, chunk=4), [ours])
        torch.testing.assert_close(gradient, expected[1] if ours is x_ND else expected[2])


def test_nothing_is_differentiated_where_gradients_are_off():
    x_ND, weight_VD, targets_N = draw(10, 4, 6, seed=3)
    with torch.no_grad():
        nats = chunked(x_ND, weight_VD, targets_N, chunk=4)
    assert nats.grad_fn is None
    torch.testing.assert_close(nats, run("reference", (x_ND, weight_VD, targets_N), 4)[0])


def test_logits_far_from_zero_do_not_overflow():
    x_ND, weight_VD, targets_N = draw(10, 4, 6, seed=3, dtype=torch.float32)
    inputs = ((1e4 * x_ND).detach().requires_grad_(), weight_VD, targets_N)
    for ours, expected in zip(run("chunked", inputs, 4), run("reference", inputs, 4), strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, expected)


def test_an_ignored_token_that_is_not_finite_does_not_spoil_the_loss():
    x_ND, weight_VD, targets_N = draw(6, 4, 5, seed=4)
    targets_N[:] = torch.tensor([0, 1, kernels.IGNORED, 2, 3, 4])
    expected = chunked(x_ND, weight_VD, targets_N, chunk=4)
    poisoned = x_ND.detach().clone()
    poisoned[2] = float("nan")
    torch.testing.assert_close(chunked(poisoned, weight_VD, targets_N, chunk=4), expected)


def test_only_a_chunk_of_logits_exists_at_one_time(monkeypatch):
    made = []
    linear = torch.nn.functional.linear

    def counting(x, weight):
        made.append(x.shape[0])
        return linear(x, weight)

    monkeypatch.setattr("torch.nn.functional.linear", counting)
    chunked(*draw(23, 4, 6, seed=5), chunk=10)
    assert made == [10, 10, 3]
