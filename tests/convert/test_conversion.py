"""What a conversion writes, and what stays of one that was killed, damaged or refused."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import convert_checkpoint
import pytest
import torch
import transformers
from conftest import Prepared
from foreign import (
    difference,
    logits_of_checkpoint,
    logits_of_opened,
    logits_of_transformers,
    saved,
    some_tokens,
    transformers_model,
)
from runs import command_line
from safetensors.torch import load_file, save_file

from megacl.checkpoint import list_checkpoints
from megacl.configfile import load
from megacl.convert import hf_writing, staging
from megacl.convert.conversion import convert
from megacl.convert.detect import open_model
from megacl.convert.opened import ReadOptions
from megacl.data.tokenizer import load_tokenizer
from megacl.errors import ConversionError, DataError
from megacl.lineage import ConversionRecord, load_lineage
from megacl.trainer import train

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, grouped, of three layers, in several files, without a tokenizer."""
    model = transformers_model("llama", num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=True)
    return saved(model, tmp_path_factory.mktemp("llama") / "llama", max_shard_size="20KB")


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two phases."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    assert train(load([prepared.config_file(run_dir)])) == "done"
    return run_dir


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def left_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---------------------------------------------------------------------------------------------- files


def test_files_are_cut_by_size_and_named_by_an_index(llama: Path, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "out", to="hf", max_shard_size=30_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert report.files == len(files) > 2
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == report.tensor_bytes
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
    tokens = some_tokens()
    assert torch.equal(logits_of_transformers(tmp_path / "out", tokens), logits_of_transformers(llama, tokens))
    convert(llama, tmp_path / "whole", to="hf")
    assert left_of(tmp_path / "whole") == [
        *("config.json", "generation_config.json", "megacl-lineage.json", "model.safetensors")
    ]


def damaged(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    copy.mkdir()
    for name, each in content(folder).items():
        (copy / name).write_bytes(each)
    return copy


def test_files_that_are_missing_cut_short_or_of_another_model_are_named(llama: Path, tmp_path: Path) -> None:
    folder = damaged(llama, tmp_path)
    first = sorted(folder.glob("*.safetensors"))[0]
    whole = first.read_bytes()

    def refused() -> str:
        with pytest.raises(ConversionError) as error:
            open_model(folder)
        return str(error.value)

    first.unlink()
    assert f"{first.name} of the index is missing" in refused()
    first.write_bytes(whole[:-1])
    assert f"{first.name}: it is no whole safetensors file" in refused()
    first.write_bytes(b"\x05" + whole[1:])
    assert f"{first.name}: it is no whole safetensors file" in refused()
    tensors = load_file(llama / first.name)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:-1].clone()}, first)
    assert f"{name} is [" in refused()
    save_file({**tensors, "model.layers.0.twist": torch.ones(2)}, first)
    assert "it holds model.layers.0.twist, which a LlamaForCausalLM as config.json has it has not" in refused()
    save_file({**tensors, name: tensors[name].to(torch.int8)}, first)
    assert f"{name} is of torch.int8; quantised models are not read" in refused()
    del tensors[name]
    save_file(tensors, first)
    assert f"{name}, and no file holds it" in refused()


