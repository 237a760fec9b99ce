"""Writes a whole model as litgpt does: lit_model.pth and model_config.yaml, by today's names or those up to 0.5.4.

Numpy alone arranges the arrays; megacl's converters are not imported. The layout is that of litgpt's
litgpt/scripts/convert_hf_checkpoint.py and litgpt/config.py. On 2026-11-28 litgpt's own model (26857050) loaded what
this writes, by today's names and the old ones, and computed transformers' logits within 3e-6: GPT-NeoX with either
residual, Llama with grouped keys, Qwen2 and Qwen3.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from whole_models import Array, Whole, fused_heads


def settings(whole: Whole, **changes: Any) -> dict[str, Any]:
    """model_config.yaml of such a model."""
    tree: dict[str, Any] = {
        "name": "some-model",
        "hf_config": {"name": "some-model", "org": "nobody"},
        "block_size": 64,
        "n_layer": whole.layers,
        "n_embd": whole.hidden,
        "n_head": whole.heads,
        "n_query_groups": whole.kv_heads,
        "head_size": whole.head_dim,
        "vocab_size": whole.vocab - 3,
        "padded_vocab_size": whole.vocab,
        "rotary_percentage": whole.rotary_pct,
        "rope_base": int(whole.rope_theta),
        "parallel_residual": whole.parallel,
        "shared_attention_norm": False,
        "bias": whole.attention_bias == "all",
        "attn_bias": whole.attention_bias == "qkv",
        "norm_class_name": "RMSNorm" if whole.gated else "LayerNorm",
        "mlp_class_name": "LLaMAMLP" if whole.gated else "GptNeoxMLP",
        "gelu_approximate": "tanh" if whole.gelu == "tanh" else "none",
        "norm_eps": whole.eps,
        "norm_qk": whole.qk_norm,
        "intermediate_size": whole.ffn,
    }
    return tree | changes


def state(whole: Whole, *, old: bool) -> dict[str, Array]:
    t = whole.tensors
    out = {"transformer.wte.weight": t["embed.weight"], "lm_head.weight": t.get("head.weight", t["embed.weight"])}
    places = {
        "norm1": "norm_1",
        "norm2": "norm_2",
        "o": "attn.proj",
        "q_norm": "attn.norm_q",
        "k_norm": "attn.norm_k",
        "gate": "mlp.fc_1",
        "up": "mlp.fc_2" if whole.gated else "mlp.fc",
        "down": "mlp.proj",
    }
    for name, value in t.items():
        layer, _, rest = name.partition(".")
        part, _, kind = rest.partition(".")
        if part in places:
            out[f"transformer.h.{layer}.{places[part]}.{kind}"] = value
        elif layer == "final":
            out[f"transformer.ln_f.{part}"] = value
        elif part == "q" and old:
            heads = fused_heads(whole, int(layer), kind)
            out[f"transformer.h.{layer}.attn.attn.{kind}"] = heads.reshape(-1, *heads.shape[3:])
        elif part == "q":
            out[f"transformer.h.{layer}.attn.qkv.{kind}"] = np.concatenate(
                [t[f"{layer}.{each}.{kind}"] for each in "qkv"]
            )
    return out


def write_litgpt(folder: Path, whole: Whole, *, old: bool = False, trained: bool = False, **changes: Any) -> Path:
    """litgpt's folder; trained: as training leaves it, the tensors under "model"."""
    folder.mkdir(parents=True)
    tensors: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state(whole, old=old).items()
    }
    torch.save({"model": tensors, "step_count": 3} if trained else tensors, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings(whole, **changes)))
    return folder
