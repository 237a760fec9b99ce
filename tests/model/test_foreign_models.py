"""Models of others, with random weights, beside transformers: logits and gradients are the same in every shape."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megacl.model.config import LinearRope, Llama3Rope, ModelConfig
from megacl.model.gpt import build_model
from megacl.model.layers import rotary_frequencies

transformers = pytest.importorskip("transformers")

TOKENS_BT = torch.randint(0, 67, (2, 33), generator=torch.Generator().manual_seed(3))
LLAMA3 = Llama3Rope(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24
)
NEOX = ModelConfig(
    vocab_size=67, hidden_size=40, num_layers=2, num_attention_heads=5, intermediate_size=52, rotary_pct=0.5
)
LLAMA = ModelConfig(
    form="llama",
    vocab_size=67,
    hidden_size=48,
    num_layers=2,
    num_attention_heads=6,
    num_kv_heads=2,
    head_dim=10,
    intermediate_size=52,
    norm_eps=1e-6,
    rope_theta=500.0,
)
MODELS = {
    "gpt_neox": NEOX,
    "gpt_neox, one after the other": dataclasses.replace(NEOX, parallel_residual=False),
    "gpt_neox, tanh, without biases of attention": dataclasses.replace(NEOX, gelu="tanh", attention_bias="none"),
    "gpt_neox, stretched": dataclasses.replace(NEOX, rope_scaling=LinearRope(kind="linear", factor=3.0)),
    "llama": LLAMA,
    "llama, biases, tied": dataclasses.replace(LLAMA, attention_bias="all", mlp_bias=True, tie_embeddings=True),
    "llama, stretched": dataclasses.replace(LLAMA, rope_scaling=LLAMA3, rotary_pct=1.0),
    "mistral": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, num_attention_heads=4, head_dim=None, attention_bias="qkv"),
    "qwen3": dataclasses.replace(LLAMA, qk_norm="rms_norm"),
}


def foreign_model(name: str, config: ModelConfig) -> Any:
    """transformers' model of that name and shape, in fp64, its weights and biases drawn."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= dataclasses.asdict(scaling)
        rope["rope_type"] = rope.pop("kind")
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": 64,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
    }
    if config.form == "gpt_neox":
        settings = transformers.GPTNeoXConfig(
            **common,
            hidden_act={"exact": "gelu", "tanh": "gelu_pytorch_tanh"}[config.gelu],
            layer_norm_eps=config.norm_eps,
            use_parallel_residual=config.parallel,
            attention_bias=config.attention_bias != "none",
            rope_parameters={**rope, "partial_rotary_factor": config.rotary_pct},
        )
    else:
        kind = name.split(",")[0].capitalize()
        common |= {
            "num_key_value_heads": config.kv_heads,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": rope,
            "sliding_window": None,
        }
        if kind != "Qwen2":
            common["head_dim"] = config.head_size
        if kind == "Llama":
            common |= {"attention_bias": config.attention_bias == "all", "mlp_bias": config.mlp_biased}
        settings = getattr(transformers, f"{kind}Config")(**common)
    settings._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(settings).double()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def by_our_names(config: ModelConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of a model of transformers under megacl's names, put together by hand."""
    out: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if config.form == "gpt_neox":
            ours = name.removeprefix("gpt_neox.")
            for old, new in {
                "embed_in": "embed",
                "embed_out": "head",
                "lm_head": "head",
                "final_layer_norm": "final_norm",
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "mlp_norm",
                "query_key_value": "qkv",
                "attention.dense": "attention.out",
                "dense_h_to_4h": "up",
                "dense_4h_to_h": "down",
            }.items():
                ours = ours.replace(old, new)
            if ".qkv." in ours:  # theirs: the query, key and value of the first head, of the second, ...
                by_head = value.view(config.num_attention_heads, 3, config.head_size, *value.shape[1:])
                value = torch.cat([by_head[head, part] for part in range(3) for head in range(len(by_head))])
            out[ours] = value
        else:
            ours = name.removeprefix("model.")
            for old, new in {
                "embed_tokens": "embed",
                "lm_head": "head",
                "self_attn": "attention",
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "mlp_norm",
                "o_proj": "out",
                "down_proj": "down",
            }.items():
                ours = ours.replace(old, new)
            if ours == "norm.weight":
                ours = "final_norm.weight"
            out[ours] = value
    for layer in range(config.num_layers if config.form == "llama" else 0):
        start = f"layers.{layer}."
        for kind in ("weight", "bias"):
            for whole, parts in (("attention.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
                room = whole.split(".")[0]
                found = [out.pop(f"{start}{room}.{part}_proj.{kind}", None) for part in parts]
                if all(part is not None for part in found):
                    out[f"{start}{whole}.{kind}"] = torch.cat(found)  # type: ignore[arg-type]
    if config.tie_embeddings:
        out.pop("head.weight", None)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name):
    config = MODELS[name]
    assert config.problem() is None
    theirs, ours = foreign_model(name, config), build_model(config, seed=0).double()
    ours.load_state_dict(by_our_names(config, dict(theirs.named_parameters())), strict=False)
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in by_our_names(config, dict(theirs.named_parameters())).items()
    }
    targets_BT = TOKENS_BT.roll(-1, dims=1)
    expected_BTV = theirs(TOKENS_BT).logits
    # Both compute rotary frequencies in fp32, in another order: at place 33 the angles differ by up to 1e-5.
    torch.testing.assert_close(ours(TOKENS_BT), expected_BTV, rtol=1e-5, atol=5e-5)
    torch.nn.functional.cross_entropy(expected_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum").backward()
    ours(TOKENS_BT, targets_BT)[0].backward()
    expected = by_our_names(config, {n: p.grad for n, p in theirs.named_parameters()})
    for n, parameter in ours.named_parameters():
        assert parameter.grad is not None
        largest = expected[n].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[n], rtol=1e-4, atol=5e-5 * largest, msg=n)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearRope(kind="linear", factor=2.5),
        LLAMA3,
        dataclasses.replace(LLAMA3, original_max_position_embeddings=8192, low_freq_factor=1.5),
    ],
    ids=["as they are", "linear", "llama3 of a short model", "llama3"],
)
def test_rotary_frequencies_are_those_of_transformers(scaling):
    config = dataclasses.replace(LLAMA, head_dim=64, rope_theta=10000.0, rope_scaling=scaling)
    theirs = foreign_model("llama", config).model.rotary_emb.inv_freq
    torch.testing.assert_close(rotary_frequencies(config, torch.device("cpu")).double(), theirs.double())
