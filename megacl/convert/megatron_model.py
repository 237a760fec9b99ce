"""What Megatron's arguments say of a model, and how the tensors of its tensor-parallel ranks make one.

Names here are those of the whole model without the trees around them: embedding.word_embeddings.weight,
layers.{i}.{name}, final_layernorm.weight, output_layer.weight. Layout as in Megatron-LM's megatron/core/transformer/,
megatron/legacy/model/ and megatron/training/checkpointing.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacl.convert.mapping import QKV_GROUPED, Rule
from megacl.convert.opened import OpenedModel, ReadOptions, typed
from megacl.convert.parts import Merge, Part, Whole, assemble, columns, refuse, replicated, rows, sections, settings_of
from megacl.errors import ConversionError
from megacl.model.config import LinearRope, Llama3Rope, ModelConfig

Ranks = list[dict[str, Part]]
"""For each tensor-parallel rank, its parts by name."""

_IGNORED = r"_extra_state|^word_embeddings_for_head\.|rotary_pos_emb\.inv_freq$"
_ALLOWED: dict[str, Sequence[Any]] = {
    "num_experts": [None, 0, 1],
    "num_moe_experts": [None, 0],
    "multi_latent_attention": [False],
    "attention_output_gate": [False],
    "experimental_attention_variant": [None],
    "softmax_type": ["vanilla"],
    "softmax_scale": [None],
    "qk_l2_norm": [False],
    "window_size": [None],
    "no_rope_freq": [None],
    "rotary_interleaved": [False],
    "mtp_num_layers": [None, 0],
    "apply_residual_connection_post_layernorm": [False],
    "squared_relu": [False],
    "quick_geglu": [False],
    "glu_activation": [None],
    "activation_func_clamp_value": [None],
    "glu_linear_offset": [0.0],
    "use_mup": [False],
    "enable_mhc_connections": [False],
    "is_hybrid_model": [False],
    "hybrid_override_pattern": [None],
    "hybrid_layer_pattern": [None],
    "heterogeneous_layers_config_path": [None],
    "fp8_param_gather": [False],
    "fp8_param": [False],
}
"""Arguments that change the model, with the values that megacl's has."""

_PLACES: dict[str, tuple[str, ...]] = {
    "layers.attention_norm": ("input_norm.", "input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    "layers.attention.qkv": (
        "self_attention.query_key_value.",
        "attention.query_key_value.",
        "self_attention.linear_qkv.",
    ),
    "layers.attention.q_norm": ("self_attention.q_layernorm.",),
    "layers.attention.k_norm": ("self_attention.k_layernorm.",),
    "layers.attention.out": ("self_attention.dense.", "attention.dense.", "self_attention.linear_proj."),
    "layers.mlp_norm": (
        "post_attention_norm.",
        "post_attention_layernorm.",
        "pre_mlp_layernorm.",
        "mlp.linear_fc1.layer_norm_",
    ),
    "layers.mlp.up": ("mlp.dense_h_to_4h.", "mlp.linear_fc1."),
    "layers.mlp.down": ("mlp.dense_4h_to_h.", "mlp.linear_fc2."),
}
"""megacl's modules -> what they were called in a layer over the years, up to weight or bias."""
_FINAL_NORMS = ("final_norm.", "final_layernorm.")


def build(
    path: Path,
    arguments: Mapping[str, Any],
    ranks: Ranks,
    options: ReadOptions,
    *,
    sources: Sequence[Path],
    format: str,
    version: float,
) -> OpenedModel:
    """The model of Megatron's arguments and of the parts of each rank.

    version: checkpoint_version, by which the order of query_key_value's rows is known. ConversionError where megacl's
    model cannot be that one.
    """
    refuse(path, arguments, _ALLOWED)
    with settings_of(path):
        model = typed(_model_config(path, arguments, ranks))
    where = _find_places(path, ranks[0])
    plus_one = arguments.get("apply_layernorm_1p") or arguments.get("layernorm_zero_centered_gamma")
    names = [name for name in ranks[0] if not (model.tie_embeddings and name == "output_layer.weight")]
    tensors = {}
    for name in names:
        if missing := [number for number, rank in enumerate(ranks) if name not in rank]:
            raise ConversionError(f"{path}: {name} is missing on tensor-parallel rank {missing[0]}, but not on rank 0.")
        parts = tuple(rank[name] for rank in ranks)
        if plus_one and _is_norm_weight(name):
            parts = tuple(map(_plus_one, parts))
        tensors[name] = Whole(parts, _merge(model, where, name, len(ranks), version))
    notes = ["norms' weights were stored less 1; they are in fp32 now"] if plus_one else []
    return assemble(
        format=format,
        path=path,
        model=model,
        table=_table(where),
        tensors=tensors,
        sources=sources,
        options=options,
        ignored=_IGNORED,
        notes=notes,
        seq_length=arguments.get("max_position_embeddings") or arguments.get("seq_length"),
    )


