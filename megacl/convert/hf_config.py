"""config.json of Hugging Face's transformers and ModelConfig, both ways.

Families: GPTNeoX (Pythia), Llama, Mistral, Qwen2, Qwen3. What a family computes otherwise than megacl's model, in
either direction, is refused by the name of the option: nothing that changes a logit is dropped. Where config.json
leaves a key out, the default is that of the family's class in transformers; what is written spells every such key out,
in the names of transformers 5 and of those before it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megacl.convert.opened import typed
from megacl.errors import ConversionError
from megacl.model.config import LinearRope, Llama3Rope, ModelConfig, RopeScaling

Architecture = Literal["gpt_neox", "llama", "mistral", "qwen2", "qwen3"]
"""The model_type of each family."""


@dataclass(frozen=True)
class Family:
    """What one model_type's class does with its configuration."""

    class_name: str
    defaults: Mapping[str, Any]
    """Of the keys that may be left out, as the class has them."""
    own: frozenset[str] = field(default=frozenset())
    """Further keys that decide what is computed, and are read here."""


_LLAMA_LIKE: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
            "max_position_embeddings": 2048,
        },
        frozenset({"rotary_pct", "rotary_emb_base"}),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        {**_LLAMA_LIKE, "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
        frozenset({"num_key_value_heads", "head_dim"}),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {**_LLAMA_LIKE, "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        frozenset({"head_dim"}),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**_LLAMA_LIKE, "num_key_value_heads": 32, "max_position_embeddings": 32768},
        _WINDOWS | {"head_dim"},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "attention_bias": False,
            "max_position_embeddings": 32768,
        },
        _WINDOWS,
    ),
}

