"""slurm/train.sbatch on a real cluster of two nodes, a rank on each, against the same run on one rank without SLURM."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import PACKAGES, Cluster, Job, missing_programs

ROOT = Path(__file__).parents[2]
STEPS = 150
# The cluster's machine may be a busy one: a job takes about 20 s on two free cores.
TIMEOUT = 240
# A name that a script without quotes would tear apart.
CONFIG_NAME = "a run's  settings.yaml"
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
ENVIRONMENT = {
    "MEGACL_PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        why = f"no SLURM here ({', '.join(missing)} missing): apt-get install --no-install-recommends {PACKAGES}"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
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


def submit(cluster: Cluster, folder: Path, *arguments: str) -> Job:
    """The script on two nodes, a rank on each."""
    options = ["--nodes=2", "--ntasks-per-node=1", "--time=10", "--output=%j.log"]
    script = str(ROOT / "slurm" / "train.sbatch")
    overrides = ["engine.kind=deepspeed", "engine.zero_stage=1", *arguments]
    return cluster.submit(*options, script, CONFIG_NAME, *overrides, environment=ENVIRONMENT, cwd=folder)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of each step record, as they stand in the file."""
    path = run_dir / "metrics.jsonl"
    records = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "step"]


def assert_same_losses(run_dir: Path, expected: Path) -> None:
    steps, values = zip(*losses(run_dir), strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    np.testing.assert_allclose(values, [loss for _, loss in losses(expected)], rtol=1e-5)


def test_a_run_on_two_nodes_has_the_losses_of_one_rank(cluster, folder):
    job = submit(cluster, folder, "run_dir=two nodes")
    state = job.wait_for_end(timeout=TIMEOUT)
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", "0:0", 0), job.log
    assert "2 rank(s)" in job.log
    assert_same_losses(folder / "two nodes", folder / "native")


def test_a_job_that_is_signalled_saves_requeues_itself_and_finishes(cluster, folder):
    job = submit(cluster, folder, "run_dir=signalled")
    job.wait_until(lambda: len(losses(folder / "signalled")) >= 5, timeout=TIMEOUT)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does before the time limit
    state = job.wait_for_end(timeout=TIMEOUT)
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", "0:0", 1), job.log
    assert job.log.count("told to stop: saved at step") == 1
    assert job.log.count("going on at step") == 1
    assert_same_losses(folder / "signalled", folder / "native")


def test_a_signal_while_the_ranks_are_starting_requeues_the_job_too(cluster, folder):
    job = submit(cluster, folder, "run_dir=early")
    job.wait_until(lambda: "restart 0" in job.log, timeout=TIMEOUT)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    state = job.wait_for_end(timeout=TIMEOUT)
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", "0:0", 1), job.log
    assert_same_losses(folder / "early", folder / "native")


def test_a_rank_that_dies_ends_the_job_with_its_status(cluster, folder):
    job = submit(cluster, folder, "run_dir=killed")
    job.wait_until(lambda: len(losses(folder / "killed")) >= 5, timeout=TIMEOUT)
    os.kill(job.task(rank=1), signal.SIGKILL)
    state = job.wait_for_end(timeout=TIMEOUT)
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", "137:0", 0), job.log
    assert "task 1: Killed" in job.log


def test_wrong_input_ends_the_job_with_its_line_and_no_requeue(cluster, folder):
    job = submit(cluster, folder, "run_dir=wrong", "optimizer.beta1=1.5")
    state = job.wait_for_end(timeout=TIMEOUT)
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", "2:0", 0), job.log
    assert [line for line in job.log.splitlines() if "Error" in line and not line.startswith("srun:")] == [
        "ConfigError: optimizer.beta1 is 1.5; it must be less than 1. It is the decay of the first moment."
    ]
    assert not (folder / "wrong").exists()