def _model_config(path: Path, arguments: Mapping[str, Any], ranks: Ranks) -> ModelConfig:
    position = arguments.get("position_embedding_type", "learned_absolute")
    if position != "rope" and not arguments.get("use_rotary_position_embeddings"):
        raise ConversionError(f"{path}: position_embedding_type is {position!r}; megacl's model has 'rope' alone.")
    gated, norm = bool(arguments.get("swiglu")), arguments.get("normalization", "LayerNorm")
    if (norm, gated) not in (("LayerNorm", False), ("RMSNorm", True)):
        raise ConversionError(
            f"{path}: normalization is {norm!r} and swiglu is {gated}; megacl's model has LayerNorm without it, and "
            "RMSNorm with it."
        )
    heads, hidden = arguments["num_attention_heads"], arguments["hidden_size"]
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else heads
    biased = arguments.get("add_bias_linear", True)
    embedding = ranks[0].get("embedding.word_embeddings.weight")
    if embedding is None:
        raise ConversionError(f"{path}: embedding.word_embeddings.weight is missing.")
    tanh = arguments.get("bias_gelu_fusion", True) or arguments.get("openai_gelu", False)
    normed = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}[norm] if arguments.get("qk_layernorm") else "none"
    return ModelConfig(
        form="llama" if gated else "gpt_neox",
        vocab_size=embedding.shape[0] * len(ranks),
        hidden_size=hidden,
        num_layers=arguments["num_layers"],
        num_attention_heads=heads,
        num_kv_heads=groups,
        head_dim=arguments.get("kv_channels"),
        intermediate_size=arguments.get("ffn_hidden_size"),
        rotary_pct=float(arguments.get("rotary_percent", 1.0)),
        rope_theta=float(arguments.get("rotary_base", 10000)),
        rope_scaling=_rope_scaling(path, arguments),
        norm_eps=float(arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5))),
        tie_embeddings=not arguments.get("untie_embeddings_and_output_weights", False),
        qk_norm=normed,  # type: ignore[arg-type]  # one of the three
        attention_bias="all" if biased else "qkv" if arguments.get("add_qkv_bias") else "none",
        mlp_bias=biased,
        parallel_residual=False,
        gelu="tanh" if tanh and not gated else "exact",
    )


def _rope_scaling(path: Path, arguments: Mapping[str, Any]) -> LinearRope | Llama3Rope | None:
    stretched, llama3 = arguments.get("rotary_seq_len_interpolation_factor"), arguments.get("use_rope_scaling")
    if stretched not in (None, 1) and llama3:
        raise ConversionError(
            f"{path}: rotary_seq_len_interpolation_factor and use_rope_scaling are both set; megacl's model has one."
        )
    if llama3:  # Megatron has these numbers in its code
        factor = float(arguments.get("rope_scaling_factor", 8.0))
        return Llama3Rope(
            kind="llama3",
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
    return None if stretched in (None, 1) else LinearRope(kind="linear", factor=float(stretched))


def _find_places(path: Path, names: Mapping[str, Part]) -> dict[str, str]:
    """megacl's modules -> what they are called here."""
    found = {}
    for module, places in _PLACES.items():
        for place in places:
            if f"layers.0.{place}weight" in names:
                found[module] = place
        if module not in found and not module.endswith(("q_norm", "k_norm")):
            raise ConversionError(f"{path}: its first layer has none of {', '.join(p + 'weight' for p in places)}.")
    final = [name for name in _FINAL_NORMS if f"{name}weight" in names]
    if not final:
        raise ConversionError(f"{path}: final_layernorm.weight is missing.")
    return found | {"final_norm": final[0]}


def _table(where: Mapping[str, str]) -> dict[str, Rule]:
    """megacl's modules -> Megatron's names."""
    table = {
        module: Rule((f"layers.{{i}}.{place}{{part}}",)) for module, place in where.items() if module != "final_norm"
    }
    table["layers.attention.qkv"] = Rule((f"layers.{{i}}.{where['layers.attention.qkv']}{{part}}",), QKV_GROUPED)
    table["layers.mlp.gate_up"] = table["layers.mlp.up"]  # the gate's rows come first, as in megacl
    table |= {
        "embed": Rule(("embedding.word_embeddings.{part}",)),
        "final_norm": Rule((f"{where['final_norm']}{{part}}",)),
        "head": Rule(("output_layer.{part}",)),
    }
    return table


def _merge(model: ModelConfig, where: Mapping[str, str], name: str, ranks: int, version: float) -> Merge:
    """How the ranks' parts of a tensor make the whole. Biases of row-parallel layers are the same on all."""
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return rows
    inner = name.split(".", 2)[2] if name.startswith("layers.") else name
    place, weight = inner.removesuffix("weight").removesuffix("bias"), inner.endswith("weight")
    if place == where["layers.attention.qkv"]:
        return rows if version >= 2 else _reordered(model.num_attention_heads // ranks, version)
    if place == where["layers.mlp.up"]:
        return sections(1, 1) if model.form == "llama" else rows
    if weight and place in (where["layers.attention.out"], where["layers.mlp.down"]):
        return columns
    return replicated


def _reordered(heads: int, version: float) -> Merge:
    """Old orders of a rank's rows, [3, heads, d] (version 0) and [heads, d, 3] (version 1), to [heads, 3, d]."""

    def head_by_head(part: Tensor) -> Tensor:
        inner = part.shape[1:]
        if version < 1:
            ordered = part.reshape(3, heads, -1, *inner).transpose(0, 1)
        else:
            ordered = part.reshape(heads, -1, 3, *inner).transpose(1, 2)
        return ordered.reshape(part.shape)

    return lambda parts: torch.cat([head_by_head(part) for part in parts])


def _is_norm_weight(name: str) -> bool:
    return name.endswith("weight") and "norm" in name


def _plus_one(part: Part) -> Part:
    read: Callable[[], Tensor] = part.read
    return replace(part, dtype=torch.float32, read=lambda: read().float() + 1)