_SHAPE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
_GELUS = {"gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}
_SILUS = ("silu", "swish")
_MUST_BE_UNSET = ("auto_map", "quantization_config", "attn_logit_softcapping", "final_logit_softcapping")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_WITHOUT_EFFECT = frozenset(
    """architectures model_type transformers_version torch_dtype dtype use_cache initializer_range bos_token_id
    eos_token_id pad_token_id attention_dropout hidden_dropout classifier_dropout pretraining_tp is_decoder
    _name_or_path _attn_implementation _attn_implementation_autoset attn_implementation chunk_size_feed_forward
    id2label label2id output_attentions output_hidden_states return_dict problem_type is_encoder_decoder
    tie_encoder_decoder torchscript tokenizer_class unsloth_fixed unsloth_version gradient_checkpointing
    max_window_layers sliding_window use_sliding_window layer_types""".split()  # noqa: SIM905
)
"""Keys of config.json that do not change what a trained model computes, or that are looked at apart."""


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What a config.json says."""

    architecture: str
    model: ModelConfig
    seq_length: int
    """max_position_embeddings."""
    notes: tuple[str, ...]


def read_config(path: Path) -> HuggingFaceConfig:
    """Reads a config.json. ConversionError where it is damaged, or has something that megacl's model has not."""
    tree = read_json(path)
    try:
        return _config_of(tree, path)
    except (TypeError, KeyError, ValueError, AttributeError, ZeroDivisionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConversionError(f"{path}: its settings describe no model that is known here ({what}).") from None


def _config_of(tree: Mapping[str, Any], path: Path) -> HuggingFaceConfig:
    architecture = _architecture_of(tree, path)
    family = FAMILIES[architecture]
    keys = {**family.defaults, **tree}

    def refuse(key: str, why: str, value: Any = None) -> ConversionError:
        return ConversionError(f"{path}: {key} is {json.dumps(keys.get(key) if value is None else value)}; {why}.")

    for key in (*_MUST_BE_UNSET, *_EXPERTS):
        if keys.get(key) not in (None, {}, 0):
            raise refuse(key, "megacl's model has nothing of the kind, and cannot compute the same without it")
    for key in (*_SHAPE_KEYS, "max_position_embeddings"):
        if type(keys.get(key)) is not int:
            raise refuse(key, "it must be a number, and nothing else says what shape the model has")
    _check_window(architecture, keys, refuse)
    known = {*family.defaults, *family.own, *_SHAPE_KEYS, *_ROPE_KEYS, *_WITHOUT_EFFECT, *_MUST_BE_UNSET, *_EXPERTS}
    notes = [
        f"config.json: {key} is not known here and was not looked at"
        for key, value in tree.items()
        if key not in known and value not in (None, False, {}, [])
    ]
    model = _neox_model(keys, refuse) if architecture == "gpt_neox" else _llama_model(architecture, keys, refuse)
    model = typed(model)
    if problem := model.problem():
        raise ConversionError(f"{path}: {problem}.")
    return HuggingFaceConfig(architecture, model, keys["max_position_embeddings"], tuple(notes))


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. ConversionError where it cannot be read."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}.") from None
    except ValueError:
        raise ConversionError(f"{path}: it is not JSON. Copy it again.") from None
    if not isinstance(tree, dict):
        raise ConversionError(f"{path}: it is not a JSON object. Copy it again.")
    return tree


def _architecture_of(tree: Mapping[str, Any], path: Path) -> str:
    known = ", ".join(family.class_name for family in FAMILIES.values())
    names = tree.get("architectures") or []
    model_type = tree.get("model_type")
    for architecture, family in FAMILIES.items():
        if model_type == architecture and (not names or family.class_name in names):
            return architecture
    what = ", ".join(map(str, names)) or f"model_type {model_type!r}"
    raise ConversionError(f"{path}: the architecture is {what}; known here are {known}.")


def _check_window(architecture: str, keys: Mapping[str, Any], refuse: Any) -> None:
    """Refuses attention within a window, unless no sequence of the model is longer than it."""
    window, longest = keys.get("sliding_window"), keys["max_position_embeddings"]
    effective = window is not None and window < longest
    if architecture in ("qwen2", "qwen3"):
        window = window if window is not None else 4096
        layers, types = keys["num_hidden_layers"], keys.get("layer_types")
        slides = "sliding_attention" in types if types else keys.get("max_window_layers", 28) < layers
        effective = bool(keys.get("use_sliding_window")) and slides and window < longest
        if types and set(types) - {"full_attention", "sliding_attention"}:
            raise refuse("layer_types", "megacl's layers have full attention")
    elif architecture != "mistral":
        return
    if effective:
        raise refuse(
            "sliding_window",
            f"megacl attends to all that went before, which is the same up to {window} tokens only. Set "
            f"max_position_embeddings, now {longest}, to {window} in a copy of the file to convert the model for those",
        )


def _rope(keys: Mapping[str, Any], refuse: Any, *, theta: str, part: str) -> tuple[Any, Any, RopeScaling | None]:
    """The base, the rotated part of a head, and the scaling; theta and part: their names before transformers 5."""
    key = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"  # with both, transformers takes the first
    given = keys.get(key) or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise refuse(key, "megacl's layers all have one rotary embedding")
    base = given.get("rope_theta", keys.get(theta) or 10000.0)
    rotated = given.get("partial_rotary_factor", keys.get(part))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return base, rotated, None
    if kind == "linear":
        return base, rotated, LinearRope(kind="linear", factor=float(given["factor"]))
    if kind == "llama3":
        numbers = {key: float(given[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        original = int(given.get("original_max_position_embeddings") or keys["max_position_embeddings"])
        return base, rotated, Llama3Rope(kind="llama3", original_max_position_embeddings=original, **numbers)
    raise refuse(key, f"rope_type {kind!r} is not known here; known are default, linear and llama3")


def _neox_model(keys: Mapping[str, Any], refuse: Any) -> ModelConfig:
    theta, part, scaling = _rope(keys, refuse, theta="rotary_emb_base", part="rotary_pct")
    part = 0.25 if part is None else part
    heads, hidden = keys["num_attention_heads"], keys["hidden_size"]
    if keys["hidden_act"] not in _GELUS:
        raise refuse("hidden_act", f"megacl's gpt_neox form has {', '.join(_GELUS)}")
    if hidden % heads == 0 and int(hidden // heads * part) % 2:
        raise refuse("rotary_pct", f"of a head of {hidden // heads} it must be an even number of dimensions", part)
    return ModelConfig(
        form="gpt_neox",
        vocab_size=keys["vocab_size"],
        hidden_size=hidden,
        num_layers=keys["num_hidden_layers"],
        num_attention_heads=heads,
        intermediate_size=keys["intermediate_size"],
        rotary_pct=part,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=keys["layer_norm_eps"],
        tie_embeddings=keys["tie_word_embeddings"],
        attention_bias="all" if keys["attention_bias"] else "none",
        parallel_residual=keys["use_parallel_residual"],
        gelu="exact" if _GELUS[keys["hidden_act"]] == "exact" else "tanh",
    )


def _llama_model(architecture: str, keys: Mapping[str, Any], refuse: Any) -> ModelConfig:
    theta, part, scaling = _rope(keys, refuse, theta="rope_theta", part="partial_rotary_factor")
    if part not in (None, 1.0):
        raise refuse("partial_rotary_factor", f"{FAMILIES[architecture].class_name} turns whole heads", part)
    if keys["hidden_act"] not in _SILUS:
        raise refuse("hidden_act", "megacl's llama form has silu")
    heads, hidden = keys["num_attention_heads"], keys["hidden_size"]
    bias: Literal["none", "qkv", "all"] = "all" if keys.get("attention_bias") else "none"
    return ModelConfig(
        form="llama",
        vocab_size=keys["vocab_size"],
        hidden_size=hidden,
        num_layers=keys["num_hidden_layers"],
        num_attention_heads=heads,
        num_kv_heads=keys.get("num_key_value_heads") or heads,
        head_dim=keys.get("head_dim") or hidden // heads,
        intermediate_size=keys["intermediate_size"],
        rotary_pct=1.0,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=keys["rms_norm_eps"],
        tie_embeddings=keys["tie_word_embeddings"],
        qk_norm="rms_norm" if architecture == "qwen3" else "none",
        attention_bias="qkv" if architecture == "qwen2" else bias,
        mlp_bias=bool(keys.get("mlp_bias")),
    )


# ---------------------------------------------------------------------------------------------- writing


def choose_architecture(model: ModelConfig, wanted: Architecture | None) -> Architecture:
    """The family that computes what the model does; `wanted` where several do, else the usual one.

    Raises ConversionError naming the option that no family, or not the wanted one, has.
    """
    fitting: list[Architecture] = []
    problems: dict[str, str] = {}
    for architecture in FAMILIES:
        problem = _misfit(model, architecture)
        if problem is None:
            fitting.append(architecture)  # type: ignore[arg-type]  # the keys are its values
        problems[architecture] = problem or ""
    if wanted is not None and wanted not in fitting:
        raise ConversionError(f"{problems[wanted]}, which {FAMILIES[wanted].class_name} has not.")
    if wanted is not None:
        return wanted
    if not fitting:
        nearest = _nearest(model)
        raise ConversionError(f"{problems[nearest]}, which {FAMILIES[nearest].class_name} has not, nor has another.")
    return fitting[0]


def _nearest(model: ModelConfig) -> str:
    if model.form == "gpt_neox":
        return "gpt_neox"
    if model.qk_norm != "none":
        return "qwen3"
    return "qwen2" if model.attention_bias == "qkv" else "llama"


def _misfit(model: ModelConfig, architecture: str) -> str | None:
    """The first option of a model that a family has not, as "model.key is value"; None where it has all."""
    neox = architecture == "gpt_neox"
    bias = "all" if model.attention_out_biased else "qkv" if model.qkv_biased else "none"
    biases = {"llama": ("none", "all"), "mistral": ("none",), "qwen2": ("qkv",), "qwen3": ("none", "all")}
    whole = model.hidden_size == model.num_attention_heads * model.head_size
    checks: list[tuple[str, Any, bool]] = [
        ("form", model.form, model.form == ("gpt_neox" if neox else "llama")),
        ("mup", "set", model.width_ratio == 1 and math.isclose(model.attention_scale, model.head_size**-0.5)),
        ("qk_norm", model.qk_norm, model.qk_norm == ("rms_norm" if architecture == "qwen3" else "none")),
        ("attention_bias", bias, bias in biases.get(architecture, ("none", "all"))),
        ("mlp_bias", model.mlp_biased, model.mlp_biased if neox else architecture == "llama" or not model.mlp_biased),
        ("parallel_residual", model.parallel, neox or not model.parallel),
        ("head_dim", model.head_size, whole if neox else model.hidden_size % model.num_attention_heads == 0 or (
            architecture != "llama")),
        ("num_kv_heads", model.kv_heads, not neox or model.kv_heads == model.num_attention_heads),
        ("rotary_pct", model.rotary_dims / model.head_size, neox or model.rotary_dims == model.head_size),
    ]  # fmt: skip
    return next((f"model.{key} is {value}" for key, value, fits in checks if not fits), None)


def config_tree(
    model: ModelConfig,
    architecture: Architecture,
    *,
    seq_length: int,
    dtype: str,
    bos: int | None,
    eos: int | list[int] | None,
) -> dict[str, Any]:
    """The config.json of a model that `choose_architecture` has found to fit.

    dtype: float32, float16 or bfloat16. seq_length: its max_position_embeddings. bos, eos: token ids.
    """
    common = {
        "architectures": [FAMILIES[architecture].class_name],
        "model_type": architecture,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.mlp_size,
        "max_position_embeddings": seq_length,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    rope = _rope_tree(model)
    if architecture == "gpt_neox":
        part = _rotary_part(model)
        return common | {
            "hidden_act": "gelu" if model.gelu == "exact" else "gelu_pytorch_tanh",
            "layer_norm_eps": model.norm_eps,
            "use_parallel_residual": model.parallel,
            "attention_bias": model.attention_out_biased,
            "hidden_dropout": 0.0,
            "rope_parameters": {**rope, "rope_theta": model.rope_theta, "partial_rotary_factor": part},
            "rotary_pct": part,
            "rotary_emb_base": model.rope_theta,
            "rope_scaling": None if model.rope_scaling is None else {**rope, "type": rope["rope_type"]},
        }
    tree = common | {
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else {**rope, "type": rope["rope_type"]},
    }
    if architecture in ("llama", "qwen3"):
        tree["attention_bias"] = model.attention_out_biased
    if architecture == "llama":
        tree["mlp_bias"] = model.mlp_biased
    if architecture != "llama":
        tree["sliding_window"] = None
    if architecture in ("qwen2", "qwen3"):
        tree["use_sliding_window"] = False
    return tree


def _rope_tree(model: ModelConfig) -> dict[str, Any]:
    if model.rope_scaling is None:
        return {"rope_type": "default"}
    tree = dataclasses.asdict(model.rope_scaling)
    return {"rope_type": tree.pop("kind"), **tree}


def _rotary_part(model: ModelConfig) -> float:
    """The factor by which transformers, which rounds down, comes to the same number of rotated dimensions."""
    given = 0.25 if model.rotary_pct is None else model.rotary_pct
    return given if int(model.head_size * given) == model.rotary_dims else (model.rotary_dims + 0.5) / model.head_size


def resolved(model: ModelConfig) -> ModelConfig:
    """The same model with every null replaced by what it stands for, and muP left out where it changes nothing."""
    same = model.width_ratio == 1 and math.isclose(model.attention_scale, model.head_size**-0.5)
    return dataclasses.replace(
        model,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_size,
        intermediate_size=model.mlp_size,
        rotary_pct=model.rotary_dims / model.head_size,
        attention_bias="all" if model.attention_out_biased else "qkv" if model.qkv_biased else "none",
        mlp_bias=model.mlp_biased,
        parallel_residual=model.parallel,
        mup=None if same else model.mup,
    )
