"""Fencing: a start of a run that was given up, and goes on, publishes nothing once a later one has taken the run."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Prepared
from runs import command_line, last_state, losses

from megacl import trainer
from megacl.config import RunConfig
from megacl.configfile import from_tree
from megacl.errors import DataError, FencedError
from megacl.fencing import FILE, Fence, hold_run, read_incarnation, who_has_taken
from megacl.log import RunLog, read_metrics
from megacl.publish import alone_in, publish_text
from megacl.stopping import StopSignal
from megacl.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


def job(monkeypatch: pytest.MonkeyPatch, number: int, restart: int = 0, step: int = 0, node: str = "node1") -> None:
    """What a process of a job's step finds in its environment."""
    values = {"JOB_ID": number, "RESTART_COUNT": restart, "STEP_ID": step, "CLUSTER_NAME": "pond", "NTASKS": 1}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURMD_NODENAME", node)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what squeue prints, what it complains of, and what scontrol prints."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def say(printed: str, complaint: str = "", job: str = "") -> None:
        for name, text in (("squeue", printed), ("scontrol", job)):
            program = programs / name
            program.write_text(f"#!/bin/sh\necho '{text}'\n[ -z '{complaint}' ] || echo '{complaint}' >&2\n")
            program.chmod(0o755)

    say("", "slurm_load_jobs error: Unable to contact slurm controller")
    return say


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for locks, which say who holds them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def short_run(prepared: Prepared, run_dir: Path) -> RunConfig:
    """Three steps and two, saved at steps 2, 3, 4 and 5, of which two stay."""
    whole = prepared.tree(run_dir, checkpoint={"every_steps": 2, "keep_last": 1}, evaluation={"sequences": 2})
    constant = {"schedule": {"kind": "constant", "max_lr": 5e-3}}
    phases = [{**phase, **constant, "steps": steps} for phase, steps in zip(whole["phases"], (3, 2), strict=True)]
    return from_tree({**whole, "phases": phases})


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(short_run(prepared, run_dir))
    return run_dir


class _Freeze:
    """Runs what is given when the first incarnation has asked so often whether it is the newest.

    after: once it has its answer, as of a process that is frozen between its question and what it asked for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, after: bool, meanwhile: Callable[[], None]) -> None:
        self.asked, lock, original = itertools.count(), threading.Lock(), Fence.check

        def check(fence: Fence) -> None:
            with lock if fence.own.number == 1 else contextlib.nullcontext():
                now = fence.own.number == 1 and next(self.asked) == at
                if now and not after:
                    meanwhile()
                original(fence)
                if now and after:
                    meanwhile()

        monkeypatch.setattr(Fence, "check", check)


@pytest.fixture(scope="module")
def questions(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often a run asks whether it is the newest."""
    with pytest.MonkeyPatch.context() as patch:
        freeze = _Freeze(patch, -1, False, lambda: None)
        train(short_run(prepared, tmp_path_factory.mktemp("runs") / "counted"))
        return next(freeze.asked) - 1  # the last one is that it has ended


def taken_over(
    prepared: Prepared, whole: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool
) -> None:
    """A run is frozen at a question, a requeued one takes it over and ends; then the first one goes on."""
    config = short_run(prepared, run_dir)
    left: dict[str, bytes] = {}

    def meanwhile() -> None:
        with monkeypatch.context() as patch:
            job(patch, 7, restart=1, node="node2")
            patch.setattr(trainer, "StopSignal", _Deaf)  # it may run on a thread
            assert train(config) == "done"
        left.update(content(run_dir))

    with monkeypatch.context() as patch:
        job(patch, 7)
        freeze = _Freeze(patch, at, after, meanwhile)
        said = ""
        try:
            train(config)
        except FencedError as error:
            said = str(error)
        if said:
            assert re.match(r"fenced: incarnation 2, job 7 \(restart 1\) on node2, .* has taken", said)
        else:
            assert after, "it was told no"
            assert next(freeze.asked) == at + 2, "it had more to ask than whether it may say that it has ended"
    assert left, "the second one has not run"
    assert others(content(run_dir)) == others(left)
    assert losses(run_dir) == losses(whole)
    assert last_state(run_dir) == last_state(whole)


