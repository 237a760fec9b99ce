"""The benchmark for GPUs runs from end to end on a CPU, and says what it is for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "tools/bench/gpu.py"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = run()
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "there is no GPU here" in done.stderr


@pytest.mark.long
def test_the_tiny_shape_fills_every_part_of_the_table():
    done = run("--shape", "tiny")
    assert done.returncode == 0, done.stderr
    for row in ("| megacl | 2 | ", "| megacl, compile | 2 | ", "linear_cross_entropy", "| 2 ranks, 0 MiB | "):
        assert row in done.stdout
