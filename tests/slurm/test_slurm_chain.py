"""Chains and studies on a real cluster of two nodes: a failing task, a cancelled step, all outputs."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Prepared
from runs import command_line, losses
from safetensors.numpy import load_file
from slurm_cluster import Cluster, need_programs
from small_run import ENVIRONMENT, ONE_RANK
from studies import study_of, write_study

from megacl.configfile import from_tree
from megacl.job_states import ENDED
from megacl.trainer import train

TIMEOUT = 600  # ten jobs on a busy machine

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_programs()
    with Cluster() as started:
        yield started


def submit(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """What `megacl submit` says."""
    return megacl(cluster, folder, "submit", *arguments, "--cluster", "cpu-test")


def megacl(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """What a command of megacl's says, given in that folder."""
    return cluster.run(sys.executable, "-m", "megacl", *arguments, environment=ENVIRONMENT, cwd=folder, timeout=TIMEOUT)


def jobs_of(folder: Path) -> dict[str, dict[str, Any]]:
    jobs: dict[str, dict[str, Any]] = json.loads((folder / "chain.json").read_text())["jobs"]
    return jobs


def states_of(cluster: Cluster, folder: Path) -> dict[str, str]:
    """The state of each job that was queued, by its name; of an array, those of its tasks, sorted."""
    shown = cluster.run("squeue", "--noheader", "--states=all", "--format=%F %K %T").splitlines()
    tasks: dict[str, list[tuple[str, str]]] = {}
    for line in shown:
        number, task, state = line.split()
        tasks.setdefault(number, []).append((task, state))
    return {
        name: " ".join(state for _, state in sorted(tasks[job["job_id"]]))
        for name, job in jobs_of(folder).items()
        if job["job_id"] is not None
    }


