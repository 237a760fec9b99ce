"""Hugging Face both ways: logits beside those of transformers' own models with random weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from foreign import (
    SMALL,
    difference,
    logits_of_checkpoint,
    logits_of_opened,
    logits_of_transformers,
    saved,
    some_tokens,
    transformers_model,
)

from megacl.convert.conversion import convert
from megacl.convert.detect import detect_format, open_model
from megacl.convert.hf_config import FAMILIES, choose_architecture, read_config
from megacl.convert.mapping import parameter_shapes
from megacl.convert.opened import ReadOptions
from megacl.errors import ConversionError
from megacl.model.config import ModelConfig, MupConfig

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("gpt_neox", {"rotary_pct": 0.5}),
    "neox, one after the other, tied, tanh": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 500.0,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "neox without attention's biases": ("gpt_neox", {"attention_bias": False, "rotary_pct": 0.34}),
    "llama": ("llama", {"rms_norm_eps": 1e-3}),
    "llama, grouped, wide heads, tied": (
        "llama",
        {"num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True, "rope_theta": 777.0},
    ),
    "llama, one key head, biases": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "mistral": (
        "mistral",
        {"num_key_value_heads": 1, "num_attention_heads": 3, "hidden_size": 26, "head_dim": 8, "sliding_window": None},
    ),
    "qwen 2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen 3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen 3, biases, heads that do not divide": (
        "qwen3",
        {"num_key_value_heads": 5, "num_attention_heads": 5, "head_dim": 8, "attention_bias": True},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_same_logits_here_and_again_in_transformers(
    name: str, tmp_path: Path, small_tokenizer: Path
) -> None:
    model_type, settings = MODELS[name]
    model = transformers_model(model_type, **settings)
    source, tokens = saved(model, tmp_path / "source"), some_tokens()
    expected = logits_of_transformers(model, tokens)
    assert float(expected.std()) > 0.5
    assert detect_format(source) == "hf"
    assert difference(logits_of_opened(open_model(source), tokens), expected) < 1e-5
    with_tokenizer = ReadOptions(tokenizer=small_tokenizer)
    convert(source, tmp_path / "ours", to="megacl", options=with_tokenizer, vocab_size=384)
    ours = logits_of_checkpoint(tmp_path / "ours", tokens)
    assert difference(ours[..., :300], expected) < 1e-5
    assert not ours[..., 300:].any()
    convert(tmp_path / "ours", tmp_path / "again", to="hf", vocab_size="tokenizer")
    assert difference(logits_of_transformers(tmp_path / "again", tokens), expected) < 1e-5


# ---------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_config_json_leaves_out_is_as_the_class_in_transformers_has_it(model_type: str) -> None:
    defaults = transformers.AutoConfig.for_model(model_type)
    assert transformers.AutoModelForCausalLM._model_mapping[type(defaults)].__name__ == FAMILIES[model_type].class_name
    assert {key: getattr(defaults, key) for key in FAMILIES[model_type].defaults} == FAMILIES[model_type].defaults


def changed_config(folder: Path, changes: dict[str, Any]) -> Path:
    tree = json.loads((folder / "config.json").read_text())
    tree = {key: value for key, value in {**tree, **changes}.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize(
    ("model_type", "settings", "older"),
    [
        (
            "gpt_neox",
            {"rotary_pct": 0.5, "rotary_emb_base": 500},
            {"rope_parameters": "left out", "rotary_pct": 0.5, "rotary_emb_base": 500},
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3},
            {
                "rope_parameters": "left out",
                "rope_theta": 5000.0,
                "rope_scaling": {**{key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"}},
                "attention_bias": "left out",
                "head_dim": "left out",
            },
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
            {"rope_parameters": "left out", "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        (  # both: someone has put the older key into a newer file
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
                "rope_theta": 500.0,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
        ),
    ],
)
def test_config_json_of_older_versions_means_the_same(
    model_type: str, settings: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    model = transformers_model(model_type, **settings)
    source, tokens = changed_config(saved(model, tmp_path / "source"), older), some_tokens()
    assert difference(logits_of_opened(open_model(source), tokens), logits_of_transformers(model, tokens)) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "the architecture is LlamaForSequenceClass"),
        ("llama", {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "known here are GPTNeoXForCausal"),
        ("llama", {"auto_map": {"AutoModel": "x.y"}}, "auto_map is"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; megacl\'s llama form has silu'),
        ("gpt_neox", {"hidden_act": "relu"}, 'hidden_act is "relu"'),
        ("llama", {"hidden_size": None}, "hidden_size is null"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not known"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling is"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "all have one rotary embedding"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; LlamaForCausalLM turns whole heads"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotary_pct is 0.4; of a head of 8"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_scaling is {"rope_type": "yarn"'),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": 0}, "rotary_pct is 0; it must be greater than 0"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads is 3; it must divide"),
        ("mistral", {"sliding_window": 32}, "the same up to 32 tokens only. Set max_position_embeddings, now 64, to"),
        (
            "qwen2",
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
            "sliding_window is 32",
        ),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types is"),
    ],
)
def test_what_megacl_cannot_compute_is_refused_by_its_name(
    model_type: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = transformers.AutoConfig.for_model(model_type, **SMALL, architectures=[FAMILIES[model_type].class_name])
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), **changes}))
    with pytest.raises(ConversionError) as error:
        open_model(tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize("model_type", ["gpt_neox", "qwen2"])
def test_a_config_json_with_values_that_make_no_sense_is_refused_in_one_line(model_type: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(model_type, **SMALL, architectures=[FAMILIES[model_type].class_name])
    whole, file = config.to_dict(), tmp_path / "config.json"
    odd = (None, True, 0, -3, 0.5, "x", "7", [], [1], {}, {"rope_type": []}, {"type": "linear", "factor": "x"})
    for key in {*whole, "rope_scaling", "sliding_window", "head_dim", "num_key_value_heads"}:
        for value in odd:
            file.write_text(json.dumps({**whole, key: value}))
            said = error_of(file)
            assert said is None or (said.startswith(str(file)) and "\n" not in said), (key, value, said)


def error_of(config: Path) -> str | None:
    """What is said of a config.json that makes no model."""
    try:
        parameter_shapes(read_config(config).model)
    except ConversionError as error:
        return str(error)
    return None


def test_a_window_that_no_sequence_reaches_beyond_is_no_window(tmp_path: Path) -> None:
    for number, (model_type, settings) in enumerate(
        [
            ("mistral", {"sliding_window": 64}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ]
    ):
        model = transformers_model(model_type, **settings, num_key_value_heads=2)
        source, tokens = saved(model, tmp_path / str(number)), some_tokens()
        assert difference(logits_of_opened(open_model(source), tokens), logits_of_transformers(model, tokens)) < 1e-5


def test_a_key_that_is_not_known_is_noted(tmp_path: Path) -> None:
    source = changed_config(saved(transformers_model("llama"), tmp_path), {"residual_twist": 2, "unused": None})
    assert open_model(source).notes == ("config.json: residual_twist is not known here and was not looked at",)


NEOX = ModelConfig(vocab_size=300, hidden_size=32, num_layers=1, num_attention_heads=4)
LLAMA = replace(NEOX, form="llama", num_kv_heads=2)


@pytest.mark.parametrize(
    ("model", "wanted", "words"),
    [
        (replace(NEOX, mup=MupConfig(base_hidden_size=16, base_head_dim=4)), None, "model.mup is set"),
        (replace(NEOX, qk_norm="layer_norm"), None, "model.qk_norm is layer_norm, which GPTNeoXForCausalLM has not"),
        (replace(LLAMA, qk_norm="layer_norm"), None, "model.qk_norm is layer_norm"),
        (replace(NEOX, head_dim=16), None, "model.head_dim is 16"),
        (replace(NEOX, mlp_bias=False), None, "model.mlp_bias is False"),
        (replace(NEOX, attention_bias="qkv"), None, "model.attention_bias is qkv"),
        (replace(LLAMA, parallel_residual=True), None, "model.parallel_residual is True"),
        (replace(LLAMA, rotary_pct=0.5), None, "model.rotary_pct is 0.5"),
        (replace(LLAMA, attention_bias="qkv", mlp_bias=True), None, "model.mlp_bias is True"),
        (replace(LLAMA, qk_norm="rms_norm", attention_bias="qkv"), None, "model.attention_bias is qkv"),
        (replace(LLAMA, hidden_size=30, head_dim=8, mlp_bias=True), None, "model.head_dim is 8"),
        (LLAMA, "qwen2", "model.attention_bias is none, which Qwen2ForCausalLM has not"),
        (LLAMA, "qwen3", "model.qk_norm is none, which Qwen3ForCausalLM has not"),
        (LLAMA, "gpt_neox", "model.form is llama"),
        (NEOX, "llama", "model.form is gpt_neox, which LlamaForCausalLM has not"),
    ],
)
def test_what_no_architecture_can_express_is_refused_by_its_name(model: ModelConfig, wanted: Any, words: str) -> None:
    with pytest.raises(ConversionError) as error:
        choose_architecture(model, wanted)
    assert words in str(error.value)


def test_the_architecture_is_the_usual_one_that_computes_the_same_or_the_one_asked_for() -> None:
    assert choose_architecture(NEOX, None) == "gpt_neox"
    assert choose_architecture(LLAMA, None) == "llama"
    assert choose_architecture(LLAMA, "mistral") == "mistral"
    assert choose_architecture(replace(LLAMA, hidden_size=30, head_dim=8), None) == "mistral"
    assert choose_architecture(replace(LLAMA, attention_bias="qkv"), None) == "qwen2"
    assert choose_architecture(replace(LLAMA, qk_norm="rms_norm", attention_bias="all"), None) == "qwen3"
    unscaled = MupConfig(base_hidden_size=32, base_head_dim=8)
    assert choose_architecture(replace(NEOX, mup=unscaled), None) == "gpt_neox"
