"""A model that keeps documents apart against the same model on each document alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacl import kernels
from megacl.model.config import ModelConfig
from megacl.model.gpt import GPT, build_model

END = 3
NEOX = ModelConfig(vocab_size=31, hidden_size=24, num_layers=2, num_attention_heads=3, rotary_pct=0.5)
LLAMA = ModelConfig(
    form="llama",
    vocab_size=31,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
)
FORMS = pytest.mark.parametrize("config", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
ATTENTION = pytest.mark.parametrize("attention", ["one_by_one", "reference"])

ROWS = [
    [END, 7, 8, 9, END, 5, 6, END, 10, 11, 12, 13],  # begins with a document
    [14, 15, END, END, END, 16, 17, 18, 19, 20, 21, END],  # begins inside one, and ends with an end
    [22, 23, 24, 25, 26, 27, 28, 29, 30, 4, 5, 6],  # lies inside one
    [END] * 12,
]
PIECES = [
    [[END, 7, 8, 9], [END, 5, 6], [END, 10, 11, 12, 13]],
    [[14, 15], [END], [END], [END, 16, 17, 18, 19, 20, 21], [END]],
    [ROWS[2]],
    [[END]] * 12,
]


def models(config: ModelConfig, attention: str = "reference") -> tuple[GPT, GPT]:
    """One model twice, in fp64: the first keeps documents apart, the second knows nothing of them."""
    pair = []
    for end in (END, None):
        model = build_model(config, seed=2).double()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        model.document_end = end
        overrides = {"document_attention": attention}
        model.use(kernels.choose_kernels(device="cpu", half=False, compiled=False, overrides=overrides))
        pair.append(model)
    return pair[0], pair[1]


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@ATTENTION
@FORMS
def test_logits_are_those_of_each_document_alone(config, attention):
    apart, plain = models(config, attention)
    logits_BTV = apart(torch.tensor(ROWS))
    expected = torch.stack([torch.cat([plain(torch.tensor([piece]))[0] for piece in row]) for row in PIECES])
    torch.testing.assert_close(logits_BTV, expected)


@FORMS
def test_the_ops_of_a_cpu_keep_documents_apart_and_learn_the_same(config):
    """In fp32, where attention with rotary position may be one op, beside the parts in fp64."""
    ops = kernels.choose_kernels(device="cpu", half=False, compiled=False, overrides={})
    exact, _ = models(config, "one_by_one")
    ours = build_model(config, seed=2)
    ours.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
    ours.document_end = END
    ours.use(ops)
    tokens = torch.tensor(ROWS)
    for model in (exact, ours):
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    for name, gradient in gradients(ours).items():
        expected = gradients(exact)[name]
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@FORMS
def test_documents_are_apart_where_heads_are_normed(config):
    apart, plain = models(replace(config, qk_norm="layer_norm"), "one_by_one")
    logits_BTV = apart(torch.tensor(ROWS))
    expected = torch.stack([torch.cat([plain(torch.tensor([piece]))[0] for piece in row]) for row in PIECES])
    torch.testing.assert_close(logits_BTV, expected)


@ATTENTION
@FORMS
def test_loss_and_gradients_are_the_sums_over_the_documents_alone(config, attention):
    apart, plain = models(config, attention)
    targets_BT = torch.from_numpy(np.random.Generator(np.random.Philox(5)).integers(0, 31, (4, 12)))
    targets_BT[1, 3:6] = kernels.IGNORED
    nats, *_ = apart(torch.tensor(ROWS), targets_BT)
    nats.backward()
    alone = torch.zeros((), dtype=torch.float64)
    for row, targets_T in zip(PIECES, targets_BT, strict=True):
        for piece, targets in zip(row, targets_T.split([len(piece) for piece in row]), strict=True):
            alone = alone + plain(torch.tensor([piece]), targets[None])[0]
    alone.backward()
    torch.testing.assert_close(nats, alone)
    torch.testing.assert_close(gradients(apart), gradients(plain))


@FORMS
def test_layers_computed_again_in_backward_keep_documents_apart(config):
    apart, _ = models(config)
    kept = []
    for apart.checkpointing in ({}, {0: "full"}, {0: "full", 1: "selective"}):
        apart.zero_grad()
        apart(torch.tensor(ROWS), torch.tensor(ROWS))[0].backward()
        kept.append({name: gradient.clone() for name, gradient in gradients(apart).items()})
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=0)
    torch.testing.assert_close(kept[0], kept[2], rtol=0, atol=0)


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.lists(st.sampled_from([END, END, 5, 6, 7, 8]), min_size=2, max_size=24),
    place=st.integers(0, 23),
    attention=st.sampled_from(["one_by_one", "reference"]),
)
def test_a_token_changes_its_own_document_alone(tokens, place, attention):
    apart, _ = models(LLAMA, attention)
    place = place % len(tokens)
    if tokens[place] == END:
        tokens[place] = 9
    changed = [*tokens[:place], 10, *tokens[place + 1 :]]
    before, after = apart(torch.tensor([tokens, changed]))
    rest = tokens[place:]
    ends = place + rest.index(END) if END in rest else len(tokens)
    differs = (before - after).abs().amax(-1) > 1e-9
    assert differs.tolist() == [place <= t < ends for t in range(len(tokens))]


@FORMS
def test_without_an_end_in_a_batch_it_is_the_plain_model(config):
    apart, plain = models(config)
    tokens_BT = torch.tensor(ROWS[2:3])
    torch.testing.assert_close(apart(tokens_BT), plain(tokens_BT))


def test_a_model_in_16_bits_keeps_documents_apart():
    apart, _ = models(replace(LLAMA, num_kv_heads=None))
    exact = apart(torch.tensor(ROWS))
    for attention in ("one_by_one", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            logits = models(replace(LLAMA, num_kv_heads=None), attention)[0].float()(torch.tensor(ROWS))
        assert (logits - exact).norm() < 0.05 * exact.norm()
