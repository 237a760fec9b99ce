"""`megacl convert` from every foreign format, to Hugging Face's files and to a checkpoint of megacl's."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from litgpt_layout import write_litgpt
from megatron_layout import CORE, write_megatron, write_torch_dist
from neox_layout import write_neox
from opened_models import TOKENS, logits
from runs import command_line, losses
from whole_models import padded, random_llama, random_model, transformers_logits, transformers_model

from megacl.convert.conversion import convert
from megacl.convert.detect import open_model
from megacl.errors import ConversionError


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return prepared.tokenizer


def neox(folder, whole):
    return write_neox(folder, whole, tensor_parallel=2)


def torch_dist(folder, whole):
    return write_torch_dist(folder, whole, ranks=(2, 1))


def mcore(folder, whole):
    return write_megatron(folder, whole, names=CORE, tensor_parallel=2)


@pytest.mark.parametrize(
    ("write", "whole"),
    [
        (neox, random_model(vocab=600)),
        (write_litgpt, random_llama(vocab=600, kv_heads=2)),
        pytest.param(mcore, random_model(vocab=600, parallel=False), marks=pytest.mark.long),
        pytest.param(torch_dist, random_llama(vocab=600, attention_bias="qkv"), marks=pytest.mark.long),
    ],
)
def test_every_format_converts_to_hugging_face_and_to_megacl(tmp_path, capsys, tokenizer, write, whole):
    import transformers

    whole = padded(whole, 616)
    source = write(tmp_path / "source", whole)
    expected = transformers_logits(whole, TOKENS)
    for to in ("hf", "megacl"):
        status, _, err = command_line(
            capsys, "convert", str(source), str(tmp_path / to), "--to", to, "--tokenizer", str(tokenizer)
        )
        assert status == 0, err
        np.testing.assert_allclose(logits(open_model(tmp_path / to)), expected, atol=1e-5, rtol=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(TOKENS)).logits.numpy(), expected, atol=1e-5, rtol=0)
    status, out, _ = command_line(capsys, "lineage", str(tmp_path / "megacl"))
    assert open_model(source).format in out


def test_a_description_is_refused_where_a_format_has_its_own(tmp_path, capsys):
    folder = tmp_path / "source"
    transformers_model(random_llama()).save_pretrained(folder)
    capsys.readouterr()  # transformers shows progress
    status, _, err = command_line(
        capsys, "convert", str(folder), str(tmp_path / "out"), "--to", "megacl", "--config", str(folder / "config.json")
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "leave out --config" in err


def test_padding_is_cut_off_where_the_tokenizer_says_how_many_tokens_there_are(tmp_path, capsys, tokenizer):
    whole = random_model(vocab=600)
    source = write_neox(tmp_path / "source", padded(whole, 616), tensor_parallel=4)
    arguments = ("--to", "hf", "--vocab-size", "tokenizer", "--tokenizer", str(tokenizer))
    status, _, err = command_line(capsys, "convert", str(source), str(tmp_path / "hf"), *arguments)
    assert status == 0, err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 600
    found = logits(open_model(tmp_path / "hf"))
    np.testing.assert_allclose(found, transformers_logits(whole, TOKENS), atol=1e-5, rtol=0)


def test_what_is_missing_or_cannot_be_expressed_is_one_line_and_nothing_is_written(tmp_path, capsys):
    source = write_neox(tmp_path / "source", random_model())
    yaml = source / "global_step7" / "configs" / "model.yml"
    moved = yaml.rename(tmp_path / "moved.yml")
    destination = tmp_path / "hf"
    command = ("convert", str(source), str(destination), "--to", "hf")
    status, _, err = command_line(capsys, *command)
    assert (status, err.count("\n")) == (2, 1)
    assert "name it with --config" in err
    status, _, err = command_line(capsys, *command, "--from", "megatron")
    assert (status, err.count("\n")) == (2, 1)
    assert "no mp_rank folders of Megatron" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved.yml", "source"]
    status, _, err = command_line(capsys, *command, "--config", str(moved))
    assert status == 0, err


def test_a_config_of_transformers_describes_a_folder_of_deepspeeds(tmp_path, capsys):
    whole = random_llama()
    tag = tmp_path / "source" / "global_step1"
    tag.mkdir(parents=True)
    (tag.parent / "latest").write_text("global_step1")
    model = transformers_model(whole)
    torch.save({"module": model.state_dict(), "buffer_names": []}, tag / "mp_rank_00_model_states.pt")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    command = ("convert", str(tmp_path / "source"), str(tmp_path / "hf"), "--to", "hf")
    status, _, err = command_line(capsys, *command, "--config", str(tmp_path / "config.json"))
    assert status == 0, err
    found = logits(open_model(tmp_path / "hf"))
    np.testing.assert_allclose(found, transformers_logits(whole, TOKENS), atol=1e-5, rtol=0)


@pytest.mark.long
def test_a_run_trains_on_from_two_tensor_parallel_ranks_of_gpt_neox_in_place(tmp_path, capsys, prepared):
    source = write_neox(tmp_path / "neox", padded(random_model(vocab=600), 616), tensor_parallel=2)
    shutil.copy(prepared.tokenizer, source)
    tree = prepared.tree(tmp_path / "run", start_from=str(source))
    del tree["model"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    status, out, err = command_line(capsys, "train", str(tmp_path / "run.yaml"))
    assert status == 0, err
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    status, out, _ = command_line(capsys, "lineage", str(tmp_path / "run"))
    assert "conversion  from gpt-neox to megacl, of neox" in out


def test_a_file_of_torch_dist_that_is_missing_is_named(tmp_path):
    source = write_torch_dist(tmp_path / "source", random_llama())
    next(source.rglob("*.distcp")).unlink()
    with pytest.raises(ConversionError, match=r"\.distcp: cannot be read: No such file"):
        convert(source, tmp_path / "out", to="hf")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (write_neox, {"num_kv_heads": "x"}),
        (write_neox, {"model_parallel_size": 2.0}),
        (write_neox, {"max_position_embeddings": "x"}),
        (write_neox, {"rotary_pct": 0}),
        (write_litgpt, {"n_head": "x"}),
        (write_litgpt, {"block_size": "x"}),
        (write_litgpt, {"parallel_residual": "x"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_settings_of_another_type_or_beyond_their_range_are_refused_in_one_line(write, changes, tmp_path):
    source = write(tmp_path / "source", random_model(), **changes)
    with pytest.raises(ConversionError) as error:
        open_model(source)
    assert "\n" not in str(error.value)
