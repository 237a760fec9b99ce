"""What becomes of a job whose ranks are killed, hang, fail or run out of time, on a real cluster of two nodes."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import Cluster, need_programs
from small_run import (
    DEEPSPEED,
    ENVIRONMENT,
    ROOT,
    TIMEOUT,
    log_of,
    step_records,
    steps_and_losses,
    submit,
    train,
    write_run,
)

from megacl.attempts import read_attempts, read_outcome
from megacl.lineage import load_lineage

STEPS = 160
NODES = ("127.0.1.1", "127.0.1.2")
# Python runs it at its start where PYTHONPATH leads to it: what FAULT says happens on rank 1, as often as FAULT has
# lines, in an attempt each. A thread waits for the engine to be imported, which is seconds before its first step.
FAULTS = """\
import os, pathlib, sys, threading, time

def faulty(fault, engine):
    what, at = fault.split()
    step = engine.step
    def faulty_step(self, *arguments, **options):
        result = step(self, *arguments, **options)
        if what == "slow":
            time.sleep(float(at))
        elif self._steps == int(at):
            if what == "sleep":
                time.sleep(10_000)
            raise ValueError("a fault")
        return result
    engine.step = faulty_step

def watch(fault):
    while not hasattr(sys.modules.get("megacl.engine.base"), "Engine"):
        time.sleep(0.01)
    faulty(fault, sys.modules["megacl.engine.base"].Engine)

faults = pathlib.Path(os.environ.get("FAULTS", "none"))
if os.environ.get("SLURM_PROCID") == "1" and "SLURM_STEP_ID" in os.environ and faults.is_file():
    first, *others = faults.read_text().splitlines()
    faults.write_text("".join(line + "\\n" for line in others)) if others else faults.unlink()
    threading.Thread(target=watch, args=[first], daemon=True).start()
"""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_programs()
    preempting = ("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE")
    with Cluster(*preempting, "PartitionName=urgent Nodes=ALL PriorityTier=10", kill_wait=15) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, their prepared shards, a configuration, and the run `native` of one rank."""
    folder = tmp_path_factory.mktemp("failures")
    write_run(folder, steps=STEPS, checkpoint={"every_steps": 5, "keep_last": 3})
    train(folder, "run.yaml", "run_dir=native")
    (folder / "faulty").mkdir()
    (folder / "faulty" / "sitecustomize.py").write_text(FAULTS)
    return folder


class Run:
    """A run that was submitted on two nodes, a rank on each."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, *settings: str, faults: str = "") -> None:
        self.cluster, self.folder, self.run_dir = cluster, folder, folder / name
        (folder / f"{name}.faults").write_text(faults) if faults else None
        paths = f"{ROOT}:{folder / 'faulty'}" if faults else str(ROOT)
        self.job = submit(
            *(cluster, folder, "run.yaml", f"run_dir={name}", *DEEPSPEED, "cluster.tasks_per_node=1"),
            *("cluster.restart_seconds=0", *settings),
            environment=ENVIRONMENT | {"PYTHONPATH": paths, "FAULTS": str(folder / f"{name}.faults")},
        )

    @property
    def log(self) -> str:
        return log_of(self.run_dir)

    def reach(self, step: int) -> None:
        """Returns once so many steps are done."""
        self.job.wait_until(lambda: len(step_records(self.run_dir)) >= step, timeout=2 * TIMEOUT)

    def end(self) -> tuple[str, str, int]:
        """The job's state, exit code and restarts by SLURM, once it has ended."""
        state = self.job.wait_for_end(timeout=2 * TIMEOUT)
        return state.name, state.exit_code, state.restarts

    def assert_undisturbed(self) -> None:
        """It has seen the samples of the run of one rank, each once, and has its losses."""
        native = self.folder / "native"
        steps, losses = steps_and_losses(self.run_dir)
        assert steps == list(range(1, STEPS + 1))
        np.testing.assert_allclose(losses, steps_and_losses(native)[1], rtol=1e-5)
        mine, its = load_lineage(self.run_dir).phases[0], load_lineage(native).phases[0]
        assert (mine.samples, mine.passed_over, mine.sources) == (its.samples, its.passed_over, its.sources)


def test_a_killed_rank_is_named_and_the_job_goes_on_in_its_allocation(cluster: Cluster, folder: Path) -> None:
    run = Run(cluster, folder, "killed")
    run.reach(8)
    os.kill(run.job.task(rank=1), signal.SIGKILL)
    assert run.end() == ("COMPLETED", "0:0", 0), run.log
    first, last = read_outcome(run.run_dir, 1), read_outcome(run.run_dir)
    assert first is not None
    assert last is not None
    assert (first.outcome, first.exit_status, first.rank, first.node) == ("lost_rank", 137, 1, NODES[1])
    assert f"rank 1 on {NODES[1]} died by SIGKILL, often for want of memory" in run.log
    assert "Traceback" not in run.log
    assert (last.outcome, last.attempt, last.step) == ("done", 2, STEPS)
    assert [attempt.ranks for attempt in read_attempts(run.run_dir)] == [NODES, NODES]
    run.assert_undisturbed()


