"""A run that is killed again and again, at random moments, ends as if it had never been disturbed."""

import random
import time
from pathlib import Path

import pytest
import torch
from conftest import Prepared
from runs import last_state, losses, metrics, start

from megacl.checkpoint import list_checkpoints, verify_checkpoint
from megacl.configfile import from_tree
from megacl.trainer import train

ROUNDS = 15


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_a_run_ends_bitwise_as_if_undisturbed(
    prepared: Prepared, tmp_path: Path, seed: int
) -> None:
    """SIGKILL between the first second and the end, aimed at saves too: one after every step."""
    changes = {"checkpoint": {"every_steps": 1, "keep_last": 2}, "evaluation": {"every_steps": 3, "sequences": 4}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes below
    train(from_tree(prepared.tree(tmp_path / "whole", **changes)))
    torch.set_num_threads(threads)

    draw = random.Random(seed)
    config = prepared.config_file(tmp_path / "run", **changes)
    status, kills = None, 0
    while status != 0:
        process = start("train", config)
        if kills < ROUNDS:
            time.sleep(draw.uniform(1.0, 3.0))  # the first step is made after about 1.5 s
            process.kill()
        _, err = process.communicate(timeout=120)
        status = process.returncode
        assert status in (0, -9), err
        kills += 1
        for checkpoint in list_checkpoints(tmp_path / "run"):
            assert verify_checkpoint(checkpoint) == []
        assert kills <= ROUNDS + 1
    assert last_state(tmp_path / "run") == last_state(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    evaluations = [(record["step"], record["sources"]) for record in metrics(tmp_path / "run", "evaluation")]
    assert evaluations == [(r["step"], r["sources"]) for r in metrics(tmp_path / "whole", "evaluation")]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.tmp"))
