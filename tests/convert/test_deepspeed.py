"""DeepSpeed's own checkpoints, saved by DeepSpeed on gloo ranks, are put together as DeepSpeed holds them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from neox_layout import ranks_of, settings
from opened_models import TOKENS, logits
from ranks import run_on_ranks
from whole_models import random_llama, random_model, transformers_logits, transformers_model, transformers_state
from zero_ranks import save_pipeline, save_zero

from megacl.convert.detect import open_model
from megacl.convert.mapping import expand
from megacl.convert.opened import ReadOptions
from megacl.errors import ConversionError

LONG = pytest.mark.long


def describe(folder, whole):
    """transformers' config.json beside the checkpoint, as its Trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(transformers_model(whole).config.to_dict()))


def trained(whole):
    """The parameters that a transformers model has when it is trained: one for both embeddings where they are tied."""
    state = transformers_state(whole)
    if whole.tied:
        del state["lm_head.weight" if whole.gated else "embed_out.weight"]
    return state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small llama, saved on two ranks after two steps in bf16: stage -> (folder, fp32 weights)."""
    root = tmp_path_factory.mktemp("deepspeed")
    whole = random_llama(kv_heads=2, layers=2)
    found = {}
    for stage in (1, 3):
        folder = root / f"stage-{stage}"
        describe(folder, whole)
        found[stage] = (
            folder,
            run_on_ranks(2, save_zero, folder, [trained(whole)], stage=stage, bf16=True, steps=2)[0],
        )
    return found


def weights(opened, masters):
    """What was read and what DeepSpeed holds, by transformers' names."""
    from megacl.convert.hf import table_of

    table = table_of("gpt_neox" if opened.model.form == "gpt_neox" else "llama")
    for name, named in expand(table, opened.model).items():
        parts = named.split(opened.read(name), opened.model)
        for theirs, part in zip(named.theirs, parts, strict=True):
            yield theirs, part.float().numpy(), masters[theirs]


@pytest.mark.parametrize("stage", [1, 3])
def test_fp32_masters_of_every_stage_are_those_that_deepspeed_holds(saved, stage):
    folder, masters = saved[stage]
    opened = open_model(folder)
    assert opened.format == "deepspeed"
    assert set(opened.dtypes.values()) == {torch.float32}
    for name, read, held in weights(opened, masters):
        np.testing.assert_array_equal(read, held, err_msg=name)
    assert any(np.any(held != held.astype(np.float16)) for held in masters.values()), "masters are more than 16 bits"


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("frozen", ["no such", "embed", "layers.1."])
def test_three_ranks_tied_embeddings_and_frozen_parameters_compute_the_same(tmp_path, stage, frozen):
    whole = random_model(tied=True, hidden=20, head_dim=5, rotary_pct=0.8)
    describe(tmp_path, whole)
    run_on_ranks(3, save_zero, tmp_path, [trained(whole)], stage=stage, frozen=frozen)
    np.testing.assert_allclose(logits(open_model(tmp_path)), transformers_logits(whole, TOKENS), atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("whole", [random_model(), random_llama(kv_heads=2), random_model(tied=True, parallel=False)])
def test_gpt_neox_on_two_tensor_parallel_ranks_is_merged_out_of_its_masters(tmp_path, stage, whole):
    (tmp_path / "configs").mkdir(parents=True)
    (tmp_path / "configs" / "model.yml").write_text(json.dumps(settings(whole, 2)))
    flat = [
        {f"{layer}.{name}": array for layer, named in rank.items() for name, array in named.items()}
        for rank in ranks_of(whole, 2)
    ]
    run_on_ranks(4, save_zero, tmp_path, flat, stage=stage)
    opened = open_model(tmp_path, format="deepspeed")
    np.testing.assert_allclose(logits(opened), transformers_logits(whole, TOKENS), atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("tensor_parallel", "whole"), [(1, random_model(tied=True)), (2, random_model(parallel=False)), (2, random_llama())]
)
def test_deepspeeds_own_pipeline_of_gpt_neoxs_layers_is_read_from_layer_files_and_from_masters(
    tmp_path, tensor_parallel, whole, bf16
):
    (tmp_path / "configs").mkdir(parents=True)
    (tmp_path / "configs" / "model.yml").write_text(json.dumps(settings(whole, tensor_parallel)))
    layers = ranks_of(whole, tensor_parallel)
    run_on_ranks(4, save_pipeline, tmp_path, layers, tied=whole.tied, bf16=bf16)
    from_files = open_model(tmp_path)
    assert from_files.format == "gpt-neox"
    assert set(from_files.dtypes.values()) == {torch.bfloat16 if bf16 else torch.float32}
    from_masters = open_model(tmp_path, format="deepspeed")
    assert set(from_masters.dtypes.values()) == {torch.float32}
    for opened in (from_files, from_masters):  # masters are made from the weights in bf16
        expected = transformers_logits(whole, TOKENS)
        np.testing.assert_allclose(logits(opened), expected, atol=0.2 if bf16 else 1e-5, rtol=0)


def copy_of(saved, stage, place):
    return shutil.copytree(saved[stage][0], place)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_missing_partition_is_named(saved, tmp_path, stage):
    folder = copy_of(saved, stage, tmp_path / "a")
    file = folder / "global_step3" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    other = file.with_name(file.name.replace("rank_0_", "rank_1_"))
    other.rename(folder / "away")
    with pytest.raises(ConversionError, match="the optimizer was cut into 2 parts, and there are files of 1"):
        open_model(folder)
    (folder / "away").rename(other)
    file.unlink()
    with pytest.raises(ConversionError, match=re.escape(f"{file.name} is missing")):
        open_model(folder)


def test_partitions_of_another_checkpoint_are_found_out(saved, tmp_path):
    folder = copy_of(saved, 1, tmp_path / "a")
    file = folder / "global_step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(file, weights_only=False)
    flats = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flats[1] = flats[1][:-8].clone()
    torch.save(state, file)
    with pytest.raises(ConversionError, match=r"group 1 of the optimizer has \d+ numbers, and its parameters \d+"):
        open_model(folder)


def test_the_module_alone_is_refused_where_its_weights_lie_in_the_optimizer(saved, tmp_path):
    folder = copy_of(saved, 3, tmp_path / "a")
    for file in (folder / "global_step3").glob("*optim_states.pt"):
        file.unlink()
    with pytest.raises(ConversionError, match="its weights are in the optimizer's files, and there are none"):
        open_model(folder)


def test_the_modules_own_weights_are_read_where_there_is_no_optimizer(saved, tmp_path):
    folder = copy_of(saved, 1, tmp_path / "a")
    for file in (folder / "global_step3").glob("*optim_states.pt"):
        file.unlink()
    opened = open_model(folder)
    assert set(opened.dtypes.values()) == {torch.bfloat16}
    for name, read, held in weights(opened, saved[1][1]):
        np.testing.assert_allclose(read, held, atol=1e-2, err_msg=name)


def test_a_missing_config_is_named(saved, tmp_path):
    folder = copy_of(saved, 1, tmp_path / "a")
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ConversionError, match=r"no config\.json of transformers, without which its model is not known"):
        open_model(folder)
    assert open_model(folder, ReadOptions(config=tmp_path / "config.json")).model.num_layers == 2