def test_a_rank_that_hangs_in_its_step_is_named_with_the_stacks_of_all(cluster: Cluster, folder: Path) -> None:
    run = Run(cluster, folder, "hung", "engine.timeout=40", faults="sleep 7\n")
    assert run.end() == ("COMPLETED", "0:0", 0), run.log
    first = read_outcome(run.run_dir, 1)
    assert first is not None
    assert (first.outcome, first.exit_status, first.rank, first.node, first.step) == ("hung", 76, 1, NODES[1], 6)
    stacks = [(run.run_dir / "attempts" / "0001" / f"stacks-{rank}.txt").read_text() for rank in range(2)]
    assert "in faulty_step" in stacks[1]
    assert "all_reduce" in stacks[0]
    assert f"rank 1 on {NODES[1]} did not move on" in run.log
    run.assert_undisturbed()


def test_a_stopped_rank_is_named_ended_and_the_job_goes_on(cluster: Cluster, folder: Path) -> None:
    run = Run(cluster, folder, "stopped", "engine.timeout=40")
    run.reach(8)
    os.kill(run.job.task(rank=1), signal.SIGSTOP)
    assert run.end() == ("COMPLETED", "0:0", 0), run.log
    first = read_outcome(run.run_dir, 1)
    assert first is not None
    assert (first.outcome, first.rank, first.node) == ("hung", 1, NODES[1])
    assert (run.run_dir / "attempts" / "0001" / "stacks-0.txt").exists()
    run.assert_undisturbed()


def test_the_same_failure_at_the_same_step_twice_ends_the_job_and_says_why(cluster: Cluster, folder: Path) -> None:
    run = Run(cluster, folder, "same", faults="fail 4\nfail 4\nfail 5\n")
    assert run.end() == ("FAILED", "1:0", 0), run.log
    last = read_outcome(run.run_dir)
    assert last is not None
    assert (last.outcome, last.exit_status, last.rank, last.node, last.attempt) == ("failed", 1, 1, NODES[1], 2)
    assert "ValueError: a fault" in last.message
    assert "the same failure at the same step twice, step 3: rank 1" in run.log


def test_a_job_that_fails_without_a_new_step_saved_ends_after_so_many_restarts(cluster: Cluster, folder: Path) -> None:
    run = Run(cluster, folder, "bounded", "cluster.max_restarts=1", faults="fail 4\nfail 3\nfail 2\n")
    assert run.end() == ("FAILED", "1:0", 0), run.log
    assert "2 failures in a row without a new step saved; at last: rank 1" in run.log
    assert len(read_attempts(run.run_dir)) == 2


@pytest.mark.parametrize("grace", [60, 0])
def test_a_job_that_an_urgent_one_takes_the_nodes_of_saves_is_requeued_and_finishes(
    cluster: Cluster, folder: Path, grace: int
) -> None:
    """grace: seconds that SLURM lets it go on; where there are none, those between TERM and KILL are what it has."""
    cluster.run("scontrol", "update", "PartitionName=test", f"GraceTime={grace}")
    run = Run(cluster, folder, f"pre-empted {grace}", faults="slow 0.2\n")
    run.reach(8)
    (folder / "urgent.sh").write_text("#!/bin/bash\nsleep 1\n")
    urgent = cluster.submit(
        *("--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.log"),
        *("urgent.sh",),
        environment={},
        cwd=folder,
    )
    assert urgent.wait_for_end(timeout=TIMEOUT).name == "COMPLETED"
    assert run.end() == ("COMPLETED", "0:0", 1), run.log
    outcome, again = read_outcome(run.run_dir, 1), read_attempts(run.run_dir)[1]
    assert outcome is not None
    assert (outcome.outcome, outcome.exit_status) == ("stopped", 75)
    assert again.step == outcome.step  # nothing was done twice
    run.assert_undisturbed()


def test_a_job_at_its_time_limit_saves_requeues_and_finishes(cluster: Cluster, folder: Path) -> None:
    began = time.monotonic()
    run = Run(cluster, folder, "limit", "cluster.signal_seconds=120", faults="slow 0.75\n")
    run.reach(8)
    # The limit moves near, to one or two minutes from now: SLURM has its signal to send when it looks next, which it
    # does every 30 seconds, and the run takes three times as long.
    minutes = int(time.monotonic() - began) // 60 + 2
    cluster.run("scontrol", "update", f"JobId={run.job.number}", f"TimeLimit={minutes}")
    run.job.wait_until(lambda: run.job.state().restarts == 1, timeout=2 * TIMEOUT)
    cluster.run("scontrol", "update", f"JobId={run.job.number}", "TimeLimit=10")
    assert run.end() == ("COMPLETED", "0:0", 1), run.log
    first = read_outcome(run.run_dir, 1)
    assert first is not None
    assert (first.outcome, first.exit_status) == ("stopped", 75)
    assert [attempt.restart for attempt in read_attempts(run.run_dir)] == [0, 1]
    run.assert_undisturbed()


def test_a_cancelled_job_saves_what_it_has_and_ends(cluster: Cluster, folder: Path) -> None:
    run = Run(cluster, folder, "cancelled")
    run.reach(8)
    cluster.run("scancel", run.job.number)
    assert run.end()[0] == "CANCELLED", run.log
    run_dir = run.run_dir
    run.job.wait_for_end(timeout=2 * TIMEOUT)
    last = read_outcome(run_dir)
    assert last is not None, run.log
    assert (last.outcome, last.exit_status) == ("stopped", 75)
    assert (run_dir / "checkpoints" / f"step-{last.step:08d}" / "manifest.json").exists()
