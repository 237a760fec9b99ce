"""litgpt checkpoints: lit_model.pth with model_config.yaml beside it.

The file is a flat dict of tensors, under "model" where training wrote it. qkv was renamed and laid out anew in 0.5.5:
attn.qkv is a block of queries, keys and values, attn.attn before was grouped. vocab_size in the YAML is no count of
tokens: Pythia's says 50254, of a tokenizer with 50277. Layout as in litgpt's
litgpt/{config,model}.py and litgpt/scripts/convert_hf_checkpoint.py, read at 26857050.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megacl.convert.mapping import GATE_UP_APART, QKV_GROUPED, SAME, Rule
from megacl.convert.opened import OpenedModel, ReadOptions, typed
from megacl.convert.parts import Part, assemble, refuse, settings_of
from megacl.convert.pickled import PickledFiles, tensors_of
from megacl.errors import ConversionError
from megacl.model.config import LinearRope, Llama3Rope, ModelConfig

FORMAT = "litgpt"
WORDS = "lit_model.pth with model_config.yaml"
WEIGHTS, CONFIG = "lit_model.pth", "model_config.yaml"

_ALLOWED: dict[str, Sequence[Any]] = {
    "norm_qk_type": ["default"],
    "post_attention_norm": [False],
    "post_mlp_norm": [False],
    "shared_attention_norm": [False],
    "attention_scores_scalar": [None],
    "attention_logit_softcapping": [None],
    "final_logit_softcapping": [None],
    "rope_interleave": [False],
    "rope_local_base_freq": [None],
    "n_expert": [0, None],
    "scale_embeddings": [False],
    "lm_head_bias": [False],
    "norm_1": [True],
    "norm_2": [True],
    "latent_attention": [None],
}
"""Settings that change the model, with the values that megacl's has."""
_FORMS = {("LayerNorm", "GptNeoxMLP"): "gpt_neox", ("RMSNorm", "LLaMAMLP"): "llama"}


def recognises(path: Path) -> bool:
    """Whether it is litgpt's folder, or the file in it."""
    file = _weights(path)
    return file.is_file() and (file.name == WEIGHTS or (file.parent / CONFIG).is_file())


