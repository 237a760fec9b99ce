"""Time lost per restart: from the end of an attempt to the first step of the next, of any run or of one made here.

    python tools/bench/restart.py RUN...            # what the attempts of runs have recorded
    python tools/bench/restart.py --rounds 5        # starts the tests' SLURM, and kills a rank so often

A line for each attempt behind the first, in seconds, and the median of each column:

    until start    from how the attempt before ended, as the job script learned it, until rank 0's process started: the
                   wait before a restart, srun; with a requeue, SLURM's queue
    until held     until the ranks had met and rank 0 held the run: Python's imports, the process group, lists of shards
    until step     until the first step was done: the engine, loading the checkpoint, the first step itself
    lost           all of them
    redone         steps that had been done and were done again, since the checkpoint was older

With --rounds the model is tiny and a checkpoint is saved every 5 steps, so that what is left is what any run pays.
"""

import argparse
import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megacl.attempts import read_attempts, read_outcome

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("until start", "until held", "until step", "lost", "redone")
TIMEOUT = 300
"""Seconds."""


def restarts(run_dir: Path) -> Iterator[list[float]]:
    """The columns of each attempt behind the first whose predecessor has an end and that has made a step."""
    attempts = read_attempts(run_dir)
    for before, attempt in itertools.pairwise(attempts):
        end = read_outcome(run_dir, before.number)
        if end is None or end.step is None or attempt.first_step is None:
            continue
        moments = [end.time, attempt.started, attempt.time, attempt.first_step]
        parts = [later - earlier for earlier, later in itertools.pairwise(moments)]
        yield [*parts, sum(parts), float(max(0, end.step - attempt.step))]


def print_table(run_dir: Path) -> None:
    """The restarts of a run, and their medians."""
    rows = list(restarts(run_dir))
    print(f"{run_dir}: {len(rows)} restarts\n" + "  ".join(f"{name:>11}" for name in COLUMNS))
    for row in rows:
        print("  ".join(f"{value:11.1f}" for value in row))
    if rows:
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        print("  ".join(f"{value:11.1f}" for value in medians) + "   median", flush=True)


def measure(rounds: int, folder: Path) -> None:
    """Kills one of two ranks of a run, on a cluster on this machine, `rounds` times, and prints what that cost."""
    sys.path.insert(0, str(ROOT / "tests" / "slurm"))
    from slurm_cluster import Cluster
    from small_run import DEEPSPEED, submit, train, write_run

    write_run(folder, steps=100_000, checkpoint={"every_steps": 5}, evaluation={"sequences": 1})
    train(folder, "run.yaml", "run_dir=once", "phases[0].steps=1")  # which prepares the data
    with Cluster() as cluster:
        # On one node: of several, the one that loses ranks again and again is left out, and the job waits for another.
        two_ranks = (*DEEPSPEED, "cluster.nodes=1", "cluster.tasks_per_node=2", "cluster.restart_seconds=0")
        job = submit(cluster, folder, "run.yaml", *two_ranks)
        for number in range(1, rounds + 2):
            began = time.monotonic()

            def trains(number: int = number) -> bool:
                return any(each.number == number and each.first_step for each in read_attempts(folder / "run"))

            job.wait_until(trains, timeout=TIMEOUT)
            print(f"attempt {number}: its first step after {time.monotonic() - began:.1f} s", flush=True)
            if number <= rounds:
                time.sleep(2)  # some steps, a checkpoint among them: progress
                os.kill(job.task(rank=1), signal.SIGKILL)
        print_table(folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--rounds", type=int, help="measure on a cluster that is started here")
    arguments = parser.parse_args()
    for run_dir in arguments.runs:
        print_table(run_dir)
    if arguments.rounds:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
