"""`megacl submit` on a real cluster of two nodes, against the same run on one rank without SLURM."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import Cluster, Job, need_programs
from small_run import (
    DEEPSPEED,
    ENVIRONMENT,
    ROOT,
    TIMEOUT,
    log_of,
    step_records,
    steps_and_losses,
    submit,
    submit_command,
    train,
    write_run,
)

STEPS = 200  # long enough for a signal to find it under way, on a quick machine too
FEW = ("phases[0].steps=20",)  # the first of them, at the same rate
# A name that a script without quotes would tear apart.
CONFIG_NAME = "a run's  settings.yaml"
NASTY = """it's "two" $(touch hit) 50%j  nodes"""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_programs()
    with Cluster() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, their prepared shards, a configuration, and the run `native` of one rank."""
    folder = tmp_path_factory.mktemp("a folder")
    write_run(folder, CONFIG_NAME, steps=STEPS)
    train(folder, CONFIG_NAME, "run_dir=native")
    return folder


def submit_run(cluster: Cluster, folder: Path, *arguments: str, code: Path = ROOT) -> Job:
    """The run on two nodes, two ranks on each, by the code of a checkout."""
    return submit(
        cluster, folder, CONFIG_NAME, *DEEPSPEED, *arguments, environment=ENVIRONMENT | {"PYTHONPATH": str(code)}
    )


def refusal(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """The line with which a submission is refused, behind its exit status."""
    command = submit_command(CONFIG_NAME, *DEEPSPEED, *arguments)
    script = '"$@" 2>&1 >/dev/null; echo "status $?"'
    said = cluster.run("bash", "-c", script, "bash", *command, environment=ENVIRONMENT, cwd=folder, timeout=TIMEOUT)
    *_, line, status = said.splitlines()
    assert "Traceback" not in said
    return f"{status}: {line}"


def assert_same_losses(run_dir: Path, expected: Path, count: int = STEPS) -> None:
    steps, losses = steps_and_losses(run_dir)
    assert steps == list(range(1, count + 1))
    np.testing.assert_allclose(losses, steps_and_losses(expected)[1][:count], rtol=1e-5)


def assert_ends(job: Job, run_dir: Path, *, exit_code: str = "0:0", restarts: int = 0) -> str:
    """Waits for a job's end, which must be that, and returns its log."""
    state = job.wait_for_end(timeout=TIMEOUT)
    log = log_of(run_dir)
    name = "COMPLETED" if exit_code == "0:0" else "FAILED"
    assert (state.name, state.exit_code, state.restarts) == (name, exit_code, restarts), log
    return log


def test_a_run_of_four_ranks_on_two_nodes_has_the_losses_of_one_rank_whatever_it_is_called(cluster, folder):
    job = submit_run(cluster, folder, f"run_dir={NASTY}", *FEW)
    log = assert_ends(job, folder / NASTY)
    assert "4 rank(s)" in log
    assert re.search(r"^0: .*4 rank", log, re.MULTILINE)
    assert_same_losses(folder / NASTY, folder / "native", count=20)
    assert not (folder / "hit").exists()
    record = json.loads((folder / NASTY / "jobs" / "0001" / "job.json").read_text())
    assert (record["job_id"], record["kind"]) == (job.number, "train")


def test_ranks_of_torchrun_that_are_told_to_stop_save_and_their_job_is_requeued_and_finishes(cluster, folder):
    """torchrun loses their exit status, and gets the signal too: what they leave in the run directory decides."""
    run_dir = folder / "torchrun"
    job = submit_run(cluster, folder, "run_dir=torchrun", "cluster.launcher=torchrun")
    job.wait_until(lambda: len(step_records(run_dir)) >= 5, timeout=TIMEOUT)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does before the time limit
    log = assert_ends(job, run_dir, restarts=1)
    assert "4 rank(s)" in log
    assert log.count("told to stop: saved at step") == 1
    assert log.count("going on at step") == 1
    assert_same_losses(run_dir, folder / "native")


def test_a_signal_while_the_ranks_are_starting_requeues_the_job_too(cluster, folder):
    job = submit_run(cluster, folder, "run_dir=early", "cluster.tasks_per_node=1", *FEW)
    job.wait_until(lambda: "restart 0" in log_of(folder / "early"), timeout=TIMEOUT)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    assert_ends(job, folder / "early", restarts=1)
    assert_same_losses(folder / "early", folder / "native", count=20)


def test_a_job_runs_what_was_there_when_it_was_submitted_and_is_not_submitted_twice(cluster, folder, tmp_path):
    code = tmp_path / "checkout"
    shutil.copytree(ROOT / "megacl", code / "megacl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", code / "configs")
    shutil.copytree(ROOT / "slurm", code / "slurm")
    settings = folder / "changing.yaml"
    settings.write_text("global_batch_size: 8\n")
    shared = ("run_dir=frozen", "cluster.tasks_per_node=1", *FEW)
    job = submit_run(cluster, folder, settings.name, *shared, "cluster.sbatch=[--hold]", code=code)
    settings.write_text("global_batch_size: 4\n")
    (code / "megacl" / "trainer.py").write_text("raise SystemExit(9)\n")
    assert refusal(cluster, folder, *shared).startswith(
        f"status 2: LaunchError: {folder}/frozen: its job {job.number} is pending; `megacl cancel"
    )
    assert [path.name for path in (folder / "frozen" / "jobs").glob("0*")] == ["0001"]
    cluster.run("scontrol", "release", job.number)
    assert_ends(job, folder / "frozen")
    assert_same_losses(folder / "frozen", folder / "native", count=20)


def test_what_is_wrong_when_the_job_starts_ends_it_with_its_line_and_no_requeue(cluster, folder):
    shutil.copytree(folder / "data" / "words", folder / "data" / "moved")
    shared = ("run_dir=wrong", "cluster.tasks_per_node=1", "sources.words.path=data/moved")
    job = submit_run(cluster, folder, *shared, "sources.words.documents=null", "cluster.sbatch=[--hold]")
    shutil.rmtree(folder / "data" / "moved")
    cluster.run("scontrol", "release", job.number)
    log = assert_ends(job, folder / "wrong", exit_code="2:0")
    errors = [line for line in log.splitlines() if re.search(r"\w+Error: ", line) and not line.startswith("srun:")]
    assert len(errors) == 1, log
    assert errors[0].startswith("0: DataError: data/moved")
    assert "Traceback" not in log


def test_nonsense_is_refused_in_one_line_and_leaves_nothing_behind(cluster, folder):
    for arguments, line in (
        (["cluster.partition=nowhere"], "status 2: LaunchError: sbatch does not take"),
        (["sources.words.path=nowhere", "sources.words.documents=null"], "status 2: DataError: nowhere"),
    ):
        assert refusal(cluster, folder, "run_dir=nonsense", *arguments).startswith(line)
        assert not (folder / "nonsense").exists()
    assert "nonsense" not in cluster.run("squeue", "--noheader", "--format=%j")
