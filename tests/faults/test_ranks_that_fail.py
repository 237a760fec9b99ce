"""Ranks of which one fails, without SLURM: what they leave says who, where and why.

Those that hang are in tests/slurm/test_slurm_failures.py.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Prepared
from runs import losses, metrics

from megacl.attempts import read_attempts, read_outcome, read_words
from megacl.holders import node_here

pytestmark = pytest.mark.long

PATIENCE = 240
# A rank's Python begins with it: rank 1 fails at its sixth step.
FAILER = """
import os
if os.environ.get("RANK") == "1":
    from megacl.engine import base
    step = base.Engine.step
    def failing(self, *arguments, **options):
        if self._steps == 5:
            raise ValueError('a bug on one rank')
        return step(self, *arguments, **options)
    base.Engine.step = failing
"""
# Rank 1 is stopped while the first save is published.
STOPPER = """
import os, signal
if os.environ.get("RANK") == "1":
    from megacl.saves import Saves
    published = Saves._published
    def stopping(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGSTOP)
        return published(self, *arguments, **options)
    Saves._published = stopping
"""


class SeveralRanks:
    """A run on ranks of this machine. Entered, it is under way; nothing of it is left behind."""

    def __init__(self, config: str, folder: Path, custom: str = "", count: int = 2) -> None:
        (folder / "custom").mkdir(exist_ok=True)
        (folder / "custom" / "start.py").write_text(
            f"{custom}\nimport runpy, sys\nsys.argv[0] = 'megacl'\nrunpy.run_module('megacl', run_name='__main__')\n"
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [folder / f"rank-{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with open(log, "wb") as file:
                process = subprocess.Popen(
                    [sys.executable, str(folder / "custom" / "start.py"), "train", config],
                    env={**os.environ, **place, **meeting, "OMP_NUM_THREADS": "1"},
                    stdout=file,
                    stderr=file,
                )
            self.processes.append(process)

    def __enter__(self) -> "SeveralRanks":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, rank: int) -> int:
        return self.processes[rank].wait(PATIENCE)

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.log(0) + self.log(1)
            assert time.monotonic() < deadline, self.log(0) + self.log(1)
            time.sleep(0.05)


@pytest.fixture
def config(prepared: Prepared, tmp_path: Path) -> str:
    tree = prepared.tree(tmp_path / "run", engine={"kind": "deepspeed", "timeout": 64})
    steps = {"english": 600, "german": 8}
    phases = [{**phase, "steps": steps[phase["name"]]} for phase in tree["phases"]]
    return prepared.config_file(tmp_path / "run", engine=tree["engine"], phases=phases, checkpoint={"every_steps": 3})


def has_steps(run_dir: Path, count: int) -> Callable[[], bool]:
    return lambda: (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir, "step")) >= count


def test_a_killed_rank_is_named_by_its_peer_in_one_line(config: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with SeveralRanks(config, tmp_path) as ranks:
        ranks.until(has_steps(run_dir, 7))
        ranks.processes[1].kill()
        assert ranks.wait(0) == 1
        assert "Traceback" not in ranks.log(0)
        assert ranks.log(0).count("LostPeerError: rank 0 lost another rank") == 1
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.outcome, outcome.rank, outcome.node, outcome.attempt) == ("lost_rank", 1, node_here(), 1)
    assert outcome.step in (len(losses(run_dir)), len(losses(run_dir)) - 1)
    assert f"rank 1 on {node_here()} died" in outcome.message
    assert [words.kind for words in read_words(run_dir, 1)] == ["lost_peer"]


def test_a_rank_with_a_bug_is_the_cause_and_not_its_peer(config: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with SeveralRanks(config, tmp_path, FAILER) as ranks:
        assert (ranks.wait(0), ranks.wait(1)) == (1, 1)
        assert "ValueError: a bug on one rank" in ranks.log(1)
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.outcome, outcome.exit_status, outcome.rank, outcome.step) == ("failed", 1, 1, 5)
    assert "step 6: ValueError: a bug on one rank" in outcome.message


def test_a_rank_that_is_stopped_while_the_others_wait_for_a_save_as_long_as_it_takes_is_missed(
    config: str, tmp_path: Path
) -> None:
    settings = Path(config).read_text()
    Path(config).write_text(settings.replace("timeout: 64", "timeout: 32"))
    with SeveralRanks(config, tmp_path, STOPPER, count=3) as ranks:
        assert (ranks.wait(0), ranks.wait(2)) == (76, 76)
        assert "Traceback" not in ranks.log(0)
    outcome = read_outcome(tmp_path / "run")
    assert outcome is not None
    assert (outcome.outcome, outcome.exit_status, outcome.rank) == ("hung", 76, 1)
    assert f"rank 1 on {node_here()} gave no sign of life" in outcome.message
    assert "stopped, or its node is gone; the others: publishing the save of step 3" in outcome.message
    assert [(words.rank, words.missed) for words in read_words(tmp_path / "run", 1)] == [(0, (1,)), (2, (1,))]


def test_usr2_shows_what_a_rank_is_doing_and_it_goes_on(config: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stacks = run_dir / "attempts" / "0001" / "stacks-1.txt"
    with SeveralRanks(config, tmp_path) as ranks:
        ranks.until(has_steps(run_dir, 4))
        ranks.processes[1].send_signal(signal.SIGUSR2)
        ranks.until(stacks.exists)
        seen = len(metrics(run_dir, "step"))
        ranks.until(has_steps(run_dir, seen + 3))
        for process in ranks.processes:
            process.terminate()
        assert (ranks.wait(0), ranks.wait(1)) == (75, 75)
    assert "_train_phase" in stacks.read_text()
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.outcome, outcome.exit_status) == ("stopped", 75)
    assert outcome.step == len(losses(run_dir))
    assert [attempt.step for attempt in read_attempts(run_dir)] == [0]