def _weights(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def open_litgpt(path: Path, options: ReadOptions) -> OpenedModel:
    """Opens a checkpoint; raises ConversionError for what is missing, and for settings that megacl's model lacks."""
    file = _weights(path)
    config = options.config or file.parent / CONFIG
    settings = _read_settings(config)
    files = PickledFiles()
    state = files.open(file)
    inside = ("model",) if isinstance(state.get("model"), dict) else ()
    tensors = {
        keys[-1]: Part(tuple(tensor.shape), tensor.dtype, partial(files.tensor, file, keys))
        for keys, tensor in tensors_of(state["model"] if inside else state, inside)
    }
    old = any(".attn.attn." in name for name in tensors)
    with settings_of(config):
        model = typed(_model_config(config, settings, tensors))
    return assemble(
        format=FORMAT,
        path=path,
        model=model,
        table=_table(old),
        tensors=tensors,
        sources=[file, config],
        options=options,
        seq_length=settings.get("block_size"),
    )


def _read_settings(config: Path) -> dict[str, Any]:
    if not config.is_file():
        raise ConversionError(f"{config}: no such file, without which the model is not known; name it with --config.")
    try:
        settings = yaml.safe_load(config.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConversionError(f"{config}: not a YAML file: {str(error).splitlines()[0]}.") from None
    if not isinstance(settings, dict) or not {"n_layer", "n_embd", "n_head"} <= set(settings):
        raise ConversionError(
            f"{config}: not a model_config.yaml of litgpt: it does not say n_layer, n_embd and n_head."
        )
    return settings


def _model_config(config: Path, settings: Mapping[str, Any], tensors: Mapping[str, Part]) -> ModelConfig:
    refuse(config, settings, _ALLOWED)
    norm, mlp = settings.get("norm_class_name", "LayerNorm"), settings.get("mlp_class_name", "GptNeoxMLP")
    form = _FORMS.get((norm, mlp))
    if form is None:
        raise ConversionError(
            f"{config}: norm_class_name is {norm!r} and mlp_class_name is {mlp!r}; megacl's model has "
            f"{' or '.join(' with '.join(pair) for pair in _FORMS)}."
        )
    window, length = settings.get("sliding_window_size"), settings.get("block_size")
    if window is not None and (length is None or window < length):
        raise ConversionError(
            f"{config}: sliding_window_size is {window}; megacl attends to all that went before, which is the same up "
            f"to {window} tokens only. Set block_size, now {length}, to that in a copy to convert the model for those."
        )
    embedding = tensors.get("transformer.wte.weight")
    biased = settings.get("bias", True)
    return ModelConfig(
        form=form,  # type: ignore[arg-type]
        vocab_size=embedding.shape[0] if embedding else settings.get("padded_vocab_size", settings["vocab_size"]),
        hidden_size=settings["n_embd"],
        num_layers=settings["n_layer"],
        num_attention_heads=settings["n_head"],
        num_kv_heads=settings.get("n_query_groups"),
        head_dim=settings.get("head_size"),
        intermediate_size=settings.get("intermediate_size"),
        rotary_pct=float(settings.get("rotary_percentage", 0.25)),
        rope_theta=float(settings.get("rope_base", 10000)),
        rope_scaling=_rope_scaling(config, settings),
        norm_eps=float(settings.get("norm_eps", 1e-5)),
        qk_norm="rms_norm" if settings.get("norm_qk") else "none",
        attention_bias="all" if biased else "qkv" if settings.get("attn_bias") else "none",
        mlp_bias=biased,
        parallel_residual=settings.get("parallel_residual", True),
        gelu="tanh" if settings.get("gelu_approximate", "none") == "tanh" else "exact",
    )


def _rope_scaling(config: Path, settings: Mapping[str, Any]) -> LinearRope | Llama3Rope | None:
    condensed, adjusted = settings.get("rope_condense_ratio", 1), settings.get("rope_adjustments")
    if adjusted is None:
        return None if condensed == 1 else LinearRope(kind="linear", factor=float(condensed))
    llama3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}
    if set(adjusted) != llama3 or condensed != 1:
        raise ConversionError(
            f"{config}: rope_adjustments is {adjusted!r}; megacl's model has Llama 3's, {', '.join(sorted(llama3))}."
        )
    return Llama3Rope(
        kind="llama3",
        factor=float(adjusted["factor"]),
        low_freq_factor=float(adjusted["low_freq_factor"]),
        high_freq_factor=float(adjusted["high_freq_factor"]),
        original_max_position_embeddings=int(adjusted["original_max_seq_len"]),
    )


def _table(old: bool) -> dict[str, Rule]:
    """megacl's modules -> litgpt's names. old: up to 0.5.4."""
    at = "transformer.h.{i}"
    return {
        "embed": Rule(("transformer.wte.{part}",)),
        "layers.attention_norm": Rule((f"{at}.norm_1.{{part}}",)),
        "layers.attention.qkv": Rule((f"{at}.attn.{'attn' if old else 'qkv'}.{{part}}",), QKV_GROUPED if old else SAME),
        "layers.attention.q_norm": Rule((f"{at}.attn.norm_q.{{part}}",)),
        "layers.attention.k_norm": Rule((f"{at}.attn.norm_k.{{part}}",)),
        "layers.attention.out": Rule((f"{at}.attn.proj.{{part}}",)),
        "layers.mlp_norm": Rule((f"{at}.norm_2.{{part}}",)),
        "layers.mlp.up": Rule((f"{at}.mlp.fc.{{part}}",)),
        "layers.mlp.gate_up": Rule((f"{at}.mlp.fc_1.{{part}}", f"{at}.mlp.fc_2.{{part}}"), GATE_UP_APART),
        "layers.mlp.down": Rule((f"{at}.mlp.proj.{{part}}",)),
        "final_norm": Rule(("transformer.ln_f.{part}",)),
        "head": Rule(("lm_head.{part}",)),
    }
