"""gpt-neox checkpoints, written from their public layout, compute what transformers computes with the same numbers."""

import re

import numpy as np
import pytest
import torch
from neox_layout import write_neox
from opened_models import TOKENS, loaded, logits
from whole_models import padded, random_llama, random_model, transformers_logits

from megacl.convert.detect import detect_format, open_model
from megacl.convert.opened import ReadOptions
from megacl.errors import ConversionError

LONG = pytest.mark.long


def agree(folder, whole, **options):
    opened = open_model(folder, ReadOptions(**options))
    assert opened.format == "gpt-neox"
    np.testing.assert_allclose(logits(opened), transformers_logits(whole, TOKENS), atol=1e-5, rtol=0)
    return opened


@pytest.mark.parametrize(
    ("tensor_parallel", "shape", "how"),
    [
        (1, {}, {}),
        (2, {"tied": True, "gelu": "tanh"}, {"mlp_names": "dense", "old_buffers": True, "dashes": True}),
        (4, {"parallel": False}, {"sequential": True}),
        pytest.param(4, {}, {"mlp_names": "dense"}, marks=LONG),
        pytest.param(2, {"parallel": False, "tied": True}, {}, marks=LONG),
        pytest.param(1, {"parallel": False}, {"sequential": True, "mlp_names": "dense"}, marks=LONG),
        pytest.param(2, {"rotary_pct": 1.0, "rope_theta": 500.0}, {"sequential": True}, marks=LONG),
    ],
)
def test_layers_of_any_tensor_parallel_size_compute_what_gpt_neox_does(tmp_path, tensor_parallel, shape, how):
    whole = random_model(**shape)
    agree(write_neox(tmp_path, whole, tensor_parallel=tensor_parallel, **how), whole)


@pytest.mark.parametrize(
    ("tensor_parallel", "shape", "how"),
    [
        (1, {}, {"mlp_names": "w", "activation": "silu", "mlp_type": "llama"}),
        (2, {"kv_heads": 2, "attention_bias": "all", "mlp_bias": True}, {}),
        pytest.param(4, {}, {"sequential": True}, marks=LONG),
        pytest.param(2, {"tied": True}, {"mlp_names": "w", "activation": "silu", "mlp_type": "llama"}, marks=LONG),
        pytest.param(1, {"kv_heads": 1, "eps": 1e-3}, {}, marks=LONG),
        pytest.param(2, {"kv_heads": 2, "layers": 1}, {"sequential": True}, marks=LONG),
    ],
)
def test_llama_layers_of_either_age_compute_what_llama_does(tmp_path, tensor_parallel, shape, how):
    whole = random_llama(**shape)
    agree(write_neox(tmp_path, whole, tensor_parallel=tensor_parallel, **how), whole)


def test_the_width_of_the_mlp_comes_from_the_tensors_and_not_from_the_yaml(tmp_path):
    whole = random_llama(ffn=40)
    opened = open_model(write_neox(tmp_path, whole, intermediate_size=999))
    assert opened.model.mlp_size == 40


@pytest.mark.parametrize("parallel", [True, False])
def test_a_bias_behind_the_reduction_is_neither_doubled_nor_halved(tmp_path, parallel):
    whole = random_model(parallel=parallel)
    opened = open_model(write_neox(tmp_path, whole, tensor_parallel=4))
    for name in ("o", "down"):
        ours = opened.read(f"layers.1.{'attention.out' if name == 'o' else 'mlp.down'}.bias")
        np.testing.assert_allclose(ours.numpy(), whole.tensors[f"1.{name}.bias"], atol=1e-6)


def test_padding_is_not_taken_for_tokens_where_their_number_is_given(tmp_path):
    whole = padded(random_model(), 48)
    folder = write_neox(tmp_path, whole, tensor_parallel=2)
    opened = open_model(folder, ReadOptions(vocab_size=40))
    assert (opened.model.vocab_size, opened.tokenizer_vocab_size) == (48, 40)
    unknown = open_model(folder)
    assert unknown.tokenizer_vocab_size is None
    assert any("how many of the embedding's 48 rows are tokens is not known" in note for note in unknown.notes)


def test_what_is_read_keeps_the_dtype_that_it_was_stored_in(tmp_path):
    opened = open_model(write_neox(tmp_path, random_model(), tensor_parallel=2, dtype=torch.bfloat16))
    assert set(opened.dtypes.values()) == {torch.bfloat16}
    loaded(opened)


