"""Megatron-LM checkpoints, written from their public layout, compute what transformers does with the same numbers."""

import io
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_layout import CORE, ENGINE, LEGACY, OLDER, OLDEST, write_megatron, write_torch_dist
from opened_models import TOKENS, logits
from whole_models import padded, random_llama, random_model, transformers_logits

from megacl.convert.detect import open_model
from megacl.convert.opened import ReadOptions
from megacl.errors import ConversionError

LONG = pytest.mark.long


def gelu_model(**shape):
    return random_model(parallel=False, **shape)


def agree(folder, whole):
    opened = open_model(folder)
    assert opened.format == "megatron"
    np.testing.assert_allclose(logits(opened), transformers_logits(whole, TOKENS), atol=1e-5, rtol=0)
    return opened


@pytest.mark.parametrize(
    ("version", "names", "tensor_parallel"),
    [
        (None, OLDEST, 2),
        (1.0, OLDER, 2),
        (3.0, LEGACY, 4),
        pytest.param(0.0, OLDER, 4, marks=LONG),
        pytest.param(2.0, OLDER, 1, marks=LONG),
        pytest.param(1.0, OLDEST, 1, marks=LONG),
    ],
)
def test_every_order_of_query_key_value_is_read_by_the_version_of_the_checkpoint(
    tmp_path, version, names, tensor_parallel
):
    whole = gelu_model(gelu="tanh")
    agree(write_megatron(tmp_path, whole, version=version, names=names, tensor_parallel=tensor_parallel), whole)


@pytest.mark.parametrize(
    ("whole", "how"),
    [
        (gelu_model(tied=True, layers=4), {"pipeline_parallel": 2, "tensor_parallel": 2}),
        (random_llama(kv_heads=2), {"names": CORE, "tensor_parallel": 2, "pipeline_parallel": 3}),
        (random_llama(kv_heads=2, qk_norm=True, head_dim=10), {"names": ENGINE, "apply_layernorm_1p": True}),
        (random_llama(kv_heads=2, attention_bias="qkv"), {"names": CORE, "tensor_parallel": 4}),
        pytest.param(gelu_model(), {"names": CORE, "release": True}, marks=LONG),
        pytest.param(random_llama(), {"names": LEGACY, "tensor_parallel": 2}, marks=LONG),
        pytest.param(
            random_llama(attention_bias="all", mlp_bias=True), {"names": ENGINE, "tensor_parallel": 4}, marks=LONG
        ),
        pytest.param(
            random_llama(tied=True, layers=4), {"names": CORE, "tensor_parallel": 2, "pipeline_parallel": 2}, marks=LONG
        ),
        pytest.param(
            gelu_model(layers=4, gelu="tanh"),
            {"names": ENGINE, "tensor_parallel": 4, "pipeline_parallel": 4, "apply_layernorm_1p": True},
            marks=LONG,
        ),
    ],
)
def test_torch_files_of_any_parallel_sizes_compute_what_transformers_does(tmp_path, whole, how):
    agree(write_megatron(tmp_path, whole, **how), whole)


@pytest.mark.parametrize("names", [LEGACY, CORE])
def test_chunks_of_a_virtual_pipeline_have_their_layers_in_order(tmp_path, names):
    whole = random_llama(layers=8)
    folder = write_megatron(tmp_path, whole, names=names, pipeline_parallel=2, virtual=2)
    opened = open_model(folder)
    for layer in range(8):
        ours = opened.read(f"layers.{layer}.mlp.down.weight").numpy()
        np.testing.assert_array_equal(ours, whole.tensors[f"{layer}.down.weight"])


@pytest.mark.parametrize(
    ("whole", "how"),
    [
        (random_llama(kv_heads=2, qk_norm=True, head_dim=10), {}),
        (gelu_model(gelu="tanh", tied=True), {"stacked": False}),
        (random_llama(kv_heads=2), {"ranks": (2, 3)}),
        pytest.param(gelu_model(), {"ranks": (4, 1)}, marks=LONG),
        pytest.param(random_llama(attention_bias="all", mlp_bias=True), {"ranks": (2, 1)}, marks=LONG),
    ],
)
def test_torch_dist_folders_compute_what_transformers_does(tmp_path, whole, how):
    agree(write_torch_dist(tmp_path, whole, **how), whole)


def test_padding_is_not_taken_for_tokens(tmp_path):
    folder = write_megatron(tmp_path, padded(random_llama(), 48), tensor_parallel=2)
    assert open_model(folder, ReadOptions(vocab_size=40)).tokenizer_vocab_size == 40
    assert open_model(folder).tokenizer_vocab_size is None


