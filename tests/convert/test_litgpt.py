"""litgpt checkpoints, written from their public layout, compute what transformers computes with the same numbers."""

import re

import numpy as np
import pytest
import torch
from litgpt_layout import write_litgpt
from opened_models import TOKENS, logits
from whole_models import padded, random_llama, random_model, transformers_logits

from megacl.convert.detect import open_model
from megacl.convert.opened import ReadOptions
from megacl.errors import ConversionError

LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("whole", "how"),
    [
        (random_model(gelu="tanh"), {}),
        (random_model(parallel=False), {"old": True}),
        (random_llama(kv_heads=2), {"old": True, "trained": True}),
        (random_llama(kv_heads=2, qk_norm=True, head_dim=10), {}),
        pytest.param(random_llama(kv_heads=2, attention_bias="qkv"), {}, marks=LONG),
        pytest.param(random_llama(kv_heads=1, attention_bias="all", mlp_bias=True), {"old": True}, marks=LONG),
        pytest.param(random_llama(tied=True), {"trained": True}, marks=LONG),
    ],
)
def test_either_layout_of_qkv_computes_what_transformers_does(tmp_path, whole, how):
    opened = open_model(write_litgpt(tmp_path / "lit", whole, **how))
    assert opened.format == "litgpt"
    np.testing.assert_allclose(logits(opened), transformers_logits(whole, TOKENS), atol=1e-5, rtol=0)


def test_the_vocabulary_of_the_yaml_is_not_taken_for_the_tokenizers(tmp_path):
    folder = write_litgpt(tmp_path / "lit", padded(random_model(), 48))
    opened = open_model(folder)
    assert (opened.model.vocab_size, opened.tokenizer_vocab_size) == (48, None)
    assert open_model(folder, ReadOptions(vocab_size=40)).tokenizer_vocab_size == 40


def test_stretched_positions_are_taken_over(tmp_path):
    adjusted = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
    opened = open_model(write_litgpt(tmp_path / "a", random_llama(), rope_adjustments=adjusted))
    assert opened.model.rope_scaling is not None
    assert opened.model.rope_scaling.kind == "llama3"
    opened = open_model(write_litgpt(tmp_path / "b", random_llama(), rope_condense_ratio=4))
    assert opened.model.rope_scaling is not None
    assert (opened.model.rope_scaling.kind, opened.model.rope_scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attention_logit_softcapping": 50.0}, "attention_logit_softcapping is 50.0"),
        ({"scale_embeddings": True}, "scale_embeddings is True"),
        ({"shared_attention_norm": True}, "shared_attention_norm is True"),
        ({"n_expert": 8}, "n_expert is 8"),
        ({"norm_qk_type": "olmo2"}, "norm_qk_type is 'olmo2'"),
        ({"mlp_class_name": "GemmaMLP"}, "mlp_class_name is 'GemmaMLP'"),
        ({"sliding_window_size": 32}, "sliding_window_size is 32"),
        ({"rope_adjustments": {"factor": 2.0}}, "rope_adjustments is {'factor': 2.0}"),
        ({"n_layer": 2}, "no place for: transformer.h.2"),
        ({"n_layer": 4}, "transformer.h.3.norm_1.weight is missing"),
        ({"intermediate_size": 36}, "is [32, 24], and a model of its configuration has [36, 24] there"),
    ],
)
def test_a_setting_that_megacl_lacks_is_refused_by_its_name(tmp_path, settings, words):
    folder = write_litgpt(tmp_path / "lit", random_llama(), **settings)
    with pytest.raises(ConversionError, match=re.escape(words)):
        open_model(folder)


def test_a_missing_yaml_is_named(tmp_path):
    folder = write_litgpt(tmp_path / "lit", random_llama())
    (folder / "model_config.yaml").rename(tmp_path / "elsewhere.yaml")
    with pytest.raises(
        ConversionError, match=r"model_config\.yaml: no such file, without which the model is not known"
    ):
        open_model(folder)
    assert open_model(folder, ReadOptions(config=tmp_path / "elsewhere.yaml")).model.num_layers == 3


def test_the_file_alone_opens_too(tmp_path):
    folder = write_litgpt(tmp_path / "lit", random_llama())
    opened = open_model(folder / "lit_model.pth")
    assert torch.isfinite(opened.read("head.weight")).all()
