"""The command line as a user meets it: what it prints, its exit status, and one line for each bad input."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prepared, write_documents
from runs import command_line, start

from megacl import checkpoint
from megacl.config import EngineConfig
from megacl.configfile import from_tree
from megacl.engine import Engine, build_engine
from megacl.trainer import train

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(from_tree(prepared.tree(run_dir)))
    return run_dir


def refusal(capsys: Capture, *arguments: str) -> str:
    """The one line of an error that the user can put right."""
    status, _, err = command_line(capsys, *arguments)
    lines = err.strip().splitlines()
    assert status == 2
    assert "Traceback" not in err
    assert lines[-1].split(":")[0] in ("ConfigError", "DataError", "CheckpointError", "LaunchError")
    return lines[-1]


# ---------------------------------------------------------------------------------------------- what it prints


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from megacl.cli import app; "
        "heavy = {'torch', 'numpy', 'pyarrow', 'pydantic', 'deepspeed', 'sentencepiece', 'plotly'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run([sys.executable, "-m", "megacl", "--help"], capture_output=True, text=True, check=True)
    for verb in ("prepare", "train", "evaluate", "lineage", "sample", "report", "data"):
        assert verb in done.stdout


def test_prepare_says_what_it_made_and_a_second_call_changes_nothing(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "english"
    call = ["prepare", str(prepared.documents["english"]), "--tokenizer", str(prepared.tokenizer)]
    status, printed, _ = command_line(capsys, *call, "--out", str(out), "--validation", "0.2")
    assert status == 0
    assert "generation 1, 160 documents" in printed
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert command_line(capsys, *call, "--out", str(out), "--validation", "0.2")[0] == 0
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
    assert command_line(capsys, "data", "verify", str(out)) == (0, f"{out}: every shard is as its manifest says\n", "")


def test_a_damaged_shard_is_found_by_verify_and_by_training(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    english = tmp_path / "english"
    shutil.copytree(prepared.sources["english"], english)
    shard = english / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    status, out, _ = command_line(capsys, "data", "verify", str(english))
    assert status == 2
    assert str(shard) in out
    shard.write_bytes(content[:-8])
    config = prepared.config_file(
        tmp_path / "run",
        sources={"english": {"path": str(english)}, "german": {"path": str(prepared.sources["german"])}},
    )
    assert "train-00000.arrow" in refusal(capsys, "train", config)


def test_evaluate_prints_each_source_and_what_was_forgotten(run: Path, prepared: Prepared, capsys: Capture) -> None:
    status, out, _ = command_line(capsys, "evaluate", str(run))
    assert status == 0
    assert "source" in out
    assert out.count("forgetting") == 4  # a column and a row in each of both units
    status, out, _ = command_line(capsys, "evaluate", f"{run}@english", "--json")
    found = json.loads(out)
    assert set(found["sources"]) == {"english"}  # all that the model had seen by then
    assert [row["label"] for row in found["matrix"]["loss"]["phases"]] == ["before", "english"]
    status, out, _ = command_line(capsys, "evaluate", str(run), "--data", str(prepared.sources["german"]), "--json")
    assert set(json.loads(out)["sources"]) == {"german"}


def test_evaluate_writes_its_json_to_a_file_beside_the_table(run: Path, tmp_path: Path, capsys: Capture) -> None:
    _, expected, _ = command_line(capsys, "evaluate", f"{run}@english", "--json")
    file = tmp_path / "evaluations" / "english.json"
    status, out, _ = command_line(capsys, "evaluate", f"{run}@english", "--out", str(file))
    assert status == 0
    assert "bits/byte" in out
    assert file.read_text() == expected
    assert list(file.parent.iterdir()) == [file]
    for nowhere in (tmp_path, file / "english.json"):
        assert "no file can be written" in refusal(capsys, "evaluate", str(run), "--out", str(nowhere))


def test_evaluate_keeps_two_folders_of_one_name_apart_and_refuses_what_it_cannot_evaluate(
    run: Path, prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    twin = tmp_path / "german"
    shutil.copytree(prepared.sources["german"], twin)
    german = str(prepared.sources["german"])
    _, out, _ = command_line(capsys, "evaluate", str(run), "--data", german, "--data", str(twin), "--json")
    assert set(json.loads(out)["sources"]) == {german, str(twin)}
    nothing = tmp_path / "nothing"
    call = ("prepare", str(prepared.documents["german"]), "--tokenizer", str(prepared.tokenizer))
    command_line(capsys, *call, "--out", str(nothing), "--validation", "0")
    assert "no held-out documents" in refusal(capsys, "evaluate", str(run), "--data", str(nothing))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_cpu_a_checkpoint_is_evaluated_in_fp32_and_not_compiled_whatever_it_was_trained_in(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained_on_a_gpu(path: Path) -> checkpoint.Checkpoint:
        found = open_checkpoint(path)
        engine = dataclasses.replace(found.config.engine, precision="bf16", compile=True)
        return dataclasses.replace(found, config=dataclasses.replace(found.config, engine=engine))

    def build(*arguments: Any, engine: EngineConfig, **others: Any) -> Engine:
        built.append(engine)
        return build_engine(*arguments, engine=engine, **others)

    built: list[EngineConfig] = []
    open_checkpoint = checkpoint.open_checkpoint
    _, expected, _ = command_line(capsys, "evaluate", str(run), "--json")
    monkeypatch.setattr(checkpoint, "open_checkpoint", trained_on_a_gpu)
    monkeypatch.setattr("megacl.inference.build_engine", build)
    assert command_line(capsys, "evaluate", str(run), "--json")[1] == expected
    assert [(engine.precision, engine.compile) for engine in built] == [("fp32", False)]


def test_lineage_is_text_or_json(run: Path, capsys: Capture) -> None:
    status, out, _ = command_line(capsys, "lineage", str(run))
    assert status == 0
    assert "phase 1  german" in out
    assert "24 sequences (768 tokens) of phase english" in out
    _, out, _ = command_line(capsys, "lineage", f"{run}@english", "--json")
    assert [phase["name"] for phase in json.loads(out)["phases"]] == ["english"]


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    config = prepared.config_file(tmp_path / "run")
    status, out, _ = command_line(capsys, "train", config, "--dry-run")
    assert status == 0
    assert "phases[1] german: 3,072 tokens = 8 steps x 12 sequences x 32" in out
    assert "replay: 1/4 of all samples" in out
    assert "replays 768 tokens of phase english" in out
    assert "0.0025 at the first update, 0.005 at the highest, 0.0005 at the last" in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_a_rank_takes(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    config = prepared.config_file(tmp_path / "run", engine={"kind": "deepspeed", "zero_stage": 2, "tensor_parallel": 2})
    status, out, _ = command_line(capsys, "train", config, "--dry-run", "--ranks", "4")
    assert status == 0
    assert "memory on each of 4 ranks, in phase english:" in out
    assert re.search(r"\n  total +[0-9.]+ +[0-9.]+ ", out)
    assert re.search(r"[0-9.]+ GB at most \(\w+\), without Python and its libraries; this \w+ has [0-9.]+ GB", out)


def test_a_dry_run_says_what_saves_keep_in_memory(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    config = prepared.config_file(tmp_path / "run", engine={"kind": "deepspeed", "zero_stage": 1})
    status, out, _ = command_line(capsys, "train", config, "model.vocab_size=1000000", "--dry-run", "--ranks", "2")
    assert status == 0
    # Embedding and head of width 32, almost all of the model: 64M parameters; weights and two moments; two ranks.
    assert "\n  and 0.38 GB of its memory, from which checkpoints are written\n" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_plans_for_a_gpu_that_is_not_here(
    prepared: Prepared, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = prepared.config_file(tmp_path / "run", engine={"kernels": {"swiglu": "triton"}, "precision": "bf16"})
    status, out, _ = command_line(capsys, "train", config, "--dry-run", "--device", "cuda")
    assert status == 0
    assert re.search(r"[0-9.]+ GB at most \(\w+\), without Python and its libraries\n", out)
    status, out, err = command_line(capsys, "train", config, "--dry-run", "--device", "cpu")
    assert (status, out) == (2, "")
    assert "engine.kernels.swiglu is 'triton', which cannot run here" in err


@pytest.mark.parametrize("options", [[], ["--dry-run", "--device", "cpu"]])
@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("{kernels: {swilu: triton}}", "engine.kernels names 'swilu', which is no op"),
        ("{kernels: {swiglu: tritn}}", "engine.kernels.swiglu is 'tritn'; it must be one of"),
        ("{kind: deepspeed, precision: fp16}", "engine.precision is fp16, which DeepSpeed does not run on this device"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_before_data_is_looked_at(
    prepared: Prepared,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    engine: str,
    said: str,
) -> None:
    if "fp16" in engine:
        if torch.cuda.is_available():
            pytest.skip("a GPU computes in fp16")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        accelerator = pytest.importorskip("deepspeed").get_accelerator()
        monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)  # some CPUs do
    config = prepared.config_file(tmp_path / "run")
    nowhere = "sources.english.path=nowhere"
    status, out, err = command_line(capsys, "train", config, f"engine={engine}", nowhere, *options)
    assert (status, out) == (2, "")
    assert said in err


@pytest.mark.parametrize(
    ("engine", "options", "said"),
    [
        ({"kind": "deepspeed", "tensor_parallel": 2}, ["--dry-run", "--ranks", "3"], "the number of ranks is 3"),
        ({}, ["--dry-run", "--ranks", "2"], "engine.kind is native, which runs on one rank, and there are 2"),
        ({"kind": "deepspeed"}, ["--dry-run", "--ranks", "5"], "data-parallel size 5"),
        ({}, ["--ranks", "2"], "--ranks goes with --dry-run"),
        ({}, ["--device", "cuda"], "--device goes with --dry-run"),
    ],
)
def test_ranks_that_cannot_share_a_run_are_refused_by_a_dry_run(
    prepared: Prepared, tmp_path: Path, capsys: Capture, engine: dict[str, Any], options: list[str], said: str
) -> None:
    config = prepared.config_file(tmp_path / "run", engine=engine)
    status, _, err = command_line(capsys, "train", config, *options)
    assert status == 2
    assert said in err
    assert "Traceback" not in err


def test_sources_that_hold_out_different_parts_are_named_before_a_run(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    from megacl.data.prepare import prepare
    from megacl.data.tokenizer import load_tokenizer

    equal = prepared.config_file(tmp_path / "equal")
    assert "hold out different parts" not in command_line(capsys, "train", equal, "--dry-run")[1]
    other = tmp_path / "german"
    documents = str(prepared.documents["german"])
    prepare([documents], tokenizer=load_tokenizer(prepared.tokenizer), out=other, validation=0.3)
    sources = {"english": {"path": str(prepared.sources["english"])}, "german": {"path": str(other)}}
    config = prepared.config_file(tmp_path / "run", sources=sources)
    said = "warning: the sources hold out different parts of their documents (english 0.2, german 0.3): one that two"
    assert said in command_line(capsys, "train", config, "--dry-run")[1]


def test_a_dry_run_takes_the_rate_to_go_on_from_also_where_data_is_not_prepared(
    run: Path, prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    sources = {"new": {"path": str(tmp_path / "new"), "documents": [str(prepared.documents["german"])]}}
    phases = [
        {"name": "next", "mixture": {"new": 1}, "steps": 2, "schedule": {"kind": "constant", "max_lr": "last"}},
    ]
    config = prepared.config_file(
        tmp_path / "run", sources=sources, phases=phases, tokenizer={"path": str(prepared.tokenizer)}
    )
    status, out, _ = command_line(capsys, "train", config, f"start_from={run}", "--dry-run")
    assert status == 0
    assert "source new: not prepared yet" in out
    assert "schedule constant: 0.0005 at the first update" in out


def test_a_long_override_is_no_file_name(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    config = prepared.config_file(tmp_path / "run")
    schedule = "{kind: cosine, max_lr: 1e-3}"
    phases = ", ".join(f"{{name: p{n}, mixture: {{english: 1}}, steps: 2, schedule: {schedule}}}" for n in range(5))
    assert command_line(capsys, "train", config, f"phases=[{phases}]", "--dry-run")[0] == 0


def test_the_shipped_models_resolve_with_a_recipe_on_top(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    config = prepared.config_file(tmp_path / "run")
    status, out, _ = command_line(capsys, "train", config, "model/405m.yaml", "--dry-run")
    assert status == 0
    assert "405,334,016 parameters" in out


# ---------------------------------------------------------------------------------------------- bad input: documents


def prepare_refusal(capsys: Capture, prepared: Prepared, tmp_path: Path, *inputs: str, more: Any = ()) -> str:
    out = tmp_path / "out"
    line = refusal(capsys, "prepare", *inputs, "--tokenizer", str(prepared.tokenizer), "--out", str(out), *more)
    assert not (out / "manifest.json").exists(), "nothing is half published"
    return line


def texts(count: int) -> list[str]:
    return [f"Document number {number} is about nothing in particular." for number in range(count)]


def test_a_missing_file_is_named(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    assert f"{tmp_path}/gone.jsonl" in prepare_refusal(capsys, prepared, tmp_path, f"{tmp_path}/gone.jsonl")


def test_an_empty_file_is_named(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert str(empty) in prepare_refusal(capsys, prepared, tmp_path, str(empty))


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b'{"text": "unfinished\n', "JSON"),
        (b'{"body": "no text"}\n', "text"),
        (b'{"text": 5}\n', "text"),
        (b'{"text": "caf\xe9"}\n', "UTF-8"),
        (b"[1, 2]\n", ""),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_can_be_left_out(
    prepared: Prepared, tmp_path: Path, capsys: Capture, bad: bytes, what: str
) -> None:
    path = write_documents(tmp_path / "raw.jsonl", texts(100))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:41], bad, *lines[41:]]))
    line = prepare_refusal(capsys, prepared, tmp_path, str(path), more=("--validation", "0.5"))
    assert str(path) in line
    assert "42" in line
    assert what in line
    status, out, _ = command_line(
        capsys,
        "prepare",
        str(path),
        "--tokenizer",
        str(prepared.tokenizer),
        "--out",
        str(tmp_path / "out"),
        "--validation",
        "0.5",
        "--skip-bad",
    )
    assert status == 0
    assert "100 documents" in out
    assert "1 bad lines" in out


def test_an_encoding_that_does_not_exist_is_named(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    path = write_documents(tmp_path / "raw.jsonl", texts(10))
    line = prepare_refusal(capsys, prepared, tmp_path, str(path), more=("--encoding", "utf9"))
    assert "encoding is 'utf9', which Python does not know; did you mean utf" in line


def test_the_reading_of_inputs_can_be_told_on_the_command_line(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "raw.txt").write_bytes("eins\n\nzwe\xef\n".encode("latin-1"))
    call = ["prepare", f"{tmp_path}/*.txt", "--tokenizer", str(prepared.tokenizer), "--out", str(tmp_path / "out")]
    more = ["--validation", "0", "--encoding", "latin-1", "--normalize", "nfc", "--text", "paragraphs"]
    status, out, _ = command_line(capsys, *call, *more)
    assert status == 0
    assert "2 documents" in out
    assert "9 bytes of text" in out


def test_too_few_held_out_documents_are_an_error_unless_none_are_asked_for(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    path = write_documents(tmp_path / "raw.jsonl", texts(100))
    line = prepare_refusal(capsys, prepared, tmp_path, str(path))
    assert "20" in line
    assert "validation" in line
    out = ("--out", str(tmp_path / "out"))
    call = ("prepare", str(path), "--tokenizer", str(prepared.tokenizer), *out, "--validation", "0")
    assert command_line(capsys, *call)[0] == 0


def test_a_tokenizer_that_is_not_there_is_named(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    call = ("prepare", str(prepared.documents["english"]), "--tokenizer", f"{tmp_path}/none.model")
    assert f"{tmp_path}/none.model" in refusal(capsys, *call, "--out", str(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------- bad input: runs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["phases[1].replay.share=1.2"], "phases[1].replay.share is 1.2; it must be less than 1."),
        (["phases[0].schedule.warmup=13 steps"], "phases[0].schedule is longer than its phase"),
        (["engine.micro_batch_size=5"], "it must be a multiple of engine.micro_batch_size, 5."),
        (["phases[0].schedul.max_lr=1"], "phases[0].schedul is not a setting; did you mean phases[0].schedule?"),
        (["sources.english.path=nowhere"], "nowhere"),
        (["sources.english.generation=7"], "generation"),
        (["seq_length=100000"], "too few for one sequence of 100000"),
        (["start_from=nowhere"], "nowhere: no such run or checkpoint"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_one_line(
    prepared: Prepared, tmp_path: Path, capsys: Capture, overrides: list[str], message: str
) -> None:
    config = prepared.config_file(tmp_path / "run")
    assert message in refusal(capsys, "train", config, *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in tf32")
def test_a_run_begins_with_what_is_to_be_known_of_its_precision(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    config = prepared.config_file(tmp_path / "run")
    _, _, err = command_line(capsys, "train", config, "engine.precision=tf32")
    assert "\nwarning: engine.precision tf32 changes nothing on a CPU: it computes in fp32.\n" in err


def test_a_run_directory_of_another_configuration_is_refused(run: Path, prepared: Prepared, capsys: Capture) -> None:
    config = prepared.config_file(run)
    assert "holds a run with seed 0, and this configuration has 3" in refusal(capsys, "train", config, "seed=3")


def test_a_tokenizer_that_does_not_match_the_shards_is_refused(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    from megacl.data.tokenizer_training import train_tokenizer

    other = train_tokenizer([str(prepared.documents["german"])], tmp_path / "other.model", 500)
    config = prepared.config_file(tmp_path / "run", tokenizer={"path": str(other.file)})
    line = refusal(capsys, "train", config)
    assert "was prepared with tokenizer" in line
    assert other.fingerprint[:12] in line


def test_a_token_beyond_the_vocabulary_is_refused(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    """A folder whose manifest promises a smaller vocabulary than its shards keep."""
    from megacl.data.manifest import read_manifest
    from megacl.data.tokenizer_training import train_tokenizer

    small = train_tokenizer([str(prepared.documents["german"])], tmp_path / "small.model", 400)
    english = tmp_path / "english"
    shutil.copytree(prepared.sources["english"], english)
    assert read_manifest(english).tokenizer.vocab_size == 600
    manifest = json.loads((english / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] = 400
    (english / "manifest.json").write_text(json.dumps(manifest))
    extends = small.file.with_name(f"{small.file.name}.extends.json")
    record = {"tokenizer": small.fingerprint, "extends": [manifest["tokenizer"]["fingerprint"]]}
    extends.write_text(json.dumps(record))
    config = prepared.config_file(
        tmp_path / "run",
        sources={"english": {"path": str(english)}},
        tokenizer={"path": str(small.file)},
        phases=prepared.tree(tmp_path)["phases"][:1],
    )
    line = refusal(capsys, "train", config, "model.vocab_size=400")
    assert "holds token id" in line
    assert "vocab_size is 400" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_no_space_left_for_a_checkpoint_is_one_line_and_leaves_nothing_half_written(
    prepared: Prepared, small_disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = prepared.config_file(tmp_path / "run")
    line = refusal(capsys, "train", config, f"run_dir={small_disk}/run")
    assert "no space left on the device" in line
    assert [path.name for path in (small_disk / "run").rglob("step-*")] == []
    assert list((small_disk / "run").rglob("*.tmp")) == []


def test_no_space_left_for_shards_is_one_line_and_publishes_nothing(
    prepared: Prepared, small_disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    raw = write_documents(tmp_path / "raw.jsonl", [f"{text} " * 100 for text in texts(200)])
    call = ("prepare", str(raw), "--tokenizer", str(prepared.tokenizer), "--out", str(small_disk / "out"))
    assert "no space left on the device" in refusal(capsys, *call, "--validation", "0.2")
    assert not (small_disk / "out" / "manifest.json").exists()


def test_a_bad_configuration_on_several_ranks_is_said_once(prepared: Prepared, tmp_path: Path) -> None:
    config = prepared.config_file(tmp_path / "run")
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    process = start("train", config, "global_batch_size=7", "engine.kind=deepspeed", launcher=launcher)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in err.splitlines() if "ConfigError" in line]
    assert lines == [
        "ConfigError: global_batch_size of phases[0] is 7, micro batch 3.5 x accumulation 1 x data-parallel size 2; "
        "all of them must be whole numbers, so change it, engine.micro_batch_size or the number of ranks."
    ]


@pytest.mark.parametrize(("world", "ended"), [("1", True), ("2", False)])
def test_a_rank_of_several_ends_with_its_status_and_all_its_output_but_not_the_interpreters_way(
    world: str, ended: bool
) -> None:
    """Threads that C++ has left would abort a process whose interpreter is ending."""
    code = (
        "import atexit, os, runpy, sys; atexit.register(os.write, 1, b'the interpreter ends'); "
        "sys.argv[0] = 'megacl'; runpy.run_module('megacl', run_name='__main__')"
    )
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": world}
    for arguments, status, said in ((["--help"], 0, "Usage"), (["evaluate", "nothing-here"], 2, "Error: ")):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == status
        assert said in done.stdout + done.stderr
        assert ("the interpreter ends" in done.stdout) == ended
