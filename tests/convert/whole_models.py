"""Small random models as plain whole arrays, by meaning, from which the fixtures of public layouts are written.

    whole = random_model(heads=4, kv_heads=2)          # numpy, fp32; nothing of megacl is imported here
    whole.tensors["0.q.weight"]                        # [heads x head_dim, hidden]
    logits = transformers_logits(whole, tokens)        # the oracle: transformers' own model with the same numbers

Names: embed.weight, head.weight (where untied), final.weight and .bias, and of each layer i `{i}.{part}.weight` and
`.bias`, the parts being norm1, norm2, q, k, v, o, up, down, and gate (of a gated MLP), q_norm, k_norm (where normed).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Whole:
    """The shape of a model and its tensors. family "neox": LayerNorm and GELU; "llama": RMSNorm and SwiGLU."""

    family: str = "neox"
    vocab: int = 40
    hidden: int = 24
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 6
    ffn: int = 32
    parallel: bool = True
    rotary_pct: float = 1 / 3
    rope_theta: float = 10000.0
    gelu: str = "gelu"
    tied: bool = False
    attention_bias: str = "all"
    mlp_bias: bool = True
    qk_norm: bool = False
    eps: float = 1e-5
    tensors: dict[str, Array] = field(default_factory=dict)

    @property
    def gated(self) -> bool:
        return self.family == "llama"


def random_model(seed: int = 0, **shape: Any) -> Whole:
    """A model of that shape with random tensors, biases and norms included, so that nothing is lost unseen."""
    whole = Whole(**shape)
    draw = np.random.default_rng(seed)

    def matrix(*size: int) -> Array:
        return (draw.standard_normal(size) / np.sqrt(size[-1])).astype(np.float32)

    def vector(size: int, center: float = 0.0) -> Array:
        return (center + 0.3 * draw.standard_normal(size)).astype(np.float32)

    hidden, wide, narrow = whole.hidden, whole.heads * whole.head_dim, whole.kv_heads * whole.head_dim
    tensors = {"embed.weight": matrix(whole.vocab, hidden)}
    if not whole.tied:
        tensors["head.weight"] = matrix(whole.vocab, hidden)
    norms = ["final"]
    for layer in range(whole.layers):
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
        sizes = {"q": (wide, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, wide)}
        biased = {"all": "qkvo", "qkv": "qkv", "none": ""}[whole.attention_bias]
        sizes |= {"up": (whole.ffn, hidden), "down": (hidden, whole.ffn)}
        sizes |= {"gate": (whole.ffn, hidden)} if whole.gated else {}
        for part, size in sizes.items():
            tensors[f"{layer}.{part}.weight"] = matrix(*size)
            if part in biased or (len(part) > 1 and whole.mlp_bias):
                tensors[f"{layer}.{part}.bias"] = vector(size[0])
        if whole.qk_norm:
            tensors |= {f"{layer}.{part}_norm.weight": vector(whole.head_dim, 1.0) for part in "qk"}
    for norm in norms:
        tensors[f"{norm}.weight"] = vector(hidden, 1.0)
        if not whole.gated:
            tensors[f"{norm}.bias"] = vector(hidden)
    return replace(whole, tensors=tensors)


def random_llama(seed: int = 0, **shape: Any) -> Whole:
    """The same of the llama family: no biases unless they are asked for, rotary on the whole head."""
    defaults: dict[str, Any] = {
        "family": "llama",
        "parallel": False,
        "rotary_pct": 1.0,
        "attention_bias": "none",
        "mlp_bias": False,
        "gelu": "silu",
    }
    return random_model(seed, **defaults | shape)


def padded(whole: Whole, rows: int) -> Whole:
    """The model with a vocabulary of `rows` rows; those added are random too, as nobody trained them."""
    draw = np.random.default_rng(99)
    extra = (rows - whole.vocab, whole.hidden)
    tensors = dict(whole.tensors)
    for name in {"embed.weight", "head.weight"} & set(tensors):
        more = draw.standard_normal(extra).astype(np.float32) * np.float32(0.3)
        tensors[name] = np.concatenate([tensors[name], more])
    return replace(whole, vocab=rows, tensors=tensors)


def fused_heads(whole: Whole, layer: int, kind: str) -> Array:
    """q, k, v of a layer by head: [kv_heads, heads / kv_heads + 2, head_dim, ...]: each group's queries, key, value."""
    groups, each = whole.kv_heads, whole.heads // whole.kv_heads
    q, k, v = (whole.tensors[f"{layer}.{part}.{kind}"] for part in "qkv")
    rest = q.shape[1:]
    q = q.reshape(groups, each, whole.head_dim, *rest)
    k, v = (part.reshape(groups, 1, whole.head_dim, *rest) for part in (k, v))
    return np.concatenate([q, k, v], axis=1)


