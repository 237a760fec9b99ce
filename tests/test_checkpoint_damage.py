"""Damage to a checkpoint is found, whatever file it is in and wherever: flipped bytes, cut files, missing ones."""

import errno
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import Prepared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacl import checkpoint_files
from megacl.checkpoint import find_checkpoint, list_checkpoints, newest_checkpoint, verify_checkpoint
from megacl.configfile import from_tree
from megacl.errors import CheckpointError
from megacl.lineage import load_lineage
from megacl.tensorfile import FileFacts
from megacl.trainer import train


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with Reptile, so that every kind of file there is lies in its first checkpoint, between two moves."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    tree = prepared.tree(run_dir, checkpoint={"every_steps": 3, "keep_last": None}, evaluation={"sequences": 2})
    tree["phases"] = [{**tree["phases"][0], "steps": 5, "reptile": {"every_steps": 2, "epsilon": 0.5}}]
    train(from_tree(tree))
    return run_dir


@pytest.fixture(scope="module")
def damaged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the first checkpoint, which each test damages and puts right again."""
    path = tmp_path_factory.mktemp("damaged") / list_checkpoints(run)[0].name
    shutil.copytree(list_checkpoints(run)[0], path)
    assert verify_checkpoint(path) == []
    return path


def files_of(checkpoint: Path) -> list[Path]:
    files = sorted(checkpoint.iterdir())
    kinds = {file.name.split(".")[0].split("-")[0] for file in files}
    assert {"weights", "optimizer", "reptile", "state", "lineage", "config", "tokenizer", "manifest"} <= kinds
    return files


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_is_found_in_every_file_at_every_place(damaged: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(files_of(damaged)))
    content = file.read_bytes()
    offset = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[offset] ^= data.draw(st.integers(1, 255))
    file.write_bytes(changed)
    try:
        problems = verify_checkpoint(damaged)
    finally:
        file.write_bytes(content)
    assert problems, f"{file.name}, byte {offset}: {content[offset]} became {changed[offset]}"
    if file.name != "manifest.json":
        assert problems == [f"{file}: its content has changed (XXH3)"]


def test_a_manifest_that_says_the_same_in_other_bytes_is_damaged(damaged: Path) -> None:
    """A flip may make one space of another, which JSON does not mind."""
    file = damaged / "manifest.json"
    content = file.read_bytes()
    places = [offset for offset, byte in enumerate(content) if byte in b" \n"]
    for offset in places[:5] + places[-5:]:
        file.write_bytes(content[:offset] + b"\t" + content[offset + 1 :])
        (problem,) = verify_checkpoint(damaged)
        assert problem == f"{file}: its content has changed"
    file.write_bytes(content)


def test_every_file_that_is_cut_short_or_longer_or_missing_is_named(damaged: Path) -> None:
    for file in files_of(damaged):
        content = file.read_bytes()
        for changed in (b"", content[:1], content[: len(content) // 2], content[:-1], content + b"\n"):
            file.write_bytes(changed)
            (problem,) = verify_checkpoint(damaged)
            assert str(file) in problem
        file.unlink()
        (problem,) = verify_checkpoint(damaged)
        assert str(file) in problem
        file.write_bytes(content)
    assert verify_checkpoint(damaged) == []


@pytest.mark.parametrize("pointer", ["latest", "latest.txt", "step-latest"])
def test_no_file_that_points_to_a_checkpoint_is_trusted(run: Path, tmp_path: Path, pointer: str) -> None:
    """What is there is found by its manifest: a pointer of another program's kind means nothing."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    good, newest = list_checkpoints(copy)[-2:]
    for place in (copy, copy / "checkpoints"):
        (place / pointer).write_text(newest.name)
    (copy / "checkpoints" / "latest-link").symlink_to(newest.name)
    (newest / "state.json").write_text("{}")
    warnings: list[str] = []
    assert newest_checkpoint(copy, warnings.append) == good
    assert find_checkpoint(str(copy), warnings.append) == good
    with pytest.raises(CheckpointError, match="no checkpoint ends a phase 'latest'"):
        find_checkpoint(f"{copy}@latest", warnings.append)


def test_a_file_that_the_disk_cannot_read_is_damaged(run: Path, tmp_path: Path) -> None:
    """A lost sector is an error of the call that reads, not a file of another size or hash."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    good, newest = list_checkpoints(copy)[-2:]
    original = checkpoint_files.facts_of

    def read(path: Path) -> FileFacts:
        if path.parent == newest and path.name.startswith("weights"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path)

    warned: list[str] = []
    with patch.object(checkpoint_files, "facts_of", read):
        assert newest_checkpoint(copy, warned.append) == good
    (line,) = warned
    assert line.endswith("weights-00000-of-00001.safetensors: cannot be read: Input/output error")
    (newest / "lineage.json").unlink()
    (newest / "lineage.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_lineage(newest)
