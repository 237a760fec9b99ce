"""How the ranks of a job meet, on a real cluster: who does not come, two jobs at one port, and a node that is bad."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Prepared
from slurm_cluster import PATH, Cluster, Job, need_programs
from small_run import ENVIRONMENT, TIMEOUT

from megacl.attempts import read_attempts
from tests.runs import losses

SCRIPT = """\
#!/bin/bash
# One node has more ranks than processors: two jobs fit on it.
exec srun --export=ALL --overcommit --ntasks={ranks} bash -c {command}
"""
TRAIN = '\'exec "{python}" -m megacl train "{config}" engine.kind=deepspeed {settings}\''
# The first node that it is asked on has a broken GPU, and no other has any.
NVIDIA_SMI = """\
#!/bin/bash
mkdir "{folder}/asked" 2>/dev/null && echo "$SLURMD_NODENAME" >"{folder}/asked/node"
if [[ $(cat "{folder}/asked/node") == "$SLURMD_NODENAME" ]]; then
    echo "0, NVIDIA H100 80GB HBM3, 0, No, Yes, [N/A], Not Active"
else
    echo "No devices were found"
    exit 6
fi
"""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_programs()
    with Cluster() as started:
        yield started


def test_a_node_whose_ranks_do_not_start_is_named(cluster: Cluster, prepared: Prepared, tmp_path: Path) -> None:
    settings = "engine.rendezvous_timeout=5"
    train = TRAIN.format(python=sys.executable, config=prepared.config_file(tmp_path / "run"), settings=settings)
    command = train.replace("'exec", "'[[ $SLURM_NODEID == 0 ]] || exec sleep 600; exec")
    (tmp_path / "job").write_text(SCRIPT.format(ranks=4, command=command))
    options = ("--nodes=2", "--ntasks-per-node=2", "--time=10", "--output=%j.log")
    job = cluster.submit(*options, "job", environment=ENVIRONMENT, cwd=tmp_path)
    state = job.wait_for_end(timeout=TIMEOUT)
    assert state.name == "FAILED", job.log
    assert re.search(
        r"^RendezvousError: ranks 2-3 \(127\.0\.1\.2\) of 4 did not come to rank 0 at 127\.0\.1\.1:\d+ within 5 s; ",
        job.log,
        re.MULTILINE,
    ), job.log
    assert job.log.count("RendezvousError") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_two_jobs_on_one_node_and_at_one_port_both_finish(cluster: Cluster, prepared: Prepared, tmp_path: Path) -> None:
    options = ("--nodes=1", "--ntasks=1", "--nodelist=127.0.1.1", "--time=10", "--output=%j.log")
    jobs = []
    for name in ("one", "other"):
        config = prepared.config_file(tmp_path / name)
        command = TRAIN.format(python=sys.executable, config=config, settings="")
        (tmp_path / f"{name}.job").write_text(SCRIPT.format(ranks=2, command=command))
        environment = ENVIRONMENT | {"MASTER_PORT": "23117"}
        jobs.append(cluster.submit(*options, f"{name}.job", environment=environment, cwd=tmp_path))
    for job in jobs:
        state = job.wait_for_end(timeout=TIMEOUT)
        assert (state.name, state.exit_code) == ("COMPLETED", "0:0"), job.log
    assert losses(tmp_path / "one") == losses(tmp_path / "other")
    assert len(losses(tmp_path / "one")) == 20


def test_a_bad_node_is_named_and_left_out_when_the_job_is_requeued(
    cluster: Cluster, prepared: Prepared, tmp_path: Path
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(NVIDIA_SMI.format(folder=tmp_path))
    (programs / "nvidia-smi").chmod(0o755)
    words = ["submit", prepared.config_file(tmp_path / "run"), "--cluster", "cpu-test", "engine.kind=deepspeed"]
    words += ["cluster.nodes=1", "cluster.tasks_per_node=2", "cluster.restart_seconds=0"]
    said = cluster.run(
        *("env", f"PATH={programs}:{PATH}", sys.executable, "-m", "megacl", *words),
        environment=ENVIRONMENT,
        cwd=tmp_path,
        timeout=TIMEOUT,
    )
    found = re.search(r"^job (\d+):", said, re.MULTILINE)
    assert found is not None, said
    job = Job(cluster, found[1], tmp_path)
    state = job.wait_for_end(timeout=TIMEOUT)
    log = (tmp_path / "run" / "logs" / f"{job.number}.log").read_text()
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", "0:0", 1), log
    bad = (tmp_path / "asked" / "node").read_text().strip()
    assert f"UnhealthyError: {bad}: GPU 0 (NVIDIA H100 80GB HBM3) has no spare rows left for bad memory" in log
    assert bad not in read_attempts(tmp_path / "run")[-1].nodes
    assert len(losses(tmp_path / "run")) == 20