def transformers_state(whole: Whole) -> dict[str, Array]:
    """The tensors by the names of transformers' GPTNeoXForCausalLM, or LlamaForCausalLM and its like."""
    t = whole.tensors
    state: dict[str, Array] = {}
    if whole.family == "neox":
        state["gpt_neox.embed_in.weight"] = t["embed.weight"]
        state["embed_out.weight"] = t.get("head.weight", t["embed.weight"])
        for kind in ("weight", "bias"):
            state[f"gpt_neox.final_layer_norm.{kind}"] = t[f"final.{kind}"]
            for i in range(whole.layers):
                at = f"gpt_neox.layers.{i}"
                state[f"{at}.input_layernorm.{kind}"] = t[f"{i}.norm1.{kind}"]
                state[f"{at}.post_attention_layernorm.{kind}"] = t[f"{i}.norm2.{kind}"]
                heads = fused_heads(whole, i, kind)
                state[f"{at}.attention.query_key_value.{kind}"] = heads.reshape(-1, *heads.shape[3:])
                state[f"{at}.attention.dense.{kind}"] = t[f"{i}.o.{kind}"]
                state[f"{at}.mlp.dense_h_to_4h.{kind}"] = t[f"{i}.up.{kind}"]
                state[f"{at}.mlp.dense_4h_to_h.{kind}"] = t[f"{i}.down.{kind}"]
        return state
    state["model.embed_tokens.weight"] = t["embed.weight"]
    state["model.norm.weight"] = t["final.weight"]
    state["lm_head.weight"] = t.get("head.weight", t["embed.weight"])
    places = {
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        **{part: f"self_attn.{part}_proj" for part in "qkvo"},
        **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
        **{f"{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    }
    for name, value in t.items():
        layer, _, rest = name.partition(".")
        part, _, kind = rest.partition(".")
        if layer.isdigit():
            state[f"model.layers.{layer}.{places[part]}.{kind}"] = value
    return state


def transformers_model(whole: Whole) -> Any:
    """transformers' own model of this shape and these numbers, fp32, in evaluation mode."""
    import torch
    import transformers

    rope = {"rope_type": "default", "rope_theta": whole.rope_theta}
    common = {
        "vocab_size": whole.vocab,
        "hidden_size": whole.hidden,
        "num_hidden_layers": whole.layers,
        "num_attention_heads": whole.heads,
        "intermediate_size": whole.ffn,
        "max_position_embeddings": 64,
        "tie_word_embeddings": whole.tied,
        "attn_implementation": "eager",
    }
    if whole.family == "neox":
        config = transformers.GPTNeoXConfig(
            **common,
            rope_parameters={**rope, "partial_rotary_factor": whole.rotary_pct},
            use_parallel_residual=whole.parallel,
            layer_norm_eps=whole.eps,
            hidden_act={"gelu": "gelu", "tanh": "gelu_pytorch_tanh"}[whole.gelu],
            attention_bias=whole.attention_bias == "all",
        )
        model: Any = transformers.GPTNeoXForCausalLM(config)
    else:
        grouped = {
            "num_key_value_heads": whole.kv_heads,
            "head_dim": whole.head_dim,
            "rms_norm_eps": whole.eps,
            "rope_parameters": rope,
        }
        if whole.qk_norm:
            grouped["attention_bias"] = whole.attention_bias == "all"
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, **grouped))
        elif whole.attention_bias == "qkv":
            del grouped["head_dim"]
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common, **grouped))
        else:
            biases = {"attention_bias": whole.attention_bias == "all", "mlp_bias": whole.mlp_bias}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **grouped, **biases))
    state = {name: torch.from_numpy(value) for name, value in transformers_state(whole).items()}
    if whole.family == "neox" and "lm_head.weight" in model.state_dict():
        state["lm_head.weight"] = state.pop("embed_out.weight")
    missing = model.load_state_dict(state, strict=False)
    assert not missing.missing_keys, missing
    assert not missing.unexpected_keys, missing
    return model.float().eval()


def transformers_logits(whole: Whole, tokens: Array) -> Array:
    """Logits [batch, time, vocab] of transformers' model."""
    import torch

    with torch.no_grad():
        logits: Array = transformers_model(whole)(torch.from_numpy(tokens)).logits.numpy()
    return logits
