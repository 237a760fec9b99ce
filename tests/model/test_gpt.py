"""The decoder against its definition, written out in plain PyTorch with an explicit softmax."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megacl import kernels
from megacl.model.config import Llama3Rope, ModelConfig
from megacl.model.gpt import GPT, build_model, count_parameters, flops_per_token
from megacl.model.layers import rotary_tables

NEOX = ModelConfig(vocab_size=101, hidden_size=48, num_layers=3, num_attention_heads=4, rotary_pct=0.5)
LLAMA = ModelConfig(
    form="llama",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=70,
    num_layers=3,
    num_attention_heads=4,
    num_kv_heads=2,
    rope_theta=500.0,
)
LLAMA3 = {"kind": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FORMS = pytest.mark.parametrize("config", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
TOKENS_BT = torch.from_numpy(np.random.Generator(np.random.Philox(5)).integers(0, 101, (3, 20)))


def lively(config: ModelConfig) -> GPT:
    """A model in fp64 whose norms and biases are not the ones and zeros of the start."""
    model = build_model(config, seed=2).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def turned(vector: torch.Tensor, position: int, pairs: int, theta: float) -> torch.Tensor:
    """One head's vector, with element e of its first half and of its second as a point that is turned in the plane."""
    out = vector.clone()
    for e in range(pairs):
        angle = position * theta ** (-2 * e / (2 * pairs))
        a, b = vector[e], vector[e + pairs]
        out[e] = a * math.cos(angle) - b * math.sin(angle)
        out[e + pairs] = a * math.sin(angle) + b * math.cos(angle)
    return out


