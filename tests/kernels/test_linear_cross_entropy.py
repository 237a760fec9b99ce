"""The cross-entropy of a linear layer, in chunks, against the definition: forward and backward, in every width."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from twins import DEVICE, DTYPES, param

from megacl import kernels

IMPLEMENTATIONS = kernels.FORMS["linear_cross_entropy"]
FORMS = pytest.mark.parametrize("form", [param(form=form) for form in ("chunked", "c", "onednn", "triton")])

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw(tokens: int, hidden: int, vocab: int, seed: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """x, weight and targets, of which about a third are ignored."""
    rng = np.random.Generator(np.random.Philox(seed))
    x_ND = torch.from_numpy(rng.normal(size=(tokens, hidden))).to(DEVICE, dtype).requires_grad_()
    weight_VD = torch.from_numpy(rng.normal(size=(vocab, hidden))).to(DEVICE, dtype).requires_grad_()
    targets_N = torch.from_numpy(rng.integers(0, vocab, tokens))
    targets_N[torch.from_numpy(rng.random(tokens) < 0.3)] = kernels.IGNORED
    return x_ND, weight_VD, targets_N.to(DEVICE)


def quarters(tokens: int, hidden: int, vocab: int, seed: int, dtype: torch.dtype) -> Inputs:
    """The same, of values whose products add up exactly in 16 bits: logits are multiples of 1/4 up to 3 hidden / 4."""
    rng = np.random.Generator(np.random.Philox(seed))
    _, _, targets_N = draw(tokens, hidden, vocab, seed)
    x_ND = torch.from_numpy(rng.integers(-1, 2, (tokens, hidden))).to(DEVICE, dtype).requires_grad_()
    weight_VD = torch.from_numpy(rng.integers(-3, 4, (vocab, hidden)) / 4).to(DEVICE, dtype).requires_grad_()
    return x_ND, weight_VD, targets_N


def widened(inputs: Inputs) -> Inputs:
    x_ND, weight_VD, targets_N = inputs
    return x_ND.detach().double().requires_grad_(), weight_VD.detach().double().requires_grad_(), targets_N


def run(form: str, inputs: Inputs, chunk: int, z_loss: float = 0.0) -> tuple[torch.Tensor, ...]:
    """The sums, and the gradients of 3 x the first."""
    x_ND, weight_VD, targets_N = inputs
    sums = IMPLEMENTATIONS[form](x_ND, weight_VD, targets_N, chunk=chunk, z_loss=z_loss)
    return sums.detach(), *torch.autograd.grad(3 * sums[0], [x_ND, weight_VD])


@settings(deadline=None)
@given(
    tokens=st.integers(0, 23),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 19),
    chunk=st.integers(1, 30),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**32),
)
def test_any_chunk_gives_the_loss_and_gradients_of_the_definition(tokens, hidden, vocab, chunk, z_loss, seed):
    inputs = draw(tokens, hidden, vocab, seed)
    for ours, expected in zip(
        run("chunked", inputs, chunk, z_loss), run("reference", inputs, chunk, z_loss), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_gradients_agree_with_finite_differences(form):
    x_ND, weight_VD, targets_N = draw(7, 3, 5, seed=1)
    op = IMPLEMENTATIONS[form]
    assert torch.autograd.gradcheck(
        lambda x, weight: op(x, weight, targets_N, chunk=3, z_loss=0.1)[0], (x_ND, weight_VD)
    )


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "vocab", "chunk", "z_loss"), [(1, 1, 1, 0.0), (23, 50, 10, 0.0), (23, 50, 30, 0.1), (3, 9000, 2, 1e-3)]
)
def test_the_sums_and_gradients_are_the_definitions_in_every_width(form, dtype, tokens, vocab, chunk, z_loss):
    inputs = quarters(tokens, 8, vocab, seed=2, dtype=dtype)
    exact = widened(inputs)
    sums, *gradients = run(form, inputs, chunk, z_loss)
    expected, *exact_gradients = run("reference", exact, chunk, z_loss)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    # The logits' gradient is rounded once, wherever a product reads it, and the products once.
    x_ND, weight_VD, targets_N = exact
    logits_NV = (x_ND @ weight_VD.t()).detach()
    counted_N1 = (targets_N != kernels.IGNORED)[:, None]
    probabilities_NV = torch.softmax(logits_NV, 1) * (1 + 2 * z_loss * logits_NV.logsumexp(1, keepdim=True))
    gradient_NV = 3 * counted_N1 * probabilities_NV
    gradient_NV.scatter_add_(1, targets_N.clamp(min=0)[:, None], -3.0 * counted_N1.double())
    eps = max(torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps)
    parts = [gradient_NV.abs() @ weight_VD.abs(), gradient_NV.abs().t() @ x_ND.abs()]
    for ours, exactly, part in zip(gradients, exact_gradients, parts, strict=True):
        assert ours.dtype == dtype
        assert bool(((ours.double() - exactly).abs() <= eps * (part + exactly.abs()) + 1e-7).all())


@FORMS
def test_in_fp16_probabilities_that_it_cannot_hold_still_have_a_gradient_under_a_loss_scale(form):
    logits = torch.tensor([0.0, -19.0, -21.0], device=DEVICE)
    x = torch.ones(1, 1, dtype=torch.float16, device=DEVICE, requires_grad=True)
    weight = logits.half()[:, None].requires_grad_()
    target = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    sums = IMPLEMENTATIONS[form](x, weight, target, chunk=1, z_loss=0.0)
    dx, dweight = torch.autograd.grad(2.0**16 * sums[0], [x, weight])
    gradient = torch.softmax(logits.double(), 0) - torch.tensor([1.0, 0.0, 0.0], device=DEVICE)
    assert gradient.abs().max() < torch.finfo(torch.float16).smallest_normal / 1000
    # that of the target itself is a difference of two numbers close to 1
    torch.testing.assert_close(dweight[1:].double(), 2.0**16 * gradient[1:, None], rtol=0.01, atol=0)
    torch.testing.assert_close(dx.double(), (2.0**16 * gradient @ logits.double()).view(1, 1), rtol=0.01, atol=0)


@FORMS
def test_in_fp16_many_tokens_of_one_kind_do_not_overflow_the_weights_gradient(form):
    x = torch.full((64, 1), 64.0, dtype=torch.float16, device=DEVICE, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.float16, device=DEVICE, requires_grad=True)
    target = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    sums = IMPLEMENTATIONS[form](x, weight, target, chunk=64, z_loss=0.0)
    (dweight,) = torch.autograd.grad(sums[0], weight)
    assert dweight.tolist() == [[-2048.0], [2048.0]]


@FORMS
def test_autocast_multiplies_in_its_dtype_and_gives_gradients_in_the_weights(form):
    inputs = draw(33, 16, 40, seed=2, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        sums, dx, dweight = run(form, inputs, 16)
    assert (sums.dtype, dx.dtype, dweight.dtype) == (torch.float32,) * 3
    exact = run("reference", inputs, 8)
    assert 0 < (dweight - exact[2]).norm() < 0.02 * exact[2].norm()


@FORMS
def test_one_input_alone_may_need_its_gradient(form):
    x_ND, weight_VD, targets_N = draw(10, 4, 6, seed=3, dtype=torch.float32)
    expected = run("reference", (x_ND, weight_VD, targets_N), 4)
    for ours in (x_ND, weight_VD):
        others = [each.detach() if each is not ours else each for each in (x_ND, weight_VD)]
        sums = IMPLEMENTATIONS[form](*others, targets_N, chunk=4, z_loss=0.0)
        (gradient,) = torch.autograd.grad(3 * sums[0], [ours])
        torch.testing.assert_close(gradient, expected[1] if ours is x_ND else expected[2])


@FORMS
def test_views_are_read_by_their_strides(form):
    x_ND, weight_VD, targets_N = draw(10, 4, 6, seed=3, dtype=torch.float32)
    views = [each.detach().t().contiguous().t().requires_grad_() for each in (x_ND, weight_VD)]
    cut_N = torch.stack([targets_N, targets_N], 1)[:, 0]
    found = run(form, (views[0], views[1], cut_N), 4, 0.1)
    for ours, expected in zip(found, run("reference", (x_ND, weight_VD, targets_N), 4, 0.1), strict=True):
        torch.testing.assert_close(ours, expected)


@FORMS
def test_fake_tensors_pass_forward_and_back(form):
    x_ND, weight_VD, targets_N = draw(10, 4, 6, seed=3, dtype=torch.float32)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) for each in (x_ND, weight_VD)]
        sums = IMPLEMENTATIONS[form](*fakes, mode.from_tensor(targets_N), chunk=4, z_loss=0.1)
        gradients = torch.autograd.grad(3 * sums[0], fakes)
    assert [each.shape for each in (sums, *gradients)] == [(3,), x_ND.shape, weight_VD.shape]


@FORMS
def test_nothing_is_differentiated_where_gradients_are_off(form):
    x_ND, weight_VD, targets_N = draw(10, 4, 6, seed=3, dtype=torch.float32)
    with torch.no_grad():
        sums = IMPLEMENTATIONS[form](x_ND, weight_VD, targets_N, chunk=4, z_loss=0.0)
    assert sums.grad_fn is None
    torch.testing.assert_close(sums, run("reference", (x_ND, weight_VD, targets_N), 4)[0])


@FORMS
@pytest.mark.parametrize("scale", [1e4, 1e18, 1e37])
def test_logits_far_from_zero_do_not_overflow(form, scale):
    x_ND, weight_VD, targets_N = draw(10, 4, 6, seed=3, dtype=torch.float32)
    inputs = ((scale * x_ND).detach().requires_grad_(), weight_VD, targets_N)
    sums, *gradients = run(form, inputs, 4)
    expected, *exact = run("reference", widened(inputs), 4)
    for ours, exactly in zip((sums[:2], *gradients), (expected[:2], *exact), strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), exactly, rtol=1e-4, atol=1e-5 * exactly.abs().max().item())


@FORMS
def test_an_ignored_token_that_is_not_finite_does_not_spoil_the_loss(form):
    x_ND, weight_VD, targets_N = draw(6, 4, 5, seed=4, dtype=torch.float32)
    targets_N[:] = torch.tensor([0, 1, kernels.IGNORED, 2, 3, 4])
    poisoned = x_ND.detach().clone()
    poisoned[2] = float("nan")
    expected, found = (
        IMPLEMENTATIONS[form](x, weight_VD.detach(), targets_N, chunk=4, z_loss=0.1) for x in (x_ND.detach(), poisoned)
    )
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's own
@FORMS
def test_a_token_that_is_not_finite_makes_the_loss_so(form):
    x_ND, weight_VD, targets_N = draw(6, 4, 5, seed=4, dtype=torch.float32)
    targets_N[0] = 1
    for value in (float("nan"), float("inf")):
        poisoned = x_ND.detach().clone()
        poisoned[0] = value
        assert not IMPLEMENTATIONS[form](poisoned, weight_VD, targets_N, chunk=4, z_loss=0.0)[0].isfinite()


@FORMS
def test_only_a_chunk_of_logits_exists_at_one_time(form):
    inputs = draw(23, 4, 6, seed=5, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:  # it sees into custom operators too
        IMPLEMENTATIONS[form](*inputs, chunk=10, z_loss=0.0)
    shapes = [shape for event in seen.events() for shape in event.input_shapes if len(shape) == 2]
    assert max(rows for rows, columns in shapes if columns == 6) == 10


@pytest.mark.parametrize("form", [param(form="triton")])
def test_triton_refuses_values_of_64_bits(form):
    with pytest.raises(ValueError, match="fp64"):
        IMPLEMENTATIONS[form](*draw(3, 4, 6, seed=5), chunk=10, z_loss=0.0)
