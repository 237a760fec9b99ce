"""A study in an allocation of two nodes, on a real cluster: a run on each, and one that is stopped goes on."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Prepared
from slurm_cluster import Cluster, Job, need_programs
from small_run import ENVIRONMENT
from studies import study_of, write_study

TIMEOUT = 300
SCRIPT = """\
#!/bin/bash
# The shape of slurm/study.sbatch, which docs/studies.md speaks of, with this Python.
exec "{python}" -m megacl study "{file}" --out "{out}"
"""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_programs()
    with Cluster() as started:
        yield started


def submit(cluster: Cluster, folder: Path, file: str, *options: str) -> Job:
    script = folder / "study.sbatch"
    script.write_text(SCRIPT.format(python=sys.executable, file=file, out=folder / "out"))
    return cluster.submit(
        *("--nodes=2", "--ntasks-per-node=1", "--time=10", "--output=%j.log", *options, str(script)),
        environment=ENVIRONMENT,
        cwd=folder,
    )


def test_the_runs_of_a_study_go_to_both_nodes_at_once(cluster: Cluster, prepared: Prepared, tmp_path: Path) -> None:
    tree = study_of(prepared)
    for phase in tree["phases"].values():
        phase["steps"] = 40
    file = write_study(tmp_path / "study.yaml", tree)
    job = submit(cluster, tmp_path, file)
    logs = tmp_path / "out" / "runs"
    nodes: set[str] = set()

    def seen_on_both() -> bool:
        shown = cluster.run("squeue", "--noheader", "--steps", "--format=%N %j").splitlines()
        nodes.update(line.split()[0] for line in shown if "python" in line)
        return len(nodes) == 2

    job.wait_until(seen_on_both, timeout=TIMEOUT)
    state = job.wait_for_end(timeout=TIMEOUT)
    assert (state.name, state.exit_code) == ("COMPLETED", "0:0"), job.log
    assert len(list(logs.glob("*/*/done.json"))) == 6
    assert json.loads((tmp_path / "out" / "results.json").read_text())["bars"][0]["state"] == "held"


def test_a_study_that_is_told_to_stop_saves_on_all_nodes_and_goes_on(
    cluster: Cluster, prepared: Prepared, tmp_path: Path
) -> None:
    tree = study_of(prepared)
    tree["phases"]["english"]["steps"] = 3000
    file = write_study(tmp_path / "study.yaml", tree)
    job = submit(cluster, tmp_path, file)
    job.wait_until(lambda: len(list(tmp_path.glob("out/runs/*/*/metrics.jsonl"))) == 2, timeout=TIMEOUT)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    state = job.wait_for_end(timeout=TIMEOUT)
    assert (state.name, state.exit_code) == ("FAILED", "75:0"), job.log
    assert "the runs have saved" in job.log
    assert len(list(tmp_path.glob("out/runs/*/*/checkpoints/step-*"))) >= 2
    for run in tmp_path.glob("out/runs/*/english-*"):
        assert "told to stop: saved at step" in (run / "logs" / "run.log").read_text()
