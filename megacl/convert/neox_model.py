"""What a gpt-neox YAML says of a model, and how the tensors of its tensor-parallel ranks make one.

Layers are numbered as the pipeline's: 0 the embedding, 2 the first block, L + 3 the last norm, L + 4 the output layer
where it is untied; names here are `{layer}.{name}`. Layout as in gpt-neox's megatron/model/{gpt2_model,transformer,
word_embeddings,norms,activations}.py and megatron/neox_arguments/, read at ea7aefd8.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacl.convert.mapping import GATE_UP_APART, QKV_PER_HEAD, SAME, UP_THEN_GATE, Rule
from megacl.convert.opened import OpenedModel, ReadOptions, typed
from megacl.convert.parts import (
    Merge,
    Part,
    Whole,
    assemble,
    columns,
    refuse,
    replicated,
    rows,
    sections,
    settings_of,
    summed,
)
from megacl.errors import ConversionError
from megacl.model.config import ModelConfig

FIRST_LAYER = 2
Ranks = Sequence[Mapping[str, Part]]
"""For each tensor-parallel rank, its parts by name."""

_IGNORED = r"attention\.rotary_emb\.inv_freq$|_extra_state$"
_ALLOWED: dict[str, Sequence[Any]] = {
    "gpt_j_tied": [False],
    "use_qk_layernorm": [False],
    "output_layer_parallelism": ["column"],
    "model_arch": ["gpt2"],
    "moe_num_experts": [0, 1],
    "num_experts": [0, 1],
    "num_unique_layers": [None],
    "soft_prompt_tuning": [None],
    "use_mup": [False],
    "te_columnparallel": [False],
    "te_rowparallel": [False],
    "te_layernorm_mlp": [False],
    "te_mha": [False],
    "train_impl": ["normal"],
}
"""Settings that change the model, with the values that megacl's has."""
_NORMS = {
    "layernorm": ("layernorm_epsilon", 1e-5),
    "te_layernorm": ("layernorm_epsilon", 1e-5),
    "rmsnorm": ("rms_norm_epsilon", 1e-8),
    "te_rmsnorm": ("rms_norm_epsilon", 1e-8),
}
"""A kind of norm -> the name of its epsilon, and gpt-neox's default."""
_MLP_NAMES = {
    "mlp.dense_4h_to_h": ("mlp.dense_h_to_4h",),
    "mlp.linear2": ("mlp.linear1",),
    "mlp.w2": ("mlp.w1", "mlp.w3"),
}
"""How the MLP's output layer is called -> its input layer, or gate and up. Names changed in September 2024."""


def build(
    path: Path, settings: Mapping[str, Any], ranks: Ranks, options: ReadOptions, *, sources: Sequence[Path], format: str
) -> OpenedModel:
    """The model of a YAML and of the parts of each rank; ConversionError where megacl's cannot be that model."""
    _same_names(path, ranks)
    first = {name.partition(".")[2] for name in ranks[0] if name.startswith(f"{FIRST_LAYER}.")}
    down = next((name for name in _MLP_NAMES if f"{name}.weight" in first), None)
    if down is None:
        raise ConversionError(f"{path}: the first block has none of {', '.join(_MLP_NAMES)}: no MLP that megacl has.")
    with settings_of(path):
        model = typed(_model_config(path, settings, ranks, first, down))
    tensors = {name: Whole(tuple(rank[name] for rank in ranks), _merge(model, name)) for name in ranks[0]}
    return assemble(
        format=format,
        path=path,
        model=model,
        table=_table(model, first, down),
        tensors=tensors,
        sources=sources,
        options=options,
        first_layer=FIRST_LAYER,
        ignored=_IGNORED,
        seq_length=settings.get("max_position_embeddings") or settings.get("seq_length"),
    )


def _same_names(path: Path, ranks: Ranks) -> None:
    for number, rank in enumerate(ranks):
        if missing := sorted({*ranks[0]} ^ {*rank}):
            raise ConversionError(
                f"{path}: tensor-parallel ranks 0 and {number} do not hold the same tensors: {missing[0]} is in one."
            )


