"""How ranks find one another, and what they say."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megacl.errors import DataError, LaunchError, RendezvousError
from megacl.parallel.ranks import Ranks, start_ranks, stop_ranks
from tests.ranks import run_on_ranks

NAMES = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"),
]


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher in an environment that has none of them."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def update(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return update


def conversation(ranks: Ranks) -> dict:
    mine = np.array([1.0, ranks.rank, 0.1])
    heard = {
        "nobody": ranks.any(False),
        "one": ranks.any(ranks.rank == ranks.world_size - 1),
        "sum": ranks.sum(mine).tolist(),
        "object": ranks.broadcast({"from": ranks.rank}),
    }
    assert mine.tolist() == [1.0, ranks.rank, 0.1]
    return heard


def test_two_ranks_hear_the_same():
    expected = {"nobody": False, "one": True, "sum": [2.0, 1.0, 0.2], "object": {"from": 0}}
    assert run_on_ranks(2, conversation) == [expected, expected]


def test_one_rank_talks_to_itself():
    expected = {"nobody": False, "one": True, "sum": [1.0, 0.0, 0.1], "object": {"from": 0}}
    assert conversation(Ranks()) == expected


def test_without_a_launcher_there_is_one_rank(environment):
    assert start_ranks(timeout=1) == Ranks(rank=0, world_size=1, local_rank=0)


def test_torchrun_with_one_process_is_one_rank(environment):
    environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert start_ranks(timeout=1) == Ranks()
    stop_ranks()


def test_a_batch_script_without_srun_is_one_rank(environment):
    environment(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="4", SLURM_JOB_ID="7")
    assert start_ranks(timeout=1) == Ranks()


def test_a_variable_that_torchrun_would_have_set_is_named(environment):
    environment(RANK="0", WORLD_SIZE="2", MASTER_PORT="29500")
    with pytest.raises(LaunchError, match=r"^LOCAL_RANK, MASTER_ADDR not set beside RANK and WORLD_SIZE; "):
        start_ranks(timeout=1)


def test_ranks_that_do_not_come_are_missed_in_one_line(environment):
    environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with pytest.raises(
        RendezvousError, match=r"^rank 1 of 2 did not come to rank 0 at 127.0.0.1:\d+ within 0.5 s; see "
    ) as error:
        start_ranks(timeout=60, rendezvous_timeout=0.5)
    assert "\n" not in str(error.value)
    assert error.value.ranks == (1,)


def test_without_scontrol_the_master_is_asked_for(environment):
    environment(SLURM_STEP_ID="0", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="2", SLURM_JOB_ID="7", PATH="")
    with pytest.raises(LaunchError, match="set MASTER_ADDR to the host of rank 0"):
        start_ranks(timeout=1)


def test_tasks_of_srun_meet_on_the_first_host_at_a_port_of_their_job(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\n127.0.0.2\\n"\n')
    scontrol.chmod(0o755)
    job = (free_port() - 10000) * pow(7, -1, 20000) % 20000  # whose port is free
    program = (
        "import os, numpy, megacl.parallel.ranks as r; ranks = r.start_ranks(timeout=60)\n"
        "print(ranks.rank, ranks.world_size, ranks.local_rank)\n"
        "print(ranks.sum(numpy.ones(1))[0], os.environ['MASTER_ADDR'])\n"
        "r.stop_ranks()"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=inherited
            | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": task, "SLURM_LOCALID": task}
            | {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "node[1-2]",
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
            },
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in ("0", "1")
    ]
    said = [task.communicate(timeout=90)[0].strip() for task in tasks]
    assert said == ["0 2 0\n2.0 127.0.0.1", "1 2 1\n2.0 127.0.0.1"]


def free_port() -> int:
    """A port between 10000 and 29999 that nobody listens on."""
    for port in range(10007, 29999, 13):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def failing_on(ranks: Ranks, rank: int) -> str:
    try:
        with ranks.together():
            if ranks.rank == rank:
                raise DataError(f"rank {rank} found something")
    except DataError as error:
        return str(error)
    return "nothing"


def test_what_one_rank_finds_wrong_ends_the_block_on_all():
    assert run_on_ranks(2, failing_on, 1) == ["rank 1 found something"] * 2
    assert run_on_ranks(2, failing_on, 7) == ["nothing"] * 2
    assert failing_on(Ranks(), 0) == "rank 0 found something"
