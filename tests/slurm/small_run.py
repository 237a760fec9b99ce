"""A run that takes seconds, on a cluster, and on one rank without SLURM to compare with; and what it has recorded."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from slurm_cluster import Cluster, Job

ROOT = Path(__file__).parents[2]
# The cluster's machine may be a busy one: a job takes about 20 s on two free cores.
TIMEOUT = 240
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
ONE_RANK = ("cluster.nodes=1", "cluster.tasks_per_node=1")
DEEPSPEED = ("engine.kind=deepspeed", "engine.zero_stage=1")
"""Of several ranks; as many as cpu-test has, four on two nodes, where nothing else is said."""


def write_run(folder: Path, file: str = "run.yaml", *, steps: int, **changes: Any) -> None:
    """Documents of words that are drawn, and the configuration of a run on them, which prepares them at its start."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    documents = [" ".join(draw.choices(words, k=200)) for _ in range(120)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    schedule = {"kind": "constant", "max_lr": 1e-3}
    tree = {
        "run_dir": "run",
        "tokenizer": {
            "path": "data/tokenizer.model",
            "train": {"documents": ["documents.jsonl"], "vocab_size": 300},
        },
        "sources": {"words": {"path": "data/words", "documents": ["documents.jsonl"], "validation": 0.3}},
        "model": {"vocab_size": 512, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2},
        "seq_length": 32,
        "global_batch_size": 8,
        "phases": [{"name": "words", "mixture": {"words": 1}, "steps": steps, "schedule": schedule}],
        "evaluation": {"sequences": 4},
        **changes,
    }
    (folder / file).write_text(yaml.safe_dump(tree, sort_keys=False))


def train(folder: Path, file: str, *settings: str) -> None:
    """The run on one rank, here and now."""
    command = [sys.executable, "-m", "megacl", "train", file, *settings]
    done = subprocess.run(command, cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def submit_command(file: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "megacl", "submit", file, "--cluster", "cpu-test", *arguments]


def submit(
    cluster: Cluster, folder: Path, file: str, *arguments: str, environment: Mapping[str, str] = ENVIRONMENT
) -> Job:
    """Submits the run, and returns the job that `megacl submit` names."""
    said = cluster.run(*submit_command(file, *arguments), environment=environment, cwd=folder, timeout=TIMEOUT)
    found = re.search(r"^job (\d+):", said, re.MULTILINE)
    assert found is not None, said
    return Job(cluster, found[1], folder)


def log_of(run_dir: Path) -> str:
    """All that its jobs have printed."""
    return "\n".join(path.read_text(errors="replace") for path in sorted((run_dir / "logs").glob("*.log")))


def step_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of its steps so far, as they stand in the file; the last line may be half written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == "step"]


def steps_and_losses(run_dir: Path) -> tuple[list[int], list[float]]:
    records = step_records(run_dir)
    return [record["step"] for record in records], [record["loss"] for record in records]
