"""Saves that are written while training goes on: when they appear, and what becomes of those that fail."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from conftest import Prepared
from runs import last_state, losses, metrics, to_save

from megacl import saves, saving, trainer
from megacl.checkpoint import (
    RunState,
    find_checkpoint,
    list_checkpoints,
    open_checkpoint,
    step_of,
    verify_checkpoint,
)
from megacl.config import RunConfig
from megacl.configfile import from_tree
from megacl.errors import DataError, DivergedError
from megacl.lineage import load_lineage
from megacl.parallel.ranks import Ranks
from megacl.trainer import train
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def tree(prepared: Prepared, run_dir: Path, **checkpoint: Any) -> RunConfig:
    return from_tree(prepared.tree(run_dir, checkpoint={"every_steps": 5, "keep_last": None, **checkpoint}))


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that saves at 5, 10, 12 (where its first phase ends), 15 and 20."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(tree(prepared, run_dir))
    return run_dir


@contextlib.contextmanager
def writing(before: Callable[[Path], None]) -> Iterator[None]:
    """Calls `before`, in the thread that writes, where a checkpoint's tensors are going to be written."""
    original = saving.write_tensors

    def write(folder: Path, *arguments: Any) -> Any:
        before(folder)
        return original(folder, *arguments)

    saving.write_tensors = write
    try:
        yield
    finally:
        saving.write_tensors = original


@contextlib.contextmanager
def behind_each_step(do: Callable[[Any], None]) -> Iterator[None]:
    original = trainer._Run._step

    def step(run: Any, *arguments: Any, **more: Any) -> None:
        original(run, *arguments, **more)
        do(run)

    trainer._Run._step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        trainer._Run._step = original  # type: ignore[method-assign]


def steps_in(run_dir: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run_dir)]


def nothing_is_left(run_dir: Path) -> bool:
    return not list((run_dir / "checkpoints").glob(".*.tmp"))