def head_norm_by_hand(w: dict[str, torch.Tensor], name: str, x_E: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    if config.qk_norm == "none":
        return x_E
    if config.qk_norm == "layer_norm":
        x_E = x_E - x_E.mean()
    scaled = x_E / torch.sqrt((x_E**2).mean() + config.norm_eps)
    return scaled * w[f"attention.{name}.weight"] + w.get(f"attention.{name}.bias", 0)


def attention_by_hand(w: dict[str, torch.Tensor], x_TD: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    length, width = x_TD.shape[0], config.head_size
    heads, kv_heads = config.num_attention_heads, config.kv_heads
    projected = x_TD @ w["attention.qkv.weight"].T + w.get("attention.qkv.bias", 0)
    queries, keys, values = projected.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    mixed = []
    for head in range(heads):
        shared = head * kv_heads // heads
        q = [
            turned(head_norm_by_hand(w, "q_norm", row, config), t, config.rotary_dims // 2, config.rope_theta)
            for t, row in enumerate(queries[:, head * width : (head + 1) * width])
        ]
        k = [
            turned(head_norm_by_hand(w, "k_norm", row, config), t, config.rotary_dims // 2, config.rope_theta)
            for t, row in enumerate(keys[:, shared * width : (shared + 1) * width])
        ]
        v = values[:, shared * width : (shared + 1) * width]
        rows = []
        for t in range(length):
            scores = torch.stack([q[t] @ k[s] for s in range(t + 1)]) / math.sqrt(width)
            weights = torch.exp(scores - scores.max())
            rows.append((weights / weights.sum()) @ v[: t + 1])
        mixed.append(torch.stack(rows))
    return torch.cat(mixed, dim=1) @ w["attention.out.weight"].T + w.get("attention.out.bias", 0)


def norm_by_hand(w: dict[str, torch.Tensor], name: str, x_TD: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    if config.form == "gpt_neox":
        x_TD = x_TD - x_TD.mean(1, keepdim=True)
    scaled = x_TD / torch.sqrt((x_TD**2).mean(1, keepdim=True) + config.norm_eps)
    return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


def mlp_by_hand(w: dict[str, torch.Tensor], x_TD: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    if config.form == "gpt_neox":
        up = x_TD @ w["mlp.up.weight"].T + w["mlp.up.bias"]
        return (up * (1 + torch.erf(up / math.sqrt(2))) / 2) @ w["mlp.down.weight"].T + w["mlp.down.bias"]
    gate, up = x_TD @ w["mlp.gate_up.weight"][: config.mlp_size].T, x_TD @ w["mlp.gate_up.weight"][config.mlp_size :].T
    return (gate / (1 + torch.exp(-gate)) * up) @ w["mlp.down.weight"].T


def logits_by_hand(model: GPT, tokens_T: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    everything = {name: parameter.detach() for name, parameter in model.named_parameters()}
    x_TD = everything["embed.weight"][tokens_T]
    for layer in range(config.num_layers):
        start = f"layers.{layer}."
        w = {name.removeprefix(start): value for name, value in everything.items() if name.startswith(start)}
        attended = attention_by_hand(w, norm_by_hand(w, "attention_norm", x_TD, config), config)
        if config.form == "gpt_neox":
            x_TD = x_TD + attended + mlp_by_hand(w, norm_by_hand(w, "mlp_norm", x_TD, config), config)
        else:
            x_TD = x_TD + attended
            x_TD = x_TD + mlp_by_hand(w, norm_by_hand(w, "mlp_norm", x_TD, config), config)
    head = everything["embed.weight" if config.tie_embeddings else "head.weight"]
    return norm_by_hand(everything, "final_norm", x_TD, config) @ head.T


@pytest.mark.parametrize("qk_norm", ["none", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@FORMS
def test_logits_are_those_of_the_definition(config, tied, qk_norm):
    config = replace(config, tie_embeddings=tied, qk_norm=qk_norm)
    model = lively(config)
    logits_BTV = model(TOKENS_BT)
    for logits_TV, tokens_T in zip(logits_BTV, TOKENS_BT, strict=True):
        # The model's rotary tables are in fp32.
        torch.testing.assert_close(logits_TV, logits_by_hand(model, tokens_T, config), rtol=1e-5, atol=1e-5)


@FORMS
def test_the_loss_is_the_sum_over_counted_targets(config):
    model = lively(config)
    targets_BT = TOKENS_BT.roll(-1, dims=1)
    targets_BT[0, 3:7] = kernels.IGNORED
    log_p_BTV = model(TOKENS_BT).log_softmax(-1)
    expected = -sum(
        log_p_BTV[b, t, targets_BT[b, t]] for b in range(3) for t in range(20) if targets_BT[b, t] != kernels.IGNORED
    )
    model.loss_chunk = 7
    torch.testing.assert_close(model(TOKENS_BT, targets_BT)[1], expected)


@FORMS
def test_a_token_changes_nothing_before_it(config):
    model = lively(config)
    changed_BT = TOKENS_BT.clone()
    changed_BT[:, 11] = (changed_BT[:, 11] + 1) % 101
    before, after = model(TOKENS_BT), model(changed_BT)
    torch.testing.assert_close(after[:, :11], before[:, :11], rtol=0, atol=0)
    assert ((after[:, 11:] - before[:, 11:]).abs().amax(-1) > 1e-6).all()


@FORMS
def test_sequences_of_a_batch_do_not_see_one_another(config):
    model = lively(config)
    torch.testing.assert_close(model(TOKENS_BT)[1:2], model(TOKENS_BT[1:2]))


@FORMS
def test_logits_of_the_last_position_alone_are_the_last_of_all(config):
    model = lively(config)
    torch.testing.assert_close(model(TOKENS_BT, last_only=True), model(TOKENS_BT)[:, -1:])


@pytest.mark.parametrize("config", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
@pytest.mark.parametrize("qk_norm", ["layer_norm", "rms_norm"])
def test_attention_with_normed_heads_has_the_gradients_of_finite_differences(config, qk_norm):
    config = replace(config, hidden_size=16, num_layers=1, rotary_pct=1.0, qk_norm=qk_norm)
    attention = lively(config).layers[0].attention
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(8)).requires_grad_()
    tables = [table.double() for table in rotary_tables(config, 5, torch.device("cpu"))]
    norms = [p for name, p in attention.named_parameters() if "norm" in name]
    assert len(norms) == (4 if qk_norm == "layer_norm" else 2)
    assert torch.autograd.gradcheck(lambda x, *_: attention(x, *tables, None), (x_BTD, *norms))


@FORMS
def test_attention_of_normed_heads_stays_bounded_however_large_the_weights(config):
    model = lively(replace(config, qk_norm="rms_norm"))
    largest = []

    def watching(q_BHTE, k_BKTE, v_BKTE, scale):
        largest.append((q_BHTE.norm(dim=-1).max() * k_BKTE.norm(dim=-1).max() * scale).item())
        return kernels.REFERENCE.attention(q_BHTE, k_BKTE, v_BKTE, scale)

    model.use(replace(kernels.REFERENCE, attention=watching))
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.qkv.weight *= 1e3
    model(TOKENS_BT)
    for bound, layer in zip(largest, model.layers, strict=True):
        gain = layer.attention.q_norm.weight.abs().max() * layer.attention.k_norm.weight.abs().max()
        # A head normed to a root mean square of 1 has a length of sqrt(head_size), which turning leaves.
        assert bound <= gain.item() * math.sqrt(config.head_size) * (1 + 1e-6)


def test_grouped_heads_equal_full_attention_with_repeated_heads():
    grouped = lively(LLAMA)
    full = build_model(replace(LLAMA, num_kv_heads=4), seed=0).double()
    state = grouped.state_dict()
    for layer in range(LLAMA.num_layers):
        name = f"layers.{layer}.attention.qkv.weight"
        queries, keys, values = state[name].split([48, 24, 24])
        repeated = [part.view(2, 12, 48).repeat_interleave(2, dim=0).flatten(0, 1) for part in (keys, values)]
        state[name] = torch.cat([queries, *repeated])
    full.load_state_dict(state)
    torch.testing.assert_close(full(TOKENS_BT), grouped(TOKENS_BT))


@FORMS
def test_layers_computed_again_in_backward_give_the_same_gradients(config):
    model = lively(config)
    gradients = []
    every = range(config.num_layers)
    for model.checkpointing in ({}, dict.fromkeys(every, "full"), dict.fromkeys(every, "selective"), {1: "full"}):
        model.zero_grad()
        model(TOKENS_BT, TOKENS_BT)[0].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        for others in gradients[1:]:
            torch.testing.assert_close(others[name], gradient, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ initial weights


@FORMS
def test_initial_weights_have_the_published_spread(config):
    config = replace(config, vocab_size=400, hidden_size=256, intermediate_size=400, num_layers=4)
    for name, parameter in build_model(config, seed=7).named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            output = name.endswith(("attention.out.weight", "mlp.down.weight"))
            expected = 2 / (4 * math.sqrt(256)) if output else math.sqrt(2 / (5 * 256))
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < 4 * expected / math.sqrt(parameter.numel()), name


@FORMS
def test_initial_weights_depend_on_seed_and_name_alone(config):
    torch.manual_seed(123)
    model = dict(build_model(config, seed=7).named_parameters())
    torch.manual_seed(456)
    torch.rand(10)
    deeper = dict(build_model(replace(config, num_layers=5), seed=7).named_parameters())
    other = dict(build_model(config, seed=8).named_parameters())
    for name, parameter in model.items():
        if not name.endswith(("attention.out.weight", "mlp.down.weight")):  # whose spread depends on the depth
            torch.testing.assert_close(deeper[name], parameter, rtol=0, atol=0)
        if parameter.ndim == 2:
            assert not torch.equal(other[name], parameter)
    same_shape = [model["layers.0.attention.out.weight"], model["layers.1.attention.out.weight"]]
    assert not torch.equal(*same_shape)


def test_building_a_model_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    build_model(NEOX, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_embeddings_are_one_parameter():
    model = build_model(replace(LLAMA, tie_embeddings=True), seed=0)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


# ------------------------------------------------------------------------------------------------ size and cost


@FORMS
def test_parameters_are_counted_without_their_memory(config):
    assert count_parameters(config) == sum(parameter.numel() for parameter in build_model(config, seed=0).parameters())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_flops_count_each_weight_of_a_product_six_times_and_attention_in_full(tied):
    config = replace(LLAMA, tie_embeddings=tied)
    per_layer = 48 * (48 + 24 + 24) + 48 * 48 + 48 * 140 + 70 * 48
    assert flops_per_token(config, 64) == 6 * (3 * per_layer + 101 * 48) + 12 * 3 * 48 * 64


def test_flops_of_attention_follow_the_width_of_its_heads():
    wide = replace(LLAMA, head_dim=20, attention_bias="all")
    more = 6 * 3 * 48 * (2 * 4 + 2 * 2) * 8 + 12 * 3 * 4 * 8 * 64  # 8 wider heads: in qkv and out, and in attention
    assert flops_per_token(wide, 64) == flops_per_token(LLAMA, 64) + more


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"num_attention_heads": 5, "num_kv_heads": 5},
            "num_attention_heads is 5; it must divide hidden_size, 48, where head_dim is not given",
        ),
        ({"gelu": "tanh"}, "gelu is tanh; it must be left out, since the llama form has SwiGLU"),
        (
            {"rope_scaling": Llama3Rope(**LLAMA3, low_freq_factor=4.0)},
            "rope_scaling.low_freq_factor is 4; it must be less than high_freq_factor, 4",
        ),
        ({"num_attention_heads": 5, "num_kv_heads": 5, "head_dim": 6}, None),
        ({"rope_scaling": Llama3Rope(**LLAMA3, low_freq_factor=1.0)}, None),
        ({"attention_bias": "qkv", "mlp_bias": True, "parallel_residual": True}, None),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_said(changes, problem):
    assert replace(LLAMA, **changes).problem() == problem
