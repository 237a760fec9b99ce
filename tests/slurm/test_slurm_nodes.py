"""Nodes that are lost, and runs that go on with others or fewer: on a real cluster, against an undisturbed run."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import Cluster, Job, JobState, need_programs
from small_run import (
    DEEPSPEED,
    ENVIRONMENT,
    ONE_RANK,
    TIMEOUT,
    log_of,
    step_records,
    steps_and_losses,
    submit,
    train,
    write_run,
)

STEPS = 400
FILE = "settings.yaml"

pytestmark = pytest.mark.long


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of its own for each test, since they take its nodes away. It notices soon where one is silent."""
    need_programs()
    with Cluster("SlurmdTimeout=10", "ReturnToService=2") as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, their prepared shards, a configuration, and the undisturbed run `whole` of one rank."""
    folder = tmp_path_factory.mktemp("a folder")
    write_run(folder, FILE, steps=STEPS, checkpoint={"every_steps": 20, "keep_last": 2})
    train(folder, FILE, "run_dir=whole")
    return folder


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Each step once, with the losses of the other run, and of the data the same samples."""
    steps, losses = steps_and_losses(run_dir)
    assert steps == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses, steps_and_losses(expected)[1], rtol=1e-5)
    assert phases(run_dir) == phases(expected)


def phases(run_dir: Path) -> list[dict[str, object]]:
    """What the model has seen: which samples of which data, in which order."""
    entries = json.loads((run_dir / "lineage.json").read_text())["phases"]
    return [{key: value for key, value in entry.items() if key not in ("run", "id")} for entry in entries]


def incarnation(run_dir: Path) -> dict[str, object]:
    path = run_dir / "incarnation.json"
    return dict(json.loads(path.read_text())) if path.exists() else {"number": 0}


def wait_for(condition: Callable[[], bool], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def environment_of(process: int) -> dict[str, str]:
    content = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
    return dict(entry.partition("=")[::2] for entry in content.split("\0"))


def lose_node(cluster: Cluster, job: Job, run_dir: Path, *, rank: int) -> tuple[str, JobState]:
    """SLURM loses a rank's node, whose task goes on; returns the node, and how the requeued job ended."""
    job.wait_until(lambda: len(step_records(run_dir)) >= 50, timeout=TIMEOUT)
    old = job.task(rank=rank)
    node = environment_of(old)["SLURMD_NODENAME"]
    try:
        os.kill(old, signal.SIGSTOP)  # so that it is in mid-step, on a quick machine too, when the next one begins
        cluster.kill_daemon(node)
        job.wait_until(lambda: job.state().restarts == 1, timeout=TIMEOUT)
        assert is_running(old)
        job.wait_until(lambda: incarnation(run_dir)["number"] == 2, timeout=TIMEOUT)
        assert is_running(old)
        os.kill(old, signal.SIGCONT)
        wait_for(lambda: not is_running(old), lambda: f"the lost node's task does not end\n{log_of(run_dir)}")
        return node, job.wait_for_end(timeout=TIMEOUT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(old, signal.SIGKILL)


def test_a_lost_node_whose_task_goes_on_publishes_nothing_once_the_requeued_job_has_the_run(cluster, folder):
    run_dir = folder / "lost node"
    job = submit(cluster, folder, FILE, "run_dir=lost node", *ONE_RANK)
    node, state = lose_node(cluster, job, run_dir, rank=0)
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", "0:0", 1), log_of(run_dir)
    other = "127.0.1.2" if node == "127.0.1.1" else "127.0.1.1"
    assert incarnation(run_dir)["node"] == other
    # Nobody reads its terminal any more.
    said = json.loads((run_dir / "attempts" / "0001" / "outcome.json").read_text())
    assert said["outcome"] == "fenced"
    assert said["message"].startswith(f"fenced: incarnation 2, job {job.number} (restart 1) on {other},")
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "done"
    assert_same_run(run_dir, folder / "whole")


def test_a_run_on_two_nodes_goes_on_with_one_when_the_other_is_lost(cluster, folder):
    run_dir = folder / "fewer nodes"
    job = submit(cluster, folder, FILE, "run_dir=fewer nodes", *DEEPSPEED, "cluster.nodes=1-2")
    _, state = lose_node(cluster, job, run_dir, rank=3)
    log = log_of(run_dir)
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", "0:0", 1), log
    assert "4 rank(s)" in log
    assert "2 rank(s)" in log
    assert_same_run(run_dir, folder / "whole")


def test_a_run_that_is_cancelled_and_submitted_again_with_other_nodes_goes_on_where_it_was(cluster, folder):
    run_dir = folder / "other nodes"
    first = submit(cluster, folder, FILE, "run_dir=other nodes", *DEEPSPEED, "cluster.nodes=1")
    first.wait_until(lambda: len(step_records(run_dir)) >= 50, timeout=TIMEOUT)
    cluster.run(sys.executable, "-m", "megacl", "cancel", "other nodes", environment=ENVIRONMENT, cwd=folder)
    assert first.state().ended
    done = len(step_records(run_dir))
    assert 50 <= done < STEPS
    second = submit(cluster, folder, FILE, "run_dir=other nodes", *DEEPSPEED, "cluster.nodes=2")
    state = second.wait_for_end(timeout=TIMEOUT)
    log = log_of(run_dir)
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", "0:0", 0), log
    assert "2 rank(s)" in log
    assert "4 rank(s)" in log
    assert f"going on at step {done}" in log
    assert_same_run(run_dir, folder / "whole")


def test_a_second_run_on_the_same_directory_is_refused_and_the_first_one_goes_on(cluster, folder):
    run_dir = folder / "twice"
    job = submit(cluster, folder, FILE, "run_dir=twice", *ONE_RANK)
    job.wait_until(lambda: len(step_records(run_dir)) >= 20, timeout=TIMEOUT)
    first = job.task(rank=0)
    os.kill(first, signal.SIGSTOP)  # so that it is there all the time
    try:
        script = str(run_dir / "jobs" / "0001" / "train.sbatch")
        options = ["--output=%j.log", "--nodelist=127.0.1.2"]
        second = cluster.submit(*options, script, environment=ENVIRONMENT, cwd=folder)
        state = second.wait_for_end(timeout=TIMEOUT)
    finally:
        os.kill(first, signal.SIGCONT)
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", "2:0", 0), second.log
    assert re.search(
        rf"another run is at work there \(job {job.number} on 127.0.1.1, process {first}, since", second.log
    )
    state = job.wait_for_end(timeout=TIMEOUT)
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", "0:0", 0), log_of(run_dir)
    assert incarnation(run_dir)["number"] == 1
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "done"
    assert_same_run(run_dir, folder / "whole")