def test_training_goes_on_while_a_save_is_written_and_what_is_saved_is_the_step_it_began_at(
    prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    """The save of step 5 may be written only behind step 8: until then it is not seen, and nor is its lineage."""
    run_dir, go = tmp_path / "run", threading.Event()
    seen: dict[int, tuple[list[int], int]] = {}

    def look(run: Any) -> None:
        seen[run.step] = steps_in(run_dir), load_lineage(run_dir).phases[-1].samples
        if run.step == 8:
            go.set()

    with writing(lambda folder: go.wait(60) and None), behind_each_step(look):
        train(tree(prepared, run_dir))
    assert [seen[step] for step in (6, 7, 8)] == [([], 0)] * 3
    assert seen[11] == ([5, 10], 120) or seen[11] == ([5], 60)
    assert steps_in(run_dir) == steps_in(whole) == [5, 10, 12, 15, 20]
    assert last_state(run_dir) == last_state(whole)
    assert losses(run_dir) == losses(whole)
    for path, other in zip(list_checkpoints(run_dir), list_checkpoints(whole), strict=True):
        assert (path / "index.json").read_bytes() == (other / "index.json").read_bytes()
    records = metrics(run_dir, "save")
    assert [(record["step"], record["error"]) for record in records] == [(step, None) for step in (5, 10, 12, 15, 20)]
    assert all(record["bytes"] > 0 and record["waited"] > 0 and record["seconds"] > 0 for record in records)


def test_told_to_stop_a_run_publishes_the_save_under_way_and_then_saves_where_it_stands(
    prepared: Prepared, tmp_path: Path
) -> None:
    run_dir, go = tmp_path / "run", threading.Event()

    def stop(run: Any) -> None:
        if run.step == 7:
            signal.raise_signal(signal.SIGUSR1)
            threading.Timer(0.3, go.set).start()

    with writing(lambda folder: go.wait(60) and None), behind_each_step(stop):
        assert train(tree(prepared, run_dir)) == "stopped"
    assert steps_in(run_dir) == [5, 7]
    assert all(verify_checkpoint(path) == [] for path in list_checkpoints(run_dir))
    assert open_checkpoint(list_checkpoints(run_dir)[-1]).state.back_to == 5
    assert nothing_is_left(run_dir)


def test_a_phase_end_is_published_before_the_next_phase_begins(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    seen: dict[int, bool] = {}
    with (
        writing(lambda folder: threading.Event().wait(0.2) and None),
        behind_each_step(lambda run: seen.update({run.step: 12 in steps_in(run_dir)})),
    ):
        train(tree(prepared, run_dir))
    assert (seen[12], seen[13]) == (False, True)


def refusing(*which: int) -> Callable[[Path], None]:
    """Has no space for the saves of those numbers, the first being 1."""
    count = iter(range(1, 100))

    def refuse(folder: Path) -> None:
        if next(count) in which:
            (folder / "weights-half").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return refuse


def test_a_save_that_fails_is_said_and_recorded_and_the_next_one_tries_again(
    prepared: Prepared, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with writing(refusing(2, 3)):
        assert train(tree(prepared, run_dir, keep_last=1)) == "done"
    assert steps_in(run_dir) == [15, 20]
    assert last_state(run_dir) == last_state(whole)
    assert losses(run_dir) == losses(whole)
    assert nothing_is_left(run_dir)
    failed = [record for record in metrics(run_dir, "save") if record["error"]]
    assert [record["step"] for record in failed] == [10, 12]
    assert "no space left on the device" in failed[0]["error"]
    warned = capsys.readouterr().err
    assert "warning: step 10 is not saved: " in warned
    assert "this was 2" in warned


def test_what_a_disk_kept_of_a_failed_save_goes_when_it_lets_go(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, delete = tmp_path / "run", saving.shutil.rmtree
    kept: list[str] = []

    def refuse_once(folder: Path, **how: Any) -> None:
        if ".tmp" in str(folder) and not kept:
            kept.append(str(folder))  # as a file system does that is read-only for a while
        else:
            delete(folder, **how)

    monkeypatch.setattr(saving.shutil, "rmtree", refuse_once)
    with writing(refusing(2)):
        assert train(tree(prepared, run_dir)) == "done"
    assert len(kept) == 1
    assert nothing_is_left(run_dir)


def test_what_failed_is_no_place_to_go_back_to_and_costs_no_older_one(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def stop(run: Any) -> None:
        if run.step == 11:
            signal.raise_signal(signal.SIGUSR1)

    with writing(refusing(2)), behind_each_step(stop):
        train(tree(prepared, run_dir, keep_last=1))
    assert steps_in(run_dir) == [5, 11]
    assert open_checkpoint(list_checkpoints(run_dir)[-1]).state.back_to == 5


def test_three_saves_in_a_row_that_fail_end_the_run(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with writing(refusing(2, 3, 4)), pytest.raises(DataError) as caught:
        train(tree(prepared, run_dir))
    assert str(caught.value).startswith("3 saves in a row have failed, at last: ")
    assert "no space left on the device" in str(caught.value)
    assert steps_in(run_dir) == [5]
    assert nothing_is_left(run_dir)
    assert train(tree(prepared, run_dir)) == "done"


def test_a_run_whose_last_save_fails_is_not_done(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with (
        writing(refusing(5)),
        pytest.raises(DataError, match=r"step-00000020: cannot write .* no space left"),
    ):
        train(tree(prepared, run_dir))
    assert steps_in(run_dir) == [5, 10, 12, 15]
    assert nothing_is_left(run_dir)
    assert train(tree(prepared, run_dir)) == "done"
    assert last_state(run_dir) == last_state(whole)


def test_a_phase_end_that_could_not_be_saved_is_not_saved_with_what_the_next_phase_made_of_it(
    prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    """Told to stop where the second phase has set the moments to zero, and no step is taken yet."""
    run_dir = tmp_path / "run"
    original = trainer.take_over

    def stop(engine: Any, record: Any) -> Any:
        if record.name == "german":
            signal.raise_signal(signal.SIGUSR1)
        return original(engine, record)

    with (
        writing(refusing(3)),
        patch.object(trainer, "take_over", stop),
        pytest.raises(DataError, match=r"step-00000012: cannot write .* no space left"),
    ):
        train(tree(prepared, run_dir))
    assert steps_in(run_dir) == [5, 10]
    assert train(tree(prepared, run_dir)) == "done"
    assert last_state(run_dir) == last_state(whole)
    assert load_lineage(run_dir).phases[-1].optimizer_state == load_lineage(whole).phases[-1].optimizer_state


def test_a_disk_that_does_not_answer_is_spoken_of(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        writing(lambda folder: threading.Event().wait(0.5) and None),
        patch.object(saves, "_PATIENCE", 0.1),
    ):
        train(tree(prepared, tmp_path / "run", every_steps=10))
    assert "warning: step 20: its save is waited for, 0 s by now; is the disk there?" in capsys.readouterr().err


def test_the_disk_has_the_records_up_to_a_checkpoint_before_it_is_published(prepared: Prepared, tmp_path: Path) -> None:
    """What was not synced is lost in a power cut."""
    run_dir = tmp_path / "run"
    synced: dict[int, bytes] = {}
    missing: list[str] = []
    fsync, rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name == run_dir / "metrics.jsonl":
            synced[0] = name.read_bytes()

    def publish(old: Path, new: Path) -> None:
        if Path(new).name.startswith("step-"):
            step = int(Path(new).name[5:])
            if f'"kind": "step", "step": {step},'.encode() not in synced.get(0, b""):
                missing.append(Path(new).name)
        rename(old, new)

    with patch.object(os, "fsync", sync), patch.object(os, "rename", publish):
        train(tree(prepared, run_dir))
    assert steps_in(run_dir) == [5, 10, 12, 15, 20]
    assert missing == []


def test_a_real_limit_on_the_size_of_files_costs_saves_and_no_steps(prepared: Prepared, tmp_path: Path) -> None:
    """Checkpoints are larger than 64 KiB, and all that a run writes besides is smaller."""
    run_dir = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def lift(run: Any) -> None:
        if run.step == 13:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
        with behind_each_step(lift):
            train(tree(prepared, run_dir, every_steps=7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert steps_in(run_dir) == [14, 20]
    errors = [record["error"] for record in metrics(run_dir, "save")]
    assert ["the file would exceed the size limit" in str(error) for error in errors] == [True, True, False, False]
    assert len(losses(run_dir)) == 20


def test_records_that_the_disk_refuses_are_written_later_and_none_is_lost(
    prepared: Prepared, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    file = run_dir / "metrics.jsonl"

    def lose_and_find(run: Any) -> None:
        if run.step == 6:  # from here on a folder is in its place
            run.log._file.close()
            run.log._file = None
            file.rename(tmp_path / "kept")
            file.mkdir()
        if run.step == 9:
            file.rmdir()
            (tmp_path / "kept").rename(file)

    with behind_each_step(lose_and_find):
        assert train(tree(prepared, run_dir)) == "done"
    assert losses(run_dir) == losses(whole)
    warned = capsys.readouterr().err
    assert "cannot write metrics: is a directory" in warned
    assert warned.count("Until then records are kept in memory") == 1


def test_weights_that_are_not_finite_are_not_saved_and_the_save_before_is(prepared: Prepared, tmp_path: Path) -> None:
    run_dir, go = tmp_path / "run", threading.Event()

    def spoil(run: Any) -> None:
        if run.step == 10:
            run.engine._model.head.weight.data[3, 4] = np.inf
            go.set()

    with (
        writing(lambda folder: go.wait(60) and None),
        behind_each_step(spoil),
        pytest.raises(DivergedError, match=r"step 10: head.weight is not finite, .* is .*step-00000005"),
    ):
        train(tree(prepared, run_dir))
    assert steps_in(run_dir) == [5]
    assert nothing_is_left(run_dir)


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from megacl import saving, tensorfile
from megacl.configfile import load
from megacl.trainer import train

number, place = int(sys.argv[2]), sys.argv[3]
count = itertools.count(1)
def killing(original, due):
    def call(*arguments, **more):
        if due(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)
    return call
if place == "write":        # between two tensors
    tensorfile.TensorWriter.write = killing(tensorfile.TensorWriter.write, lambda *_: next(count) == number)
elif place == "manifest":   # when all is written but index and manifest
    saving.write_manifest = killing(saving.write_manifest, lambda *_: next(count) == number)
else:                       # when the folder has its manifest, and not its name
    os.rename = killing(os.rename, lambda old, new: Path(new).name.startswith("step-") and next(count) == number)
train(load([sys.argv[1]]))
"""


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("write", 120),
        pytest.param("manifest", 2, marks=pytest.mark.long),
        pytest.param("rename", 2, marks=pytest.mark.long),
    ],
)
def test_a_kill_inside_a_save_leaves_no_checkpoint_and_the_run_goes_on_as_if_undisturbed(
    prepared: Prepared, whole: Path, tmp_path: Path, place: str, number: int
) -> None:
    run_dir = tmp_path / "run"
    config = prepared.config_file(run_dir)
    command = [sys.executable, "-c", KILLED, config, str(number), place]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, capture_output=True, env=environment, check=False).returncode == -signal.SIGKILL
    assert steps_in(run_dir) == [5]
    assert not nothing_is_left(run_dir)
    assert find_checkpoint(str(run_dir), pytest.fail).name == "step-00000005"
    assert train(tree(prepared, run_dir)) == "done"
    assert nothing_is_left(run_dir)
    assert last_state(run_dir) == last_state(whole)
    assert losses(run_dir) == losses(whole)


# ---------------------------------------------------------------------------------------------- several ranks


def save_on_ranks(ranks: Ranks, made: Path, run_dir: Path, failing: int | None) -> tuple[str, int]:
    """Saves twice; where rank `failing` cannot write, the first time. What is said of the first, and the files of the
    second."""
    _, held, checkpoint = to_save(ranks, made, run_dir, zero_stage=2)
    said = "saved"
    with writing(refusing(1) if ranks.rank == failing else lambda folder: None):
        for step in (1, 2):
            held.begin(RunState(step=step), checkpoint.lineage)
            try:
                path = held.conclude().path
            except DataError as error:
                said = str(error)
    return said, len(list(path.glob("*.safetensors")))


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_the_next_one_succeeds(whole: Path, tmp_path: Path) -> None:
    made = list_checkpoints(whole)[-1]
    results = run_on_ranks(2, save_on_ranks, made, tmp_path, 1)
    assert results[0] == results[1]
    said, files = results[0]
    assert "step-00000001: cannot write a checkpoint: no space left on the device" in said
    assert files == 4  # weights and moments of two owners
    assert steps_in(tmp_path) == [2]
    assert nothing_is_left(tmp_path)
    assert verify_checkpoint(list_checkpoints(tmp_path)[0]) == []
    assert last_state(tmp_path) == last_state(whole)


def give_up_on_ranks(ranks: Ranks, made: Path, run_dir: Path) -> None:
    """Saves, and gives up while rank 0 publishes: as where the others hear at once that one of them has died."""
    _, held, checkpoint = to_save(ranks, made, run_dir, zero_stage=2)
    original = saving.write_manifest

    def write(*arguments: Any) -> None:
        time.sleep(1.0)  # so long rank 1 has for what it does
        original(*arguments)

    with patch.object(saving, "write_manifest", write):
        held.begin(RunState(step=1), checkpoint.lineage)
        assert held.advance() is None
        held.abandon()


def test_a_rank_that_gives_up_takes_nothing_from_what_another_one_publishes(whole: Path, tmp_path: Path) -> None:
    run_on_ranks(2, give_up_on_ranks, list_checkpoints(whole)[-1], tmp_path)
    assert steps_in(tmp_path) == [1]
    assert verify_checkpoint(list_checkpoints(tmp_path)[0]) == []
    assert nothing_is_left(tmp_path)
