"""`megacl submit` on a real cluster of two nodes, against the same run on one rank without SLURM."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import Cluster, Job, need_programs

ROOT = Path(__file__).parents[2]
STEPS = 200  # long enough for a signal to find it under way, on a quick machine too
FEW = ("phases[0].steps=20",)  # the first of them, at the same rate
# The cluster's machine may be a busy one: a job takes about 20 s on two free cores.
TIMEOUT = 240
# A name that a script without quotes would tear apart.
CONFIG_NAME = "a run's  settings.yaml"
NASTY = """it's "two" $(touch hit) 50%j  nodes"""
CONFIG = """\
run_dir: run
tokenizer:
  path: data/tokenizer.model
  train: {{documents: [documents.jsonl], vocab_size: 300}}
sources:
  words: {{path: data/words, documents: [documents.jsonl], validation: 0.3}}
model: {{vocab_size: 512, hidden_size: 32, num_layers: 2, num_attention_heads: 2}}
seq_length: 32
global_batch_size: 8
phases:
  - {{name: words, mixture: {{words: 1}}, steps: {steps}, schedule: {{kind: constant, max_lr: 1e-3}}}}
evaluation: {{sequences: 4}}
"""
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
DEEPSPEED = ("engine.kind=deepspeed", "engine.zero_stage=1")

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
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    documents = [" ".join(draw.choices(words, k=200)) for _ in range(120)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / CONFIG_NAME).write_text(CONFIG.format(steps=STEPS))
    command = [sys.executable, "-m", "megacl", "train", CONFIG_NAME, "run_dir=native"]
    done = subprocess.run(command, cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def words(*arguments: str) -> list[str]:
    """`megacl submit` of a run on two nodes, two ranks on each."""
    return [sys.executable, "-m", "megacl", "submit", CONFIG_NAME, *DEEPSPEED, "--cluster", "cpu-test", *arguments]


def submit(cluster: Cluster, folder: Path, *arguments: str, code: Path = ROOT) -> Job:
    said = cluster.run(
        *words(*arguments), environment=ENVIRONMENT | {"PYTHONPATH": str(code)}, cwd=folder, timeout=TIMEOUT
    )
    found = re.search(r"^job (\d+):", said, re.MULTILINE)
    assert found is not None, said
    return Job(cluster, found[1], folder)


def refusal(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """The line with which a submission is refused, behind its exit status."""
    script = '"$@" 2>&1 >/dev/null; echo "status $?"'
    said = cluster.run(
        "bash", "-c", script, "bash", *words(*arguments), environment=ENVIRONMENT, cwd=folder, timeout=TIMEOUT
    )
    *_, line, status = said.splitlines()
    assert "Traceback" not in said
    return f"{status}: {line}"


def log_of(run_dir: Path, job: Job) -> str:
    path = run_dir / "logs" / f"{job.number}.log"
    return path.read_text() if path.exists() else ""


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of each step record, as they stand in the file."""
    path = run_dir / "metrics.jsonl"
    records = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "step"]


def assert_same_losses(run_dir: Path, expected: Path, count: int = STEPS) -> None:
    steps, values = zip(*losses(run_dir), strict=True)
    assert steps == tuple(range(1, count + 1))
    np.testing.assert_allclose(values, [loss for _, loss in losses(expected)][:count], rtol=1e-5)


def assert_ends(job: Job, run_dir: Path, *, exit_code: str = "0:0", restarts: int = 0) -> str:
    """Waits for a job's end, which must be that, and returns its log."""
    state = job.wait_for_end(timeout=TIMEOUT)
    log = log_of(run_dir, job)
    name = "COMPLETED" if exit_code == "0:0" else "FAILED"
    assert (state.name, state.exit_code, state.restarts) == (name, exit_code, restarts), log
    return log


def test_a_run_of_four_ranks_on_two_nodes_has_the_losses_of_one_rank_whatever_it_is_called(cluster, folder):
    job = submit(cluster, folder, f"run_dir={NASTY}", *FEW)
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
    job = submit(cluster, folder, "run_dir=torchrun", "cluster.launcher=torchrun")
    job.wait_until(lambda: len(losses(run_dir)) >= 5, timeout=TIMEOUT)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does before the time limit
    log = assert_ends(job, run_dir, restarts=1)
    assert "4 rank(s)" in log
    assert log.count("told to stop: saved at step") == 1
    assert log.count("going on at step") == 1
    assert_same_losses(run_dir, folder / "native")


def test_a_signal_while_the_ranks_are_starting_requeues_the_job_too(cluster, folder):
    job = submit(cluster, folder, "run_dir=early", "cluster.tasks_per_node=1", *FEW)
    job.wait_until(lambda: "restart 0" in log_of(folder / "early", job), timeout=TIMEOUT)
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
    job = submit(cluster, folder, settings.name, *shared, "cluster.sbatch=[--hold]", code=code)
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
    job = submit(cluster, folder, *shared, "sources.words.documents=null", "cluster.sbatch=[--hold]")
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
