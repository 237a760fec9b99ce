"""Every form of attention inside documents against the definition, forward and backward."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacl import kernels
from megacl.kernels import reference

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def draw(batch: int, length: int, heads: tuple[int, int], width: int, density: float, seed: int) -> Inputs:
    """q, k, v in fp64 and the bounds of random documents, about one in 1 / density tokens."""
    rng = np.random.Generator(np.random.Philox(seed))
    begins_BT = rng.random((batch, length)) < density
    begins_BT[:, 0] = True
    bounds = torch.from_numpy(np.append(np.flatnonzero(begins_BT), batch * length)).int()
    q, k, v = (torch.from_numpy(rng.normal(size=(batch, n, length, width))) for n in (heads[0], heads[1], heads[1]))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), bounds


def by_hand(q_BHTE: torch.Tensor, k_BKTE: torch.Tensor, v_BKTE: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """One query after another: the mean of the values before it in its document, weighted by exp(q k / sqrt(E))."""
    _, heads, length, width = q_BHTE.shape
    rows = []
    for place in range(q_BHTE.shape[0] * length):
        row, t = divmod(place, length)
        first = max(int(bound) for bound in bounds if bound <= place) - row * length
        mixed = []
        for head in range(heads):
            shared = head * k_BKTE.shape[1] // heads
            scores = k_BKTE[row, shared, first : t + 1] @ q_BHTE[row, head, t] / math.sqrt(width)
            mixed.append(torch.softmax(scores, 0) @ v_BKTE[row, shared, first : t + 1])
        rows.append(torch.stack(mixed))
    return torch.stack(rows).unflatten(0, (-1, length)).transpose(1, 2)


def run(form: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """What is mixed, and the gradients of its sum weighted by place."""
    mixed = kernels.FORMS["document_attention"][form](*inputs, inputs[0].shape[-1] ** -0.5)
    return mixed.detach(), *gradients(mixed, inputs)


def gradients(mixed: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    weights = torch.linspace(-1, 2, mixed.numel(), dtype=mixed.dtype, device=mixed.device).view_as(mixed)
    return torch.autograd.grad((mixed * weights).sum(), inputs[:3])


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 12),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    width=st.sampled_from([2, 6, 8]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_every_form_gives_the_mean_and_gradients_of_the_definition(batch, length, heads, width, density, seed):
    inputs = draw(batch, length, heads, width, density, seed)
    expected = by_hand(*inputs)
    expected = (expected.detach(), *gradients(expected, inputs))
    for form in ("one_by_one", "reference"):
        torch.testing.assert_close(run(form, inputs), expected)


@pytest.mark.parametrize("form", ["one_by_one", "reference"])
def test_one_document_a_row_is_plain_causal_attention(form):
    q, k, v, _ = draw(3, 17, (4, 2), 8, 0.0, seed=1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    bounds = torch.arange(0, 4 * 17, 17, dtype=torch.int32)
    torch.testing.assert_close(run(form, (q, k, v, bounds))[0], expected)


@pytest.mark.parametrize("width", [8, 12])
def test_flash_attention_is_called_with_the_documents_laid_flat(monkeypatch, width):
    """The kernel runs on a GPU alone; what stands in for it here keeps its signature and its demands."""

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert q.dtype == torch.bfloat16
        assert q.shape[2] % 8 == 0
        assert window_size == (-1, 0)
        assert cu_q.dtype == torch.int32
        assert max_q == max_k >= (cu_q[1:] - cu_q[:-1]).max()
        mixed = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[begin:end].transpose(0, 1)[None] for x in (q, k, v)),
                is_causal=True,
                scale=scale,
                enable_gqa=enable_gqa,
            )[0].transpose(0, 1)
            for begin, end in zip(cu_q[:-1], cu_k[1:], strict=True)
        ]
        return torch.cat(mixed)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    *wide, bounds = draw(2, 30, (4, 2), width, 0.2, seed=2)
    half = tuple(x.detach().bfloat16().requires_grad_() for x in wide)
    expected = run("reference", (*wide, bounds))
    for ours, exact in zip(run("flash", (*half, bounds)), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).norm() < 0.02 * exact.norm()


def test_flash_attention_has_the_signature_and_shapes_that_it_is_called_with():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 4, 30, 12, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(2, 2, 30, 12, dtype=torch.bfloat16, requires_grad=True)
        mixed = kernels.FORMS["document_attention"]["flash"](q, k, k, torch.empty(7, dtype=torch.int32), 0.3)
        assert mixed.shape == q.shape
        dq, dk = torch.autograd.grad(mixed.sum(), [q, k])
        assert (dq.shape, dk.shape) == (q.shape, k.shape)


@pytest.mark.parametrize(
    ("op", "form"), [("attention", "sdpa"), ("attention", "reference"), ("document_attention", "reference")]
)
def test_heads_that_share_keys_are_given_copies_where_pytorch_would_compute_all_scores_at_once(op, form, monkeypatch):
    """On a GPU in fp32; that it is one is pretended."""
    bounds = [torch.tensor([0, 9, 17]).int()] if op == "document_attention" else []
    q, k, v, _ = draw(1, 17, (4, 2), 8, 0.0, seed=1)
    expected = kernels.FORMS[op][form](q, k, v, *bounds, 0.3)
    shared = []
    compute = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *heads, **options: shared.append(options["enable_gqa"]) or compute(*heads, **options),
    )
    monkeypatch.setattr(reference, "repeats_keys", lambda device, itemsize: True)
    torch.testing.assert_close(kernels.FORMS[op][form](q, k, v, *bounds, 0.3), expected)
    assert shared == [False]


@pytest.mark.parametrize(("capability", "half"), [((8, 0), "flash"), ((7, 5), "reference")])
def test_a_gpu_never_runs_the_loop_over_documents(monkeypatch, capability, half):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for compiled in (False, True):
        for bits16, expected in ((True, half), (False, "reference")):
            chosen = kernels.choose_kernels(device="cuda", half=bits16, compiled=compiled, overrides={})
            assert {c.op: c.implementation for c in chosen.choices}["document_attention"] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention runs on a GPU")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("width", [64, 12])
def test_flash_attention_on_a_gpu_gives_the_mean_and_gradients_of_the_definition(heads, width):
    *wide, bounds = draw(2, 300, heads, width, 0.02, seed=4)
    half = tuple(x.detach().cuda().bfloat16().requires_grad_() for x in wide)
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in half)
    expected = run("reference", (*exact, bounds))
    for ours, theirs in zip(run("flash", (*half, bounds.cuda())), expected, strict=True):
        assert (ours.cpu() - theirs).norm() < 0.02 * theirs.norm()