def others(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what the first start says of itself."""
    return {name: held for name, held in files.items() if not name.startswith("attempts/0001/")}


class _Deaf(StopSignal):
    """Hears no signals, which only a main thread can."""

    def __enter__(self) -> "_Deaf":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize("after", [False, True])
def test_a_run_that_is_taken_over_at_any_moment_publishes_nothing_more(
    prepared: Prepared, whole: Path, questions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    for at in random.Random(0).sample(range(questions), 1 + after):
        taken_over(prepared, whole, tmp_path / f"run {at}", monkeypatch, at, after)


@pytest.mark.long
@pytest.mark.parametrize("after", [False, True])
def test_a_run_that_is_taken_over_at_each_moment_publishes_nothing_more(
    prepared: Prepared, whole: Path, questions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    for at in range(questions):
        taken_over(prepared, whole, tmp_path / f"run {at}", monkeypatch, at, after)


# ---------------------------------------------------------------------------------------------- one publisher


@pytest.fixture
def fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Fence]]:
    """A run directory, and the fence of a start that was given up while it still holds the lock."""
    run_dir = tmp_path / "run"
    with contextlib.ExitStack() as until_the_end:
        job(monkeypatch, 7)
        fence = until_the_end.enter_context(hold_run(run_dir, pytest.fail))
        fence.check()
        job(monkeypatch, 7, restart=1, node="node2")
        said: list[str] = []
        newer = until_the_end.enter_context(hold_run(run_dir, said.append))
        assert len(said) == 1
        assert f"job 7 on node1, process {os.getpid()}, since" in said[0]
        newer.check()
        yield run_dir, fence


def test_a_record_of_a_fenced_start_is_not_written_and_says_who_has_the_run(fenced: tuple[Path, Fence]) -> None:
    run_dir, fence = fenced
    log = RunLog(run_dir, rank=0, every_steps=1, tensorboard=False)
    log.keep_until(0, lambda: None)
    log.record("step", step=1)
    with pytest.raises(FencedError):
        log.keep_until(0, fence.check)
    with pytest.raises(FencedError, match=r"^fenced: incarnation 2, job 7 \(restart 1\) on node2, process \d+, since"):
        log.record("step", step=2)
    log.close()
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [1]


def test_what_a_fenced_start_has_written_does_not_get_its_name(fenced: tuple[Path, Fence]) -> None:
    run_dir, fence = fenced
    publish_text(run_dir / "lineage.json", "the newer one's", "a file")
    with pytest.raises(FencedError):
        publish_text(run_dir / "lineage.json", "the older one's", "a file", fence.check)
    assert {path.name for path in run_dir.iterdir()} == {".lock", FILE, "lineage.json"}
    assert (run_dir / "lineage.json").read_text() == "the newer one's"


def test_the_number_grows_with_each_start_and_says_where_it_runs_and_that_it_ended(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with hold_run(tmp_path, pytest.fail) as fence:
            fence.check()
            found = read_incarnation(tmp_path)
            assert found is not None
            assert (found.number, found.holder.pid, found.ended) == (number, os.getpid(), None)
        found = read_incarnation(tmp_path)
        assert found is not None
        assert found.ended is not None
        fence.check()  # until another one comes


@pytest.mark.parametrize(("damage", "word"), [(b"", "is damaged"), (b'{"number": 1', "is damaged"), (None, "is gone")])
def test_a_torn_or_missing_incarnation_file_is_said_and_fences(tmp_path: Path, damage: bytes | None, word: str) -> None:
    with hold_run(tmp_path, pytest.fail) as fence:
        if damage is None:
            (tmp_path / FILE).unlink()
        else:
            (tmp_path / FILE).write_bytes(damage)
        with pytest.raises(FencedError, match=f"fenced: {tmp_path}/{FILE} {word}, without which"):
            fence.check()
    said: list[str] = []
    with hold_run(tmp_path, said.append) as fence:
        fence.check()
    assert [FILE in line for line in said] == ([] if damage is None else [True])


def test_a_run_directory_that_does_not_answer_is_no_reason_to_end(tmp_path: Path) -> None:
    with hold_run(tmp_path / "run", pytest.fail) as fence:
        (tmp_path / "run").rename(tmp_path / "away")
        with pytest.raises(DataError, match="is not there; is the disk") as caught:
            fence.check()
        assert not isinstance(caught.value, FencedError)
        (tmp_path / "away").rename(tmp_path / "run")
        fence.check()


# ---------------------------------------------------------------------------------------------- who may take it


def test_a_living_start_is_named_to_a_second_one_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Callable[..., None]
) -> None:
    job(monkeypatch, 7)
    with hold_run(tmp_path, pytest.fail) as fence:
        job(monkeypatch, 8, node="node2")
        for answer in (("RUNNING",), ("COMPLETING",), ("SUSPENDED",), ("", "Unable to contact slurm controller")):
            slurm(*answer)
            words = rf"another run is at work there \(job 7 on node1, process {os.getpid()}, since .*\); wait for it"
            with pytest.raises(DataError, match=words), hold_run(tmp_path, pytest.fail):
                pass
        fence.check()


@pytest.mark.parametrize("answer", [("COMPLETED",), ("PENDING",), ("NODE_FAIL",), ("", "Invalid job id specified")])
def test_a_start_whose_job_slurm_does_not_know_as_running_loses_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Callable[..., None], answer: tuple[str, ...]
) -> None:
    job(monkeypatch, 7)
    with hold_run(tmp_path, pytest.fail) as fence:
        job(monkeypatch, 8, node="node2")
        slurm(*answer)
        with hold_run(tmp_path, lambda line: None) as newer:
            newer.check()
            with pytest.raises(FencedError, match="incarnation 2, job 8 on node2"):
                fence.check()


def test_a_job_of_another_cluster_and_a_process_without_a_job_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Callable[..., None]
) -> None:
    slurm("", "Invalid job id specified")  # as of a job that another cluster runs
    job(monkeypatch, 7)
    with hold_run(tmp_path / "a", pytest.fail):
        job(monkeypatch, 8)
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "lake")
        with pytest.raises(DataError, match="another run is at work"), hold_run(tmp_path / "a", pytest.fail):
            pass
    job(monkeypatch, 7, restart=1)
    with hold_run(tmp_path / "c", pytest.fail):
        pass
    job(monkeypatch, 7)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "lake")  # whose job 7 is no earlier start of that one
    with hold_run(tmp_path / "c", pytest.fail) as fence:
        fence.check()
    monkeypatch.delenv("SLURM_JOB_ID")
    with hold_run(tmp_path / "b", pytest.fail):
        job(monkeypatch, 8)
        with (
            pytest.raises(DataError, match=r"another run is at work there \(on .*, process"),
            hold_run(tmp_path / "b", pytest.fail),
        ):
            pass


def test_an_earlier_start_of_a_job_that_comes_late_is_fenced_whether_the_later_one_runs_or_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Callable[..., None]
) -> None:
    job(monkeypatch, 7, restart=1)
    with hold_run(tmp_path, pytest.fail) as fence:
        job(monkeypatch, 7)
        with pytest.raises(DataError, match="another run is at work"), hold_run(tmp_path, pytest.fail):
            pass
        fence.check()
    with (
        pytest.raises(FencedError, match=r"job 7 \(restart 1\).*this is an earlier start of that job"),
        hold_run(tmp_path, pytest.fail),
    ):
        pass
    fence.check()


def test_of_two_steps_of_one_job_the_later_has_the_run_once_slurm_says_that_the_earlier_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Callable[..., None]
) -> None:
    job(monkeypatch, 7)
    with hold_run(tmp_path, pytest.fail):
        job(monkeypatch, 7, step=1)
        slurm("7.0")
        with pytest.raises(DataError, match="another run is at work"), hold_run(tmp_path, pytest.fail):
            pass
        slurm("")
        with hold_run(tmp_path, lambda line: None) as newer:
            newer.check()


@pytest.mark.parametrize(
    ("newest", "here", "restarts", "words"),
    [
        ((7, 0), (7, 0), 0, None),
        ((7, 0), (7, 0), None, None),  # SLURM does not answer
        ((7, 1), (7, 0), None, r"incarnation 1, job 7 \(restart 1\) on node1, .* has taken the run"),
        ((7, 0), (7, 0), 1, "SLURM has requeued job 7 meanwhile"),
        ((8, 0), (7, 0), 0, "incarnation 1, job 8 on node1, .* has taken the run"),
        (None, (7, 0), 0, None),
        (None, (7, 0), 2, "SLURM has requeued job 7 meanwhile"),
    ],
)
def test_the_script_of_a_start_that_was_given_up_has_no_say(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slurm: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    newest: tuple[int, int] | None,
    here: tuple[int, int],
    restarts: int | None,
    words: str | None,
) -> None:
    began = time.time()
    if newest is not None:
        job(monkeypatch, *newest)
        with hold_run(tmp_path, pytest.fail):
            pass
    slurm("", "", "" if restarts is None else f"JobId=7 Requeue=1 Restarts={restarts} BatchFlag=1")
    job(monkeypatch, *here)
    said = who_has_taken(tmp_path, since=began)
    assert said is None if words is None else said is not None and re.match(words, said), said
    if words is not None:
        before = content(tmp_path)
        status, out, _ = command_line(
            capsys, "job-end", str(tmp_path), "--status", "2", "--since", str(began), "--max-restarts", "5"
        )
        assert (status, out) == (0, "fenced 2\n")
        assert content(tmp_path) == before


def test_another_job_that_is_at_work_keeps_its_run_from_the_script_of_one_that_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Callable[..., None]
) -> None:
    job(monkeypatch, 8)
    with hold_run(tmp_path, pytest.fail):
        job(monkeypatch, 7)
        said = who_has_taken(tmp_path, since=time.time() + 1)
        assert said is not None
        assert "another run is at work there (job 8 on node1" in said
    assert who_has_taken(tmp_path, since=time.time() + 1) is None  # it has ended before


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks."""

    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_start_that_has_not_ended_keeps_others_out_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Callable[..., None]
) -> None:
    with hold_run(tmp_path, pytest.fail) as fence:
        with (
            pytest.raises(DataError, match=r"this file system has no locks.* delete .*/incarnation\.json"),
            hold_run(tmp_path, pytest.fail),
        ):
            pass
        fence.check()
    with hold_run(tmp_path, pytest.fail):  # it has ended
        pass
    path = tmp_path / FILE
    killed = {**json.loads(path.read_text()), "ended": None, "pid": 2**22 + 1}  # beyond the largest number of a process
    path.write_text(json.dumps(killed))
    with hold_run(tmp_path, pytest.fail):  # it was killed, here
        pass
    path.write_text(json.dumps({**killed, "node": "elsewhere"}))
    with (
        pytest.raises(DataError, match=r"on elsewhere, process .* may be at work there"),
        hold_run(tmp_path, pytest.fail),
    ):
        pass
    path.write_text("{")
    with pytest.raises(DataError, match="is damaged; delete it once"), hold_run(tmp_path, pytest.fail):
        pass


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_later_start_of_the_job_takes_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(monkeypatch, 7)
    with hold_run(tmp_path, pytest.fail) as fence:
        job(monkeypatch, 7, restart=1)
        with hold_run(tmp_path, pytest.fail) as newer:
            newer.check()
            with pytest.raises(FencedError):
                fence.check()


def test_a_lock_says_who_holds_it_and_nothing_once_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(monkeypatch, 7, restart=2, step=3)
    with alone_in(tmp_path, "a test"):
        said = json.loads((tmp_path / ".lock").read_text())
        assert said.pop("time") > 0
        assert said == {"node": "node1", "pid": os.getpid(), "job": "7", "restart": 2, "step": "3", "cluster": "pond"}
    assert (tmp_path / ".lock").read_text() == ""


# ---------------------------------------------------------------------------------------------- other file systems


def test_checkpoints_may_lie_on_another_file_system(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here: /dev/shm is none")
    run_dir, elsewhere = tmp_path / "run", shared / f"megacl-{os.getpid()}"
    run_dir.mkdir()
    try:
        elsewhere.mkdir()
        (run_dir / "checkpoints").symlink_to(elsewhere)
        assert train(short_run(prepared, run_dir)) == "done"
        assert losses(run_dir) == losses(whole)
        assert last_state(run_dir) == last_state(whole)
        assert {path.name for path in elsewhere.iterdir()} == {path.name for path in (whole / "checkpoints").iterdir()}
    finally:
        shutil.rmtree(elsewhere)