def test_old_bin_files_are_read_without_their_buffers_and_under_either_name_of_the_head(tmp_path: Path) -> None:
    model = transformers_model("gpt_neox", tie_word_embeddings=False)
    saved(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = torch.ones(1)
    for new in (True, False):
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        opened, tokens = open_model(tmp_path), some_tokens()
        assert difference(logits_of_opened(opened, tokens), logits_of_transformers(model, tokens)) < 1e-5
        assert "left out 3 buffers" in opened.notes[0]
        assert "unpickled, with weights_only" in opened.notes[1]
    torch.save({**tensors, "code": subprocess.Popen}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"it holds \S*Popen beside tensors"):
        open_model(tmp_path)


def test_a_copy_of_the_embedding_in_the_place_of_a_tied_head_is_left_out_and_another_head_refused(
    tmp_path: Path,
) -> None:
    saved(transformers_model("llama", tie_word_embeddings=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert open_model(tmp_path).notes == ("left out lm_head.weight, which is model.embed_tokens.weight",)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head.weight differs .* and tie_word_embeddings is true"):
        open_model(tmp_path)


def test_numbers_are_written_in_the_dtype_asked_for_unless_they_do_not_fit(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "half", to="hf", dtype="bfloat16")
    before, after = (
        {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
        for folder in (llama, tmp_path / "half")
    )
    assert all(torch.equal(after[name], each.bfloat16()) for name, each in before.items())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    large = damaged(llama, tmp_path)
    first = sorted(large.glob("*.safetensors"))[0]
    save_file({name: 1e6 * each for name, each in load_file(first).items()}, first)
    with pytest.raises(ConversionError, match=r"reaches .*, beyond what torch.float16 holds"):
        convert(large, tmp_path / "out", to="hf", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_rows_of_the_vocabulary_are_cut_down_to_the_tokens_and_no_further(
    llama: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    named = ReadOptions(tokenizer=small_tokenizer)
    convert(llama, tmp_path / "padded", to="hf", vocab_size=320, options=named)
    embed = load_file(tmp_path / "padded" / "model.safetensors")["model.embed_tokens.weight"]
    assert embed.shape[0] == 320
    assert not embed[300:].any()
    convert(tmp_path / "padded", tmp_path / "cut", to="hf", vocab_size="tokenizer")
    assert torch.equal(load_file(tmp_path / "cut" / "model.safetensors")["model.embed_tokens.weight"], embed[:300])
    with pytest.raises(ConversionError, match="--vocab-size is 299, and the tokenizer has 300 tokens"):
        convert(tmp_path / "padded", tmp_path / "less", to="hf", vocab_size=299)
    with pytest.raises(ConversionError, match="there is no tokenizer that says how many tokens there are"):
        convert(llama, tmp_path / "less", to="hf", vocab_size="tokenizer")
    with pytest.raises(ConversionError, match=r"there is no tokenizer, .* name it with --tokenizer"):
        convert(llama, tmp_path / "less", to="megacl")
    assert not (tmp_path / "less").exists()


# ---------------------------------------------------------------------------------------------- runs


def test_a_trained_model_goes_out_with_tokenizer_and_history_and_comes_back_the_same(
    trained: Path, prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    assert command_line(capsys, "convert", str(trained), str(out), "--to", "hf")[0] == 0
    tokens = some_tokens(600)
    expected = logits_of_checkpoint(trained, tokens)
    assert difference(logits_of_transformers(out, tokens), expected) < 1e-5
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(prepared.tokenizer)
    texts = [json.loads(line)["text"] for path in prepared.documents.values() for line in path.read_text().splitlines()]
    assert theirs(texts).input_ids == [ids.tolist() for ids in ours.encode(texts)]
    assert theirs.eos_token_id == ours.eos_id
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id) == (ours.eos_id, ours.eos_id)
    status, said, _ = command_line(capsys, "convert", str(out), str(back), "--to", "megacl")
    assert (status, said.splitlines()[0].startswith(f"{back}: ")) == (0, True)
    assert torch.equal(logits_of_checkpoint(back, tokens), expected)
    assert load_tokenizer(back).fingerprint == ours.fingerprint
    before, after = load_lineage(list_checkpoints(trained)[-1]), load_lineage(back)
    assert after.phases == before.phases
    assert after.ids[: len(before.ids)] == before.ids
    went_out, came_back = after.events
    assert isinstance(went_out, ConversionRecord)
    assert isinstance(came_back, ConversionRecord)
    assert (went_out.from_, went_out.to, came_back.from_, came_back.to) == ("megacl", "hf", "hf", "megacl")
    assert went_out.checkpoint is not None
    assert went_out.checkpoint.id == before.id
    assert went_out.files.items() <= came_back.files.items()
    _, said, _ = command_line(capsys, "lineage", str(back))
    assert "conversion  from megacl to hf, of step-00000020" in said
    assert "conversion  from hf to megacl, of out" in said
    status, said, _ = command_line(capsys, "lineage", str(back), "--verify")
    assert (status, "missing" in said, "changed" in said) == (0, False, False)


def test_weights_that_were_changed_outside_are_noted_in_the_history_and_a_changed_history_is_refused(
    trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(trained, out, to="hf")
    tensors = load_file(out / "model.safetensors")
    save_file({name: 2 * each for name, each in tensors.items()}, out / "model.safetensors")
    convert(out, tmp_path / "back", to="megacl")
    last = load_lineage(tmp_path / "back").events[-1]
    assert isinstance(last, ConversionRecord)
    assert "what happened between is not known" in last.notes[-1]
    history = out / "megacl-lineage.json"
    history.write_text(history.read_text().replace('"seed": 0', '"seed": 1', 1))
    with pytest.raises(ConversionError, match=r"megacl-lineage.json: .* does not match its id"):
        convert(out, tmp_path / "again", to="megacl")


def test_files_saved_anew_under_other_names_are_noted_and_a_conversion_of_foreign_files_is_not(
    trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(trained, out, to="hf")
    convert(out, tmp_path / "narrow", to="hf", dtype="bfloat16")
    convert(tmp_path / "narrow", tmp_path / "back", to="megacl")
    assert [event.notes[-1:] for event in load_lineage(tmp_path / "back").events[1:]] == [(), ()]
    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    convert(out, tmp_path / "again", to="megacl")
    assert "what happened between is not known" in load_lineage(tmp_path / "again").events[-1].notes[-1]


def test_a_run_goes_on_from_a_converted_model(trained: Path, prepared: Prepared, tmp_path: Path) -> None:
    convert(trained, tmp_path / "out", to="hf")
    convert(tmp_path / "out", tmp_path / "back", to="megacl")
    tree = prepared.tree(tmp_path / "next")
    model = load([str(tmp_path / "back" / "config.yaml")]).model
    german = {**tree["phases"][1], "name": "more-german"}
    changes = {"model": vars(model), "start_from": str(tmp_path / "back"), "phases": [german]}
    assert train(load([prepared.config_file(tmp_path / "next", **changes)])) == "done"
    lineage = load_lineage(tmp_path / "next")
    assert [phase.name for phase in lineage.phases] == ["english", "german", "more-german"]
    assert [event.kind for event in lineage.events] == ["conversion", "conversion", "branch"]
    assert lineage.phases[-1].replay is not None


# ---------------------------------------------------------------------------------------------- interruptions


def test_a_destination_that_is_there_is_refused_and_nothing_is_written(
    llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "out").mkdir()
    status, _, said = command_line(capsys, "convert", str(llama), str(tmp_path / "out"), "--to", "hf")
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith(f"ConversionError: {tmp_path / 'out'}: is there already")
    for there in (".", "/"):
        status, _, said = command_line(capsys, "convert", str(llama), there, "--to", "hf")
        assert (status, said.startswith(f"ConversionError: {there}: is there already")) == (2, True)
    nowhere = str(tmp_path / "nowhere")
    status, _, said = command_line(capsys, "convert", nowhere, str(tmp_path / "new"), "--to", "hf")
    assert (status, said) == (2, f"ConversionError: {nowhere}: no such file or folder.\n")
    (tmp_path / "some").mkdir()
    status, _, said = command_line(capsys, "convert", str(tmp_path / "some"), str(tmp_path / "new"), "--to", "hf")
    assert "no model of a known format. Known are megacl: a run or checkpoint of megacl's;" in said
    for bad, option in (("5 apples", "--max-shard-size"), ("many", "--vocab-size"), ("0", "--vocab-size")):
        status, _, said = command_line(capsys, "convert", str(llama), str(tmp_path / "new"), "--to", "hf", option, bad)
        assert (status, option in said) == (2, True)
    assert left_of(tmp_path) == ["out", "some"]


def test_the_script_takes_the_same_arguments_and_says_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    arguments = [str(llama), str(tmp_path / "out"), "--to", "hf", "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *arguments])
    with pytest.raises(SystemExit) as done:
        convert_checkpoint.main()
    assert not done.value.code
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: ")
    assert convert_checkpoint.main() == 2
    assert "is there already" in capsys.readouterr().err


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


def stop_after(tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(range(tensors))
    write = staging.TensorWriter.write

    def write_or_stop(self: Any, name: str, tensor: torch.Tensor) -> None:
        if next(left, None) is None:
            raise Killed
        write(self, name, tensor)

    monkeypatch.setattr(staging.TensorWriter, "write", write_or_stop)


def test_files_that_were_done_when_a_conversion_was_stopped_are_kept_if_they_are_whole(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, hidden = tmp_path / "out", tmp_path / ".out.converting" / "files"
    with monkeypatch.context() as patch:
        stop_after(20, patch)
        with pytest.raises(Killed):
            convert(llama, out, to="hf", max_shard_size=20_000)
    assert left_of(tmp_path) == [".out.converting"]
    done = sorted(hidden.iterdir())
    assert len(done) > 3
    changed = done[0].read_bytes()
    done[0].write_bytes(changed[:-1] + bytes([changed[-1] ^ 1]))
    times = {file.name: file.stat().st_mtime_ns for file in done}
    convert(llama, out, to="hf", max_shard_size=20_000)
    again = {name for name, time in times.items() if (out / name).stat().st_mtime_ns != time}
    assert again == {done[0].name, done[-1].name}  # changed; and under way when it was stopped
    convert(llama, tmp_path / "straight", to="hf", max_shard_size=20_000)
    assert content(out) == content(tmp_path / "straight")
    assert left_of(tmp_path) == ["out", "straight"]


def test_another_conversion_to_the_same_place_begins_anew(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(20, patch)
        with pytest.raises(Killed):
            convert(llama, tmp_path / "out", to="hf", max_shard_size=20_000)
    convert(llama, tmp_path / "out", to="hf", dtype="bfloat16", max_shard_size=20_000)
    convert(llama, tmp_path / "straight", to="hf", dtype="bfloat16", max_shard_size=20_000)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_what_a_stopped_conversion_put_beside_the_tensors_is_not_published_with_another_tokenizer(
    llama: Path, small_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: Any) -> None:
        raise Killed

    options = ReadOptions(tokenizer=small_tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(hf_writing, "_check", stop)
        with pytest.raises(Killed):
            convert(llama, tmp_path / "out", to="hf", options=options, vocab_size=1024)
    assert (tmp_path / ".out.converting" / "files" / "tokenizer.model").is_file()
    convert(llama, tmp_path / "out", to="hf", vocab_size=1024)
    assert not [name for name in content(tmp_path / "out") if name.startswith("tokenizer")]


def test_a_disk_that_is_full_behind_the_tensors_is_one_line(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *given: Any, **how: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(hf_writing, "_write_json", full)
        with pytest.raises(DataError, match=r"out.converting/files: cannot write .*: no space left on the device"):
            convert(llama, tmp_path / "out", to="hf")
    assert left_of(tmp_path) == [".out.converting"]


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff\xfe{}"], ids=repr)
def test_a_damaged_generation_config_is_named(trained: Path, damage: bytes, tmp_path: Path) -> None:
    convert(trained, tmp_path / "out", to="hf")
    (tmp_path / "out" / "generation_config.json").write_bytes(damage)
    with pytest.raises(DataError, match=r"out/generation_config.json: it is not a JSON object"):
        convert(tmp_path / "out", tmp_path / "again", to="hf")


def test_what_does_not_come_back_from_the_disk_as_it_was_written_is_not_published(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = staging.TensorWriter.write

    def write_wrong(self: Any, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor + 1 if name.endswith("norm.weight") else tensor)

    monkeypatch.setattr(staging.TensorWriter, "write", write_wrong)
    with pytest.raises(ConversionError, match=r"norm.weight differs from what was read"):
        convert(llama, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_killed_at_any_moment_a_conversion_leaves_nothing_or_all(llama: Path, trained: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    convert(trained, tmp_path / "hf", to="hf")
    for number in range(9):
        source, to = ((llama, "hf"), (trained, "hf"), (tmp_path / "hf", "megacl"))[number % 3]
        out = tmp_path / f"out-{number}"
        command = [
            sys.executable,
            "-m",
            "megacl",
            "convert",
            str(source),
            str(out),
            "--to",
            to,
            "--max-shard-size",
            "30KB",
        ]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        hidden = tmp_path / f".out-{number}.converting"
        while process.poll() is None and not hidden.exists():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            with pytest.raises(ConversionError, match="is there already"):
                convert(source, out, to=to, max_shard_size=30_000)
        else:
            assert hidden.exists()
            convert(source, out, to=to, max_shard_size=30_000)
        straight = tmp_path / f"straight-{number}"
        convert(source, straight, to=to, max_shard_size=30_000)
        weights = [
            {name: each for name, each in content(each).items() if "safetensors" in name} for each in (out, straight)
        ]
        assert weights[0] == weights[1]
        assert not [name for name in left_of(tmp_path) if name.endswith((".converting", ".tmp"))]


PEAK = """
import resource, sys
from pathlib import Path
from megacl.convert.conversion import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Path(sys.argv[1]), Path(sys.argv[2]), to="hf", dtype="float32")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 2048, "dtype": torch.bfloat16}
    peaks = []
    for layers in (2, 24):
        source = saved(transformers_model("llama", num_hidden_layers=layers, **wide), tmp_path / f"source-{layers}")
        command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / f"out-{layers}")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024)
    growth = sum(file.stat().st_size for file in (tmp_path / "out-24").glob("*.safetensors"))
    growth -= sum(file.stat().st_size for file in (tmp_path / "out-2").glob("*.safetensors"))
    assert growth > 300e6
    assert peaks[1] - peaks[0] < 40e6


def test_a_file_that_goes_while_it_is_converted_is_named(llama: Path, tmp_path: Path) -> None:
    source = damaged(llama, tmp_path)
    opened = open_model(source)
    for file in opened.sources:
        file.unlink()
    with pytest.raises(ConversionError, match=rf"{opened.sources[0]}: cannot be read: No such file"):
        _ = opened.files
    with pytest.raises(ConversionError, match="cannot be read"):
        opened.read("layers.0.attention.qkv.weight")
