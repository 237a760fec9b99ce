"""Looking at run directories in tests, and starting runs as a user does."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from megacl.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import Engine, build_engine
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from megacl.saving import Saving

WEIGHTS, OPTIMIZER, REPTILE = (f"{kind}-00000-of-00001.safetensors" for kind in ("weights", "optimizer", "reptile"))
"""The files of a checkpoint that one rank has made."""


def metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_dir, "step")]


def state(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, by name, as bytes: equal iff bitwise equal."""
    return {name: tensor.tobytes() for name, tensor in tensors(checkpoint, "*").items()}


def tensors(checkpoint: Path, kind: str = "weights") -> dict[str, Any]:
    """The tensors of a checkpoint's files of a kind, of all owners, by name."""
    files = sorted(checkpoint.glob(f"{kind}-*-of-*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def last_state(run_dir: Path) -> dict[str, Any]:
    return state(list_checkpoints(run_dir)[-1])


def status_of(code: str) -> int:
    """The exit status of a Python process of its own that runs `code`, and finds the modules that this one finds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode


def start(*arguments: str, launcher: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """`megacl ARGUMENTS` as a process of its own; launcher: `python -m` words to put before it, torchrun's for one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "megacl", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def command_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `megacl ARGUMENTS`, in this process."""
    from megacl import cli

    before = sys.argv
    sys.argv = ["megacl", *arguments]
    status: Any = 0
    try:
        cli.main()
    except SystemExit as leaving:
        status = leaving.code or 0
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return int(status), out, err


def to_save(
    ranks: Ranks, made: Path, run_dir: Path, tensor_parallel: int = 1, **settings: Any
) -> tuple[Engine, Saving, Checkpoint]:
    """A checkpoint in an engine of these ranks, what saves it into another run directory, and the checkpoint."""
    checkpoint = open_checkpoint(made)
    model = build_model(checkpoint.config.model, seed=0, device="meta")
    kind = "native" if ranks.world_size == 1 else "deepspeed"
    config = EngineConfig(kind=kind, tensor_parallel=tensor_parallel, **settings)
    engine = build_engine(model, engine=config, optimizer=OptimizerConfig(), ranks=ranks)
    checkpoint.load_into(engine)
    saving = Saving(engine, ranks, run_dir, config=checkpoint.config, tokenizer=checkpoint.tokenizer())
    return engine, saving, checkpoint