def _model_config(path: Path, settings: Mapping[str, Any], ranks: Ranks, first: set[str], down: str) -> ModelConfig:
    """F, biases and the vocabulary come from the tensors: a YAML's intermediate_size is not the MLP's width."""
    refuse(path, settings, _ALLOWED)
    _refuse_kinds(path, settings)
    form, eps = _form(path, settings)
    query_heads = settings["num_attention_heads"]
    parallel = len(ranks)
    biased = "attention.query_key_value.bias" in first
    rotated = float(settings.get("rotary_pct", 1.0))
    if int(settings["hidden_size"] // query_heads * rotated) % 2:
        raise ConversionError(
            f"{path}: rotary_pct is {rotated}, an odd number of a head's dimensions; it must be even."
        )
    return ModelConfig(
        form=form,
        vocab_size=ranks[0]["0.word_embeddings.weight"].shape[0] * parallel,
        hidden_size=settings["hidden_size"],
        num_layers=settings["num_layers"],
        num_attention_heads=query_heads,
        num_kv_heads=settings.get("num_kv_heads"),
        intermediate_size=ranks[0][f"{FIRST_LAYER}.{down}.weight"].shape[1] * parallel,
        rotary_pct=rotated,
        rope_theta=float(settings.get("rotary_emb_base", 10000)),
        norm_eps=eps,
        tie_embeddings=not settings.get("no_weight_tying", False),
        attention_bias="all" if biased else "none",
        mlp_bias=f"{down}.bias" in first,
        parallel_residual=bool(settings.get("gpt_j_residual", False)),
        gelu="tanh" if settings.get("bias_gelu_fusion") and form == "gpt_neox" else "exact",
    )


def _refuse_kinds(path: Path, settings: Mapping[str, Any]) -> None:
    position = settings.get("pos_emb", "learned")
    if position != "rotary":
        raise ConversionError(f"{path}: pos_emb is {position!r}; megacl's model has rotary positions alone.")
    if kinds := set(_words(settings.get("attention_config"))) - {"global", "flash"}:
        raise ConversionError(
            f"{path}: attention_config has {', '.join(sorted(kinds))}; megacl's model has global attention alone."
        )
    window, length = settings.get("sliding_window_width"), settings.get("max_position_embeddings")
    if window is not None and (length is None or window + 1 < length):  # it does not count the token itself
        raise ConversionError(
            f"{path}: sliding_window_width is {window}; megacl attends to all that went before, which is the same up "
            f"to {window + 1} tokens only. Set max_position_embeddings, now {length}, to that in a copy of the YAML "
            "(--config) to convert the model for those."
        )


def _words(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    return [word for each in tree for word in _words(each)] if isinstance(tree, list) else []


def _form(path: Path, settings: Mapping[str, Any]) -> tuple[Any, float]:
    """The family of the block, and its norms' epsilon."""
    norm, activation = settings.get("norm", "layernorm"), settings.get("activation", "gelu")
    if norm not in _NORMS:
        raise ConversionError(f"{path}: norm is {norm!r}; megacl's model has {' and '.join(('layernorm', 'rmsnorm'))}.")
    gated = activation == "swiglu" or (settings.get("mlp_type") == "llama" and activation in ("silu", "swish"))
    if not gated and activation != "gelu":
        raise ConversionError(f"{path}: activation is {activation!r}; megacl's model has gelu and swiglu.")
    form = "llama" if gated else "gpt_neox"
    if norm.endswith("rmsnorm") != gated:
        raise ConversionError(
            f"{path}: norm is {norm!r} and activation is {activation!r}; megacl's model has layernorm with gelu, and "
            "rmsnorm with swiglu."
        )
    key, default = _NORMS[norm]
    return form, float(settings.get(key, default))


def _grouped(model: ModelConfig) -> bool:
    return model.kv_heads != model.num_attention_heads


def _table(model: ModelConfig, first: set[str], down: str) -> dict[str, Rule]:
    """megacl's modules -> gpt-neox's names."""
    last = model.num_layers + FIRST_LAYER + 1
    norm = "scale" if "input_layernorm.scale" in first else "{part}"
    up = tuple(f"{{i}}.{name}.{{part}}" for name in _MLP_NAMES[down])
    return {
        "embed": Rule(("0.word_embeddings.{part}",)),
        "layers.attention_norm": Rule((f"{{i}}.input_layernorm.{norm}",)),
        "layers.attention.qkv": Rule(
            ("{i}.attention.query_key_value.{part}",), SAME if _grouped(model) else QKV_PER_HEAD
        ),
        "layers.attention.out": Rule(("{i}.attention.dense.{part}",)),
        "layers.mlp_norm": Rule((f"{{i}}.post_attention_layernorm.{norm}",)),
        "layers.mlp.up": Rule(up),
        "layers.mlp.gate_up": Rule(up, GATE_UP_APART if len(up) == 2 else UP_THEN_GATE),
        "layers.mlp.down": Rule((f"{{i}}.{down}.{{part}}",)),
        "final_norm": Rule((f"{last}.norm.{norm}",)),
        "head": Rule((f"{last + 1}.final_linear.{{part}}",)),
    }


def _merge(model: ModelConfig, name: str) -> Merge:
    """How the ranks' parts of a tensor make the whole."""
    module, _, kind = name.partition(".")[2].rpartition(".")
    if module == "attention.query_key_value" and _grouped(model):
        share = model.num_attention_heads // model.kv_heads
        return sections(share, 1, 1)  # each rank has its queries, then its keys, then its values
    if module == "mlp.linear1" and model.form == "llama":
        return sections(1, 1)
    if module in ("attention.dense", *_MLP_NAMES):
        if kind == "weight":
            return columns
        # Side by side on one residual, each rank adds its bias before the sum over ranks; else all add the same one.
        return summed if model.parallel else replicated
    split = (
        "word_embeddings",
        "final_linear",
        "attention.query_key_value",
        *(n for up in _MLP_NAMES.values() for n in up),
    )
    return rows if module in split else replicated
