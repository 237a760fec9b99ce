"""Checkpoints: published whole, found by their manifest, every damage noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Prepared
from runs import OPTIMIZER, WEIGHTS, metrics, state
from safetensors.torch import load_file

from megacl.checkpoint import find_checkpoint, list_checkpoints, newest_checkpoint, open_checkpoint, verify_checkpoint
from megacl.configfile import from_tree
from megacl.errors import CheckpointError
from megacl.model.gpt import build_model
from megacl.trainer import train


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(from_tree(prepared.tree(run_dir)))
    return run_dir


def test_every_parameter_stands_whole_under_its_name_with_its_moments(run: Path) -> None:
    checkpoint = open_checkpoint(find_checkpoint(str(run), pytest.fail))
    weights = load_file(checkpoint.path / WEIGHTS)
    moments = load_file(checkpoint.path / OPTIMIZER)
    shapes = {name: tuple(p.shape) for name, p in build_model(checkpoint.config.model, seed=0).named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    assert {name: tuple(tensor.shape) for name, tensor in moments.items()} == {
        f"{key}.{name}": shape for name, shape in shapes.items() for key in ("exp_avg", "exp_avg_sq")
    }
    assert {tensor.dtype for tensor in (*weights.values(), *moments.values())} == {torch.float32}


def test_a_checkpoint_is_enough_to_use_the_model_without_the_data(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "model"
    shutil.copytree(find_checkpoint(str(run), pytest.fail), alone)
    checkpoint = open_checkpoint(find_checkpoint(str(alone), pytest.fail))
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer().encode(["Hallo"])[0]) == "Hallo"
    assert checkpoint.lineage.tokens == metrics(run, "step")[-1]["tokens"]


@pytest.mark.parametrize(
    "name",
    [WEIGHTS, OPTIMIZER, "state.json", "lineage.json", "config.yaml", "tokenizer.model"],
)
def test_one_flipped_byte_in_any_file_is_found_and_named(run: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "step-00000020"
    shutil.copytree(find_checkpoint(str(run), pytest.fail), path)
    assert verify_checkpoint(path) == []
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    assert verify_checkpoint(path) == [f"{path / name}: its content has changed (XXH3)"]


def test_missing_and_truncated_files_and_manifests_are_named(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000020"
    shutil.copytree(find_checkpoint(str(run), pytest.fail), path)
    size = (path / WEIGHTS).stat().st_size
    with open(path / WEIGHTS, "r+b") as file:
        file.truncate(size - 1)
    (path / "lineage.json").unlink()
    assert verify_checkpoint(path) == [
        f"{path / 'lineage.json'}: missing",
        f"{path / WEIGHTS}: has {size - 1} bytes of {size}",
    ]
    (path / "manifest.json").write_text("{")
    assert "manifest.json: cannot be read" in verify_checkpoint(path)[0]
    (path / "manifest.json").write_text(json.dumps({"format": "other", "version": 9, "files": {}}))
    assert "made in format other 9" in verify_checkpoint(path)[0]


def test_the_newest_good_checkpoint_is_found_whatever_lies_beside_it(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    good = list_checkpoints(copy)[-1]
    (copy / "checkpoints" / ".step-00000099.0123456789abcdef.tmp").mkdir()  # a save that was killed
    shutil.copytree(good, copy / "checkpoints" / "step-00000099")
    (copy / "checkpoints" / "step-00000099" / "manifest.json").unlink()
    shutil.copytree(good, copy / "checkpoints" / "step-00000098")
    (copy / "checkpoints" / "step-00000098" / "state.json").unlink()
    warnings: list[str] = []
    assert newest_checkpoint(copy, warnings.append) == good
    assert len(warnings) == 2
    assert "step-00000099/manifest.json: cannot be read" in warnings[0]
    assert "step-00000098/state.json: missing" in warnings[1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{tmp}/nothing", "no such run or checkpoint; name a run directory"),
        ("{tmp}", "holds no checkpoint; name a run directory"),
        ("{run}@french", "no checkpoint ends a phase 'french'; finished: english, german."),
        ("{run}@11", "has no checkpoint at step 11; it has 10, 12, 15, 20."),
        ("{tmp}/nothing@english", "holds no checkpoint, so there is none at 'english'"),
    ],
)
def test_a_reference_to_what_is_not_there_says_what_is(run: Path, tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(reference.format(tmp=tmp_path, run=run), pytest.fail)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step-00000012" / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="this checkpoint is damaged"):
        find_checkpoint(f"{copy}@english", pytest.fail)


def test_a_damaged_phase_end_is_no_hindrance_to_finding_another(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step-00000012" / "lineage.json").write_text("{")
    assert find_checkpoint(f"{copy}@german", pytest.fail).name == "step-00000020"
    assert find_checkpoint(f"{copy}@15", pytest.fail).name == "step-00000015"


def test_a_damaged_newest_checkpoint_of_a_run_is_named_and_the_newest_good_one_taken(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step-00000020" / WEIGHTS).write_bytes(b"")
    warnings: list[str] = []
    assert find_checkpoint(str(copy), warnings.append).name == "step-00000015"
    assert f"step-00000020/{WEIGHTS}: has 0 bytes" in warnings[0]


def test_saving_the_same_run_twice_gives_the_same_tensors(prepared: Prepared, run: Path, tmp_path: Path) -> None:
    train(from_tree(prepared.tree(tmp_path / "again")))
    for one, other in zip(list_checkpoints(run), list_checkpoints(tmp_path / "again"), strict=True):
        assert state(one) == state(other)
