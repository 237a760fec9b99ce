"""A whole model on other implementations of its ops: the loss and all gradients stay the same."""

from dataclasses import replace

import pytest
import torch
from twins import DEVICE, TRITON, param

from megacl.kernels import FORMS, IGNORED, REFERENCE, choose_kernels
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model

NEOX = ModelConfig(vocab_size=40, hidden_size=24, num_layers=2, num_attention_heads=3, qk_norm="layer_norm")
LLAMA = ModelConfig(
    form="llama",
    vocab_size=40,
    hidden_size=24,
    num_layers=2,
    num_attention_heads=3,
    num_kv_heads=1,
    intermediate_size=20,
)
OTHERS = replace(NEOX, qk_norm="none", parallel_residual=False, gelu="tanh", attention_bias="none", head_dim=12)


def loss_and_gradients(config: ModelConfig, ops, *, autocast: bool = False) -> list[torch.Tensor]:
    model = build_model(config, seed=1, device=DEVICE)
    model.use(ops)
    model.loss_chunk, model.z_loss = 5, 1e-3
    generator = torch.Generator().manual_seed(2)
    tokens, targets = (torch.randint(0, 40, (2, 7), generator=generator).to(DEVICE) for _ in range(2))
    targets[0, 3] = IGNORED
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        sums = model(tokens, targets)
    sums[0].backward()
    return [sums.detach(), *(parameter.grad for parameter in model.parameters())]


def chosen(form: str):
    overrides = {op: form for op, forms in FORMS.items() if form in forms}
    return choose_kernels(device=DEVICE, half=False, compiled=False, overrides=overrides)


@pytest.mark.parametrize("form", [param(form=form) for form in ("lean", "torch", "c", "triton")])
@pytest.mark.parametrize("config", [NEOX, LLAMA, OTHERS], ids=["gpt_neox", "llama", "what others train"])
def test_it_learns_the_same_from_a_batch_in_fp32(config, form):
    found, expected = loss_and_gradients(config, chosen(form)), loss_and_gradients(config, REFERENCE)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@TRITON
@pytest.mark.parametrize("config", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
def test_it_learns_nearly_the_same_under_autocast_with_norms_in_sixteen_bits(config):
    found, expected = loss_and_gradients(config, chosen("triton"), autocast=True), loss_and_gradients(config, REFERENCE)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
