"""`megacl status`, `cancel` and `logs` on a real cluster: runs that wait, train, are cancelled, end, are forgotten."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, Job, need_programs
from small_run import DEEPSPEED, ENVIRONMENT, ONE_RANK, TIMEOUT, submit, train, write_run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_programs()
    with Cluster() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration of 1,000,000 steps and its prepared data."""
    folder = tmp_path_factory.mktemp("a folder")
    endless = {"evaluation": {"sequences": 4, "every_steps": None}, "logging": {"every_steps": 1}}
    write_run(folder, steps=1_000_000, **endless)
    train(folder, "run.yaml", "phases.0.steps=1", "run_dir=prepares")
    return folder


class Here:
    """A folder and a cluster, and megacl's commands there."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def megacl(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "megacl", *arguments]
        return self.cluster.run(*command, environment=ENVIRONMENT, cwd=self.folder, timeout=TIMEOUT)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "megacl", *arguments]
        environment = {**self.cluster.environment, **ENVIRONMENT}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    def submit(self, run_dir: str, *arguments: str) -> Job:
        return submit(self.cluster, self.folder, "run.yaml", f"run_dir={run_dir}", "cluster.time=60", *arguments)

    def status(self, run_dir: str) -> Any:
        (found,) = json.loads(self.megacl("status", run_dir, "--json"))
        return found

    def wait_for(self, run_dir: str, condition: Callable[[Any], bool]) -> Any:
        """The status that meets a condition."""
        deadline = time.monotonic() + TIMEOUT
        while not condition(found := self.status(run_dir)):
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
        return found


@pytest.fixture(scope="module")
def here(cluster: Cluster, folder: Path) -> Here:
    return Here(cluster, folder)


def test_a_run_that_waits_says_why_and_its_cancelling_twice_is_no_error(here: Here) -> None:
    (here.folder / "sleep.sh").write_text("#!/bin/bash\nexec sleep 600\n")
    blocker = here.cluster.submit("--nodes=2", "--exclusive", "sleep.sh", environment={}, cwd=here.folder)
    blocker.wait_until(lambda: blocker.state().name == "RUNNING", timeout=TIMEOUT)
    job = here.submit("waits", *ONE_RANK)
    found = here.wait_for("waits", lambda found: "next" in found["why"])  # Resources
    assert (found["state"], found["job"], found["step"], found["steps"]) == ("queued", job.number, 0, 1_000_000)
    assert "as soon as enough nodes are free" in here.megacl("status", "waits")
    with pytest.raises(AssertionError, match=rf"DataError: waits: job {job.number} has not begun, so it has no log"):
        here.megacl("logs", "waits")
    assert here.megacl("cancel", "waits").splitlines() == [
        f"job {job.number} waited (Resources) and is out of the queue",
        "waits: cancelled before it ran on; nothing is saved",
    ]
    assert job.state().name == "CANCELLED"
    again = here.megacl("cancel", "waits")
    assert again == "waits: no job of it is in the queue; ended: it was cancelled"
    here.cluster.run("scancel", blocker.number)


def test_a_run_that_trains_is_followed_and_cancelled_with_all_its_steps_saved(here: Here) -> None:
    follower = here.start("logs", "trains", "--rank", "0", "--follow")
    _, said = follower.communicate(timeout=TIMEOUT)
    assert (follower.returncode, said) == (2, "DataError: trains: no such folder; name a run's run_dir.\n")

    job = here.submit("trains", *DEEPSPEED, "cluster.tasks_per_node=1")
    follower = here.start("logs", "trains", "--rank", "0", "--follow")
    quiet = here.start("logs", "trains", "--follow")
    found = here.wait_for("trains", lambda found: found["state"] == "running" and found["step"] > 3)
    assert (found["job"], found["steps"], found["phase"], found["nodes"]) == (
        *(job.number, 1_000_000, "words"),
        "127.0.1.[1-2]",
    )
    assert 0 < found["time_left"] <= 3600
    assert found["loss"] > 0 < found["tokens_per_second"]
    assert "behind the job's time limit" in here.megacl("status", "trains")
    quiet.send_signal(signal.SIGINT)
    assert quiet.communicate(timeout=TIMEOUT)[1] == ""

    said = here.megacl("cancel", "trains")
    found = here.status("trains")
    steps = [json.loads(line) for line in (here.folder / "trains" / "metrics.jsonl").read_text().splitlines()]
    last = max(record["step"] for record in steps if record["kind"] == "step")
    assert f"job {job.number} is told to save and to end" in said
    assert said.endswith(f"trains: cancelled; the newest checkpoint is that of step {last:,}")
    assert (found["state"], found["outcome"], found["exit_status"]) == ("ended", "stopped", 75)
    assert (found["step"], found["checkpoint_step"], found["restarts"]) == (last, last, 0)
    assert job.state().ended
    out, err = follower.communicate(timeout=TIMEOUT)
    assert (follower.returncode, err) == (0, "")
    assert "2 rank(s)" in out
    assert "=== job" not in out
    log = here.megacl("logs", "trains", "--attempt", "1")
    assert f"=== job {job.number}, restart 0, " in log
    assert "\n0: " in log
    assert "=== srun ended with status 75" in log


def test_a_run_that_has_ended_is_told_also_when_slurm_has_forgotten_it(here: Here) -> None:
    job = here.submit("ends", *ONE_RANK, "phases.0.steps=3")
    job.wait_for_end(timeout=TIMEOUT)
    found = here.status("ends")
    assert (found["state"], found["outcome"], found["step"], found["steps"]) == ("ended", "done", 3, 3)
    record = here.folder / "ends" / "jobs" / "0001" / "job.json"
    record.write_text(record.read_text().replace(f'"job_id": "{job.number}"', '"job_id": "99999"'))
    for file in (here.folder / "ends" / "attempts").glob("*/attempt.json"):
        file.write_text(file.read_text().replace(f'"job": "{job.number}"', '"job": "99999"'))
    assert {**here.status("ends"), "job": job.number, "time": 0} == {**found, "time": 0}
    assert "no job of it is in the queue; ended: done" in here.megacl("cancel", "ends")
