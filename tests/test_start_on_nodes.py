"""How a run of several ranks starts: each node is looked at first, and files that all need are read by one rank."""

import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import Prepared

ROOT = Path(__file__).parents[1]
RANKS = 2
TIMEOUT = 240
# Python runs it at its start: each rank writes down what it opens, whoever opens it.
COUNTING = """\
import os, sys
_file = os.open(os.environ["OPENED"] + "/" + os.environ["RANK"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def _hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        os.write(_file, os.fsencode(arguments[0]) + b"\\n")
sys.addaudithook(_hook)
"""

pytestmark = pytest.mark.long


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(config: str, *overrides: str, second: Mapping[str, str] | None = None, **environment: str) -> list[str]:
    """A run on two nodes of a rank each, n0 and n1: what each rank wrote, with its exit status in front.

    second: what is different in the environment of n1.
    """
    common = {"WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-P", "-m", "megacl", "train", config, "engine.kind=deepspeed", *overrides]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ
            | common
            | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"}
            | (dict(second or {}) if rank else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [rank.communicate(timeout=TIMEOUT)[0] for rank in ranks]
    return [f"{rank.returncode}: {text}" for rank, text in zip(ranks, said, strict=True)]


def opened(folder: Path, below: Path) -> list[Counter[str]]:
    """How often each rank opened each file below a folder."""
    found = []
    for rank in range(RANKS):
        paths = [Path(line) for line in (folder / str(rank)).read_text().splitlines()]
        found.append(Counter(str(path.relative_to(below)) for path in paths if path.is_relative_to(below)))
    return found


def test_what_all_ranks_need_is_read_by_one_and_each_node_is_said_to_be_healthy(
    prepared: Prepared, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(COUNTING)
    config = prepared.config_file(tmp_path / "run")
    for name, arguments in (("begins", ["--until-phase", "english"]), ("goes on", [])):
        counts = tmp_path / name
        counts.mkdir()
        first, second = train(config, *arguments, PYTHONPATH=f"{site}:{ROOT}", OPENED=str(counts))
        assert first.startswith("0: healthy: 2 node(s), "), first
        assert second == "0: "
        data, run = opened(counts, prepared.folder), opened(counts, tmp_path / "run")
        # A node looks at the manifests as it sees them; shards are maps, which nobody opens this way.
        assert data[1] == {"english/manifest.json": 1, "german/manifest.json": 1}
        assert data[0]["english/tokenizer.model"] == 1
        # What the second rank reads of a checkpoint is the tensors that it takes, and where they stand; before it
        # writes its part of one, whether the run is still its own.
        small = {Path(path).name for path in run[1] if not path.endswith((".safetensors", ".tmp"))}
        assert small == {"incarnation.json"} | ({"index.json"} if arguments == [] else set())
    assert {"config.yaml", "checkpoints/step-00000012/state.json"} <= set(run[0])


def test_a_node_with_other_code_is_named_and_nothing_is_begun(prepared: Prepared, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "megacl", other / "megacl", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "megacl" / "schedules.py", "a") as file:
        file.write("# a change that only one node has\n")
    config = prepared.config_file(tmp_path / "run")
    first, second = train(config, second={"PYTHONPATH": str(other)})
    assert first.startswith("2: UnhealthyError: n1: has megacl "), first
    assert first.endswith("Leave out what cannot be put right: sbatch --exclude=n1\n")
    assert second == "2: "
    assert not (tmp_path / "run").exists()


def test_a_node_whose_gpu_is_broken_is_named(prepared: Prepared, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "0, NVIDIA H100 80GB HBM3, 3, No, No, [N/A], Not Active"\n')
    program.chmod(0o755)
    config = prepared.config_file(tmp_path / "run")
    first, second = train(config, second={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert first.startswith("2: UnhealthyError: n1: GPU 0 (NVIDIA H100 80GB HBM3) has had 3 memory error(s)"), first
    assert second == "2: "