def test_norms_stored_less_one_are_whole_again_in_fp32(tmp_path):
    whole = random_llama()
    opened = open_model(write_megatron(tmp_path, whole, names=CORE, apply_layernorm_1p=True))
    assert opened.dtypes["final_norm.weight"] is torch.float32
    np.testing.assert_allclose(opened.read("final_norm.weight").numpy(), whole.tensors["final.weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("mp_rank_01_000", "mp_rank_01_000 is missing"),
        ("mp_rank_01_00?", "mp_rank_01_000 is missing"),
        ("mp_rank_0?_001", "mp_rank_00_001 is missing"),
    ],
)
def test_a_missing_part_is_named(tmp_path, missing, words):
    folder = write_megatron(tmp_path, random_llama(layers=4), tensor_parallel=2, pipeline_parallel=2)
    for each in (folder / "iter_0000007").glob(missing):
        shutil.rmtree(each)
    with pytest.raises(ConversionError, match=words):
        open_model(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_experts": 8}, "num_experts is 8"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is 'learned_absolute'"),
        ({"attention_output_gate": True}, "attention_output_gate is True"),
        ({"squared_relu": True}, "squared_relu is True"),
        ({"rotary_interleaved": True}, "rotary_interleaved is True"),
        ({"window_size": (128, 0)}, "window_size is (128, 0)"),
        ({"multi_latent_attention": True}, "multi_latent_attention is True"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm' and swiglu is True"),
        ({"num_layers_in_first_pipeline_stage": 1}, "num_layers_in_first_pipeline_stage is 1"),
        ({"pipeline_model_parallel_layout": "Ett|tL"}, "pipeline_model_parallel_layout is 'Ett|tL'"),
        ({"num_layers": 5}, "num_layers is 5, which 2 stages of 1 chunks do not divide"),
        ({"num_layers": 6}, "layers.2.input_layernorm.weight is missing"),
        ({"tensor_model_parallel_size": 2}, "mp_rank_01_000 is missing"),
    ],
)
def test_an_argument_that_megacl_lacks_is_refused_by_its_name(tmp_path, arguments, words):
    folder = write_megatron(tmp_path, random_llama(layers=4), names=CORE, pipeline_parallel=2, **arguments)
    with pytest.raises(ConversionError, match=re.escape(words)):
        open_model(folder)


def test_stretched_positions_are_taken_over(tmp_path):
    folder = write_megatron(tmp_path / "a", random_llama(), names=CORE, use_rope_scaling=True, rope_scaling_factor=32.0)
    scaling = open_model(folder).model.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("llama3", 32.0)
    folder = write_megatron(tmp_path / "b", random_llama(), names=CORE, rotary_seq_len_interpolation_factor=4)
    scaling = open_model(folder).model.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


class Attack:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (Path.touch, (self.place,))


def test_malicious_metadata_is_refused_by_name_and_not_run(tmp_path):
    folder = write_torch_dist(tmp_path, random_llama())
    (folder / "iter_0000007" / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "run")))
    with pytest.raises(ConversionError, match=r"it names \S+, which megacl does not load"):
        open_model(folder)
    assert not (tmp_path / "run").exists()


def test_a_malicious_piece_is_refused_and_not_run(tmp_path):
    folder = write_torch_dist(tmp_path, random_llama())
    opened = open_model(folder)
    attack = io.BytesIO()
    torch.save(Attack(tmp_path / "run"), attack)
    for file in (folder / "iter_0000007").glob("*.distcp"):
        file.write_bytes(attack.getvalue() + bytes(file.stat().st_size))
    with pytest.raises(ConversionError, match=r"\.distcp"):
        [opened.read(name) for name in opened.shapes]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("common.pt", "common.pt: no such file"),
        (".metadata", ".metadata: no such file"),
        ("__0_0.distcp", "no such file"),
    ],
)
def test_a_missing_file_of_torch_dist_is_named(tmp_path, file, words):
    folder = write_torch_dist(tmp_path, random_llama())
    (folder / "iter_0000007" / file).unlink()
    with pytest.raises(ConversionError, match=words):
        open_model(folder).read("embed.weight")


def test_another_backend_than_torch_dist_is_refused(tmp_path):
    folder = write_torch_dist(tmp_path, random_llama())
    (folder / "iter_0000007" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ConversionError, match="sharded_backend is 'zarr'"):
        open_model(folder)