def test_a_yaml_is_found_beside_the_step_too_or_named(tmp_path):
    whole = random_model()
    folder = write_neox(tmp_path / "a", whole)
    tag = folder / "global_step7"
    (tag / "configs").rename(folder / "configs")
    agree(folder, whole)
    (folder / "configs").rename(tmp_path / "elsewhere")
    with pytest.raises(ConversionError, match="no gpt-neox YAML, without which its model is not known; name it with"):
        open_model(folder)
    agree(tag, whole, config=tmp_path / "elsewhere" / "model.yml")
    assert detect_format(tag) == "gpt-neox"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layer_03-model_01-model_states.pt", "layer_03-model_01-model_states.pt is missing"),
        ("layer_0?-model_01-model_states.pt", "layer_00-model_01-model_states.pt is missing"),
        ("layer_07-model_0?-model_states.pt", "layer_07-model_00-model_states.pt is missing"),
    ],
)
def test_a_missing_layer_or_rank_is_named(tmp_path, name, words):
    folder = write_neox(tmp_path, random_model(), tensor_parallel=2)
    for file in (folder / "global_step7").glob(name):
        file.unlink()
    with pytest.raises(ConversionError, match=re.escape(words)):
        open_model(folder)


def test_layers_beyond_those_of_the_yaml_are_refused(tmp_path):
    folder = write_neox(tmp_path, random_model(), num_layers=2)
    with pytest.raises(ConversionError, match="there are files of layer 4, which a model of num_layers 2"):
        open_model(folder)


def test_a_missing_rank_of_sequential_layers_is_named(tmp_path):
    folder = write_neox(tmp_path, random_model(), tensor_parallel=2, sequential=True)
    (folder / "global_step7" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ConversionError, match="mp_rank_00_model_states"):
        open_model(folder)


def test_norms_that_differ_between_ranks_are_averaged_and_said(tmp_path):
    whole = random_model()
    folder = write_neox(tmp_path, whole, tensor_parallel=2)
    file = folder / "global_step7" / "layer_03-model_01-model_states.pt"
    state = torch.load(file)
    state["input_layernorm.weight"] += 0.5
    torch.save(state, file)
    opened = open_model(folder)
    assert any("the ranks' copies of 3.input_layernorm.weight differ" in note for note in opened.notes)
    np.testing.assert_allclose(
        opened.read("layers.1.attention_norm.weight").numpy(), whole.tensors["1.norm1.weight"] + 0.25, atol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pos_emb": "alibi"}, "pos_emb is 'alibi'"),
        ({"pos_emb": "learned"}, "pos_emb is 'learned'"),
        ({"norm": "scalenorm"}, "norm is 'scalenorm'"),
        ({"norm": "rmsnorm"}, "norm is 'rmsnorm' and activation is 'gelu'"),
        ({"activation": "geglu"}, "activation is 'geglu'"),
        ({"gpt_j_tied": True}, "gpt_j_tied is True"),
        ({"use_qk_layernorm": True}, "use_qk_layernorm is True"),
        ({"moe_num_experts": 8}, "moe_num_experts is 8"),
        ({"attention_config": [[["global", "gmlp"], 2]]}, "attention_config has gmlp"),
        ({"sliding_window_width": 32}, "sliding_window_width is 32"),
        ({"use_mup": True}, "use_mup is True"),
        ({"te_mha": True}, "te_mha is True"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ({"num_layers": None}, "num_layers is None"),
    ],
)
def test_a_setting_that_megacl_lacks_is_refused_by_its_name(tmp_path, settings, words):
    folder = write_neox(tmp_path, random_model(), **settings)
    with pytest.raises(ConversionError, match=re.escape(words)):
        open_model(folder)


def test_a_window_as_long_as_the_texts_changes_nothing(tmp_path):
    whole = random_model()
    agree(write_neox(tmp_path, whole, sliding_window_width=63), whole)


def test_a_tensor_without_a_place_is_refused_by_its_name(tmp_path):
    folder = write_neox(tmp_path, random_model())
    file = folder / "global_step7" / "layer_00-model_00-model_states.pt"
    torch.save(torch.load(file) | {"position_embeddings.weight": torch.zeros(64, 24)}, file)
    with pytest.raises(ConversionError, match=r"no place for: 0\.position_embeddings"):
        open_model(folder)