def wait_for_end(cluster: Cluster, folder: Path) -> dict[str, str]:
    """The states in which the jobs ended; AssertionError, with all that they have said, where it takes too long."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        states = states_of(cluster, folder)
        if all(state in ENDED for found in states.values() for state in found.split()):
            return states
        assert time.monotonic() < deadline, f"{states}\n{said_by(folder)}"
        time.sleep(0.3)


def said_by(folder: Path) -> str:
    """The logs of all jobs."""
    lines = []
    for name, job in jobs_of(folder).items():
        for log in Path("/").glob(job["log"].replace("%a", "*").lstrip("/")) if job["log"] else ():
            lines.append(f"---- {name}: {log}\n{log.read_text(errors='replace')}")
    return "\n".join(lines)


def write_chain(path: Path, steps: dict[str, Any]) -> str:
    """Jobs have one rank each where a step does not say otherwise."""
    one_rank = {"nodes": 1, "tasks_per_node": 1}
    path.write_text(yaml.safe_dump({"folder": "chain", "cluster": one_rank, "steps": steps}, sort_keys=False))
    return path.name


def test_a_chain_whose_array_has_a_failing_task_goes_on_where_it_is_submitted_again_and_makes_all_that_it_names(
    cluster: Cluster, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    documents = prepared.documents["english"].read_text().splitlines(keepends=True)
    Path("raw of 2026").mkdir()
    for number in range(2):
        Path(f"raw of 2026/{number}.jsonl").write_text("".join(documents[number::2]))
    broken = Path("raw of 2026/1.jsonl")
    whole = broken.read_text()
    broken.write_text("[" + whole[1:])  # of the same size

    tree = prepared.tree(Path("runs/model"), seed=5, engine={"kind": "deepspeed", "zero_stage": 1})
    tree["sources"]["english"]["path"] = "data/english"
    for phase in tree["phases"]:
        phase["schedule"] = {
            "kind": "infinite",
            "max_lr": 5e-3,
            "constant_lr": 2e-3,
            "warmup": "1 steps",
            "cooldown": "2 steps",
        }
    Path("run.yaml").write_text(yaml.safe_dump(tree))
    held_out = ["--validation", "0.2", "--source", "english"]
    steps = {
        "english": {
            "prepare": {
                "inputs": ["raw of 2026"],
                "tokenizer": str(prepared.tokenizer),
                "out": "data/english",
                "tasks": 2,
                "options": held_out,
            }
        },
        "model": {"train": ["run.yaml"], "cluster": {"nodes": 2, "tasks_per_node": 2}},
        "quality": {"evaluate": {"run": "runs/model"}},
        "october": {"release": {"run": "runs/model", "out": "runs/october", "anneal": "1000"}},
        "hf": {"convert": {"source": "runs/october", "out": "exports/october"}},
        "page": {"report": {"runs": ["runs/model", "runs/october"], "out": "page.html"}},
    }
    file = write_chain(tmp_path / "chain.yaml", steps)
    submit(cluster, tmp_path, file)
    (shown,) = json.loads(megacl(cluster, tmp_path, "status", "chain", "--json"))
    (array,) = (job for job in shown["jobs"] if job["name"] == "english.tasks")
    assert sum(array["states"].values()) == 2
    states = wait_for_end(cluster, tmp_path / "chain")
    assert states.pop("english.tasks") == "FAILED COMPLETED", said_by(tmp_path / "chain")
    assert set(states.values()) == {"CANCELLED"}
    assert len(states) == 8
    assert "1.jsonl" in said_by(tmp_path / "chain")

    broken.write_text(whole)
    submit(cluster, tmp_path, file)
    jobs = jobs_of(tmp_path / "chain")
    assert jobs["english.tasks"]["array"] == "1"
    states = wait_for_end(cluster, tmp_path / "chain")
    assert set(states.values()) == {"COMPLETED"}, said_by(tmp_path / "chain")
    assert len(states) == 9

    call = ("prepare", "raw of 2026", "--tokenizer", str(prepared.tokenizer), "--out", "alone", "--workers", "1")
    assert command_line(capsys, *call, *held_out)[0] == 0
    made, expected = ({f.name: f.read_bytes() for f in Path(at).glob("[!.]*")} for at in ("data/english", "alone"))
    assert made == expected
    for name in ("model.english", "model.german"):
        assert "4 rank(s)" in Path(jobs[name]["log"]).read_text()
    train(from_tree({**tree, "run_dir": "runs/alone", "engine": {"kind": "native"}}))
    np.testing.assert_allclose(losses(Path("runs/model")), losses(Path("runs/alone")), rtol=1e-5)
    for phase in ("english", "german"):
        found = json.loads(Path(f"runs/model/evaluations/{phase}.json").read_text())
        _, out, _ = command_line(capsys, "evaluate", f"runs/model@{phase}", "--json")
        assert found["sources"] == json.loads(out)["sources"]
    assert command_line(capsys, "convert", "runs/october", "exports/again", "--to", "hf")[0] == 0
    made, expected = (
        {name: array.tobytes() for name, array in load_file(f"exports/{at}/model.safetensors").items()}
        for at in ("october", "again")
    )
    assert made == expected
    page = Path("page.html").read_text()
    assert "model" in page
    assert "october" in page
    assert "all is done already" in submit(cluster, tmp_path, file)


def test_the_steps_behind_one_that_is_cancelled_are_cancelled_too(
    cluster: Cluster, prepared: Prepared, tmp_path: Path
) -> None:
    tree = prepared.tree(tmp_path / "runs" / "model")
    tree["phases"][0]["tokens"] = tree["phases"][0].pop("steps") * 10**9
    tree["sources"] = {name: {"path": str(path)} for name, path in prepared.sources.items()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    steps = {
        "model": {"train": ["run.yaml"]},
        "quality": {"evaluate": {"run": "runs/model"}},
        "page": {"report": {"runs": ["runs/model"], "out": "page.html"}},
    }
    file = write_chain(tmp_path / "chain.yaml", steps)
    submit(cluster, tmp_path, file)
    folder, metrics = tmp_path / "chain", tmp_path / "runs" / "model" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not metrics.is_file():
        assert time.monotonic() < deadline, said_by(folder)
        time.sleep(0.3)
    with pytest.raises(AssertionError, match=r"its job model.english \(\d+\) is running; wait for it, or"):
        submit(cluster, tmp_path, file)
    cluster.run("scancel", jobs_of(folder)["model.english"]["job_id"])
    states = wait_for_end(cluster, folder)
    assert set(states.values()) == {"CANCELLED"}, said_by(folder)
    assert len(states) == 5


def test_the_runs_of_a_study_as_arrays_give_the_results_of_the_study_alone(
    cluster: Cluster, prepared: Prepared, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", ENVIRONMENT["OMP_NUM_THREADS"])  # results say it
    file = write_study(tmp_path / "study.yaml", study_of(prepared, seeds=[0]))
    said = submit(cluster, tmp_path, file, "--out", "out", "--at-once", "2", *ONE_RANK)
    assert re.search(r"runs-2 +array 1-2, 2 at a time +runs-1", said), said
    states = wait_for_end(cluster, tmp_path / "out")
    done = "COMPLETED"
    assert states == {"plan": done, "runs-1": done, "runs-2": f"{done} {done}", "results": done}, said_by(
        tmp_path / "out"
    )
    assert command_line(capsys, "study", file, "--out", str(tmp_path / "alone"), "--jobs", "1")[0] == 0
    made, expected = (without_clock(tmp_path / folder / "results.json") for folder in ("out", "alone"))
    assert made == expected


def without_clock(path: Path) -> str:
    """What a file says, but for when each run was done."""
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "TIME", path.read_text())
