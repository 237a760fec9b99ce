"""Chains and studies submitted to an sbatch that only writes down what it was asked: all are queued, or none."""

import getpass
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Prepared
from runs import command_line
from studies import study_of, write_study

from megacl.configfile import load_cluster
from megacl.publish import alone_in
from megacl.slurm.render import Job, render_script
from megacl.slurm.study_submit import read_study
from megacl.study_config import load_study
from megacl.study_results import done_file
from megacl.study_tree import build_tree

SBATCH = """\
#!/bin/bash
# Takes as many jobs as the file `room` says, and numbers them from 101 on.
here=$(dirname "$0")
queued=$(grep -c ^sbatch "$here/asked")
if ((queued >= $(cat "$here/room"))); then
    echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2
    exit 1
fi
echo "sbatch ${*:2}" >>"$here/asked"
echo $((101 + queued))
"""
SCANCEL = """\
#!/bin/bash
echo "scancel $*" >>"$(dirname "$0")/asked"
"""
SQUEUE = """\
#!/bin/bash
cat "$(dirname "$0")/squeue.txt"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the programs, with `asked`, what they were asked to do."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL, "squeue": SQUEUE}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "room").write_text("99")
    (folder / "asked").touch()
    (folder / "squeue.txt").touch()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.fixture
def chain(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chain of a run of two phases, its evaluations and a page, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(prepared.tree(Path("runs/model"))))
    steps = {
        "model": {"train": ["run.yaml"], "cluster": {"time": "30", "environment": {"WHO": "it's"}}},
        "quality": {"evaluate": {"run": "runs/model"}},
        "page": {"report": {"runs": ["runs/model"], "out": "page.html"}},
    }
    return write(tmp_path / "chain.yaml", steps)


def write(path: Path, steps: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"folder": "chain", "steps": steps}, sort_keys=False))
    return path


def queue(slurm: Path, told: dict[str, str]) -> None:
    """What squeue says from now on: a state and a reason, STATE|REASON, by job id."""
    lines = []
    for number, said in told.items():
        state, reason = said.split("|")
        lines.append("|".join([number, state, getpass.getuser(), "", "N/A", "N/A", "10:00", reason, "x.sbatch"]) + "\n")
    (slurm / "squeue.txt").write_text("".join(lines))


ONE_RANK = ("--cluster", "cpu-test", "cluster.nodes=1", "cluster.tasks_per_node=1")
Submit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def submit(capsys: pytest.CaptureFixture[str]) -> Submit:
    return lambda *arguments: command_line(capsys, "submit", *arguments)


def test_each_job_is_queued_behind_those_that_it_waits_for_and_remembered(
    slurm: Path, chain: Path, submit: Submit
) -> None:
    status, out, _ = submit(str(chain), *ONE_RANK)
    assert status == 0
    here = chain.parent
    run, own = f"{here}/runs/model/jobs", f"{here}/chain/jobs"
    after = "--dependency=afterok:{} --kill-on-invalid-dep=yes"
    assert (slurm / "asked").read_text().splitlines() == [
        f"sbatch {run}/0001/train.sbatch",
        f"sbatch {after.format('101')} {run}/0002/train.sbatch",
        f"sbatch {after.format('101')} {own}/0001/evaluate.sbatch",
        f"sbatch {after.format('102')} {own}/0002/evaluate.sbatch",
        f"sbatch {after.format('102')} {own}/0003/report.sbatch",
    ]
    record = json.loads((here / "chain" / "chain.json").read_text())
    assert record["file"] == str(chain)
    assert {name: job["job_id"] for name, job in record["jobs"].items()} == {
        "model.english": "101", "model.german": "102", "quality.english": "103", "quality.german": "104", "page": "105",
    }  # fmt: skip
    assert record["jobs"]["quality.german"]["after"] == ["model.german"]
    assert record["jobs"]["model.german"]["folder"] == f"{run}/0002"
    assert json.loads(Path(run, "0002", "job.json").read_text())["after"] == ["101"]
    script = Path(run, "0002", "train.sbatch").read_text()
    assert f"ranks train {run}/0002/config.yaml --until-phase german" in script
    assert "#SBATCH --time=30" in script
    assert "export WHO='it'\\''s'" in script
    assert "#SBATCH --time=10" in Path(own, "0001", "evaluate.sbatch").read_text()
    assert "page: job 105" in out
    queue(slurm, {"101": "COMPLETED|None", "104": "PENDING|Priority"})
    status, _, err = submit(str(chain), *ONE_RANK)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "its job quality.german (104) is pending; wait for it, or `megacl cancel" in err


def test_status_and_cancel_of_a_chain_are_those_of_all_its_jobs(
    slurm: Path, chain: Path, submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(str(chain), *ONE_RANK)
    told = {
        "101": "COMPLETED|None",
        "102": "PENDING|Priority",
        "103": "FAILED|NonZeroExitCode",
        "105": "PENDING|Dependency",
    }
    queue(slurm, told)
    status, out, _ = command_line(capsys, "status", "chain")
    assert status == 0
    rows = {line.split()[0]: line for line in out.splitlines()[2:7]}
    assert rows["model.english"].split() == ["model.english", "101", "completed"]
    assert "pending: jobs of a higher priority are before it" in rows["model.german"]
    assert "failed; " in rows["quality.english"]
    assert rows["quality.english"].endswith("chain/logs/103.log")
    assert "SLURM has forgotten how" in rows["quality.german"]
    assert "pending: it waits for other jobs" in rows["page"]
    status, out, _ = command_line(capsys, "status", "chain", "--json")
    assert status == 0
    (found,) = json.loads(out)
    assert found["folder"] == "chain"
    jobs = {job["name"]: job for job in found["jobs"]}
    states = {job["job"]: job["states"] for job in jobs.values()}
    pending = {"pending": 1}
    assert states == {"101": {"completed": 1}, "102": pending, "103": {"failed": 1}, "104": {}, "105": pending}
    assert jobs["model.german"]["why"] == "jobs of a higher priority are before it"
    assert jobs["quality.english"]["log"].endswith("chain/logs/103.log")
    assert jobs["model.english"]["why"] is None
    status, out, _ = command_line(capsys, "cancel", "chain")
    assert status == 0
    assert out.splitlines() == ["page: job 105 is cancelled", "model.german: job 102 is cancelled"]
    assert (slurm / "asked").read_text().splitlines()[5:] == ["scancel 105", "scancel 102"]


def test_where_a_job_is_not_taken_those_before_it_are_cancelled_and_nothing_is_left_behind(
    slurm: Path, chain: Path, submit: Submit
) -> None:
    (slurm / "room").write_text("3")
    status, _, err = submit(str(chain), *ONE_RANK)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "Job violates accounting/QOS policy The 3 jobs that were queued before it are cancelled." in err
    asked = (slurm / "asked").read_text().splitlines()
    assert asked[3:] == ["scancel 103", "scancel 102", "scancel 101"]
    assert not (chain.parent / "chain").exists()
    assert not (chain.parent / "runs").exists()


def test_a_submission_beside_another_one_takes_nothing_of_it_out(slurm: Path, chain: Path, submit: Submit) -> None:
    theirs = chain.parent / "runs" / "model"
    with alone_in(theirs / "jobs", "another"):
        status, _, err = submit(str(chain), *ONE_RANK)
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"{theirs}/jobs: another megacl submit is at work there" in err
    assert (theirs / "jobs").is_dir()
    assert not (chain.parent / "chain").exists()
    assert (slurm / "asked").read_text() == ""


def test_what_somebody_else_begins_meanwhile_beside_a_chain_that_is_not_taken_stays(
    slurm: Path, chain: Path, submit: Submit
) -> None:
    (slurm / "room").write_text("1")
    refuses = (slurm / "sbatch").read_text().replace("    exit 1", "    mkdir -p runs/other/jobs runs/model/x; exit 1")
    (slurm / "sbatch").write_text(refuses)
    assert submit(str(chain), *ONE_RANK)[0] == 2
    assert sorted(map(str, Path("runs").rglob("*"))) == ["runs/model", "runs/model/x", "runs/other", "runs/other/jobs"]


def test_a_dry_run_shows_scripts_and_order_and_queues_nothing(slurm: Path, chain: Path, submit: Submit) -> None:
    for program in ("sbatch", "squeue", "scancel"):
        (slurm / program).unlink()
    status, out, _ = submit(str(chain), *ONE_RANK, "--dry-run")
    assert status == 0
    assert out.count("#!/bin/bash") == 5
    assert "--until-phase german" in out
    table = [line.split() for line in out.splitlines()[-6:]]
    assert table[0] == ["job", "on", "after", "command"]
    assert table[-1][:5] == ["page", "1", "process", "model.german", "report"]
    assert not (chain.parent / "chain").exists()
    assert not (chain.parent / "runs").exists()


@pytest.mark.usefixtures("slurm")
def test_what_cannot_work_is_refused_before_anything_is_queued(chain: Path, prepared: Prepared, submit: Submit) -> None:
    def refusal(*arguments: str) -> str:
        status, _, err = submit(*arguments)
        assert (status, len(err.splitlines())) == (2, 1)
        return err

    file = str(chain)
    assert "steps.model:" in refusal(file, "--cluster", "cpu-test")  # native, on four ranks
    assert "only cluster.KEY=VALUE" in refusal(file, *ONE_RANK, "seed=3")
    assert "nods is not a setting" in refusal(file, *ONE_RANK, "cluster.nods=3")
    assert "--out and --at-once are a study's" in refusal(file, *ONE_RANK, "--out", "x")
    tree = prepared.tree(Path("runs/model"))
    tree["sources"]["english"]["path"] = "data/engish"
    Path("run.yaml").write_text(yaml.safe_dump(tree))
    words = {"inputs": ["raw"], "tokenizer": "t.model", "out": "data/english"}
    write(chain, {"words": {"prepare": words}, "model": {"train": ["run.yaml"], "after": ["words"]}})
    assert "steps.model: sources.english is data/engish, where no data is, and no step prepares it" in refusal(
        file, *ONE_RANK
    )
    study = write_study(Path("study.yaml"), study_of(prepared))
    assert "a study needs --out" in refusal(study, *ONE_RANK)
    assert not list(Path().glob("*/jobs"))


def test_only_the_runs_of_a_study_that_are_not_done_are_queued(prepared: Prepared, tmp_path: Path) -> None:
    file = write_study(tmp_path / "study.yaml", study_of(prepared))
    tree = build_tree(load_study(file), tmp_path / "out")
    first = [node.name for node in tree.nodes if node.parent is None]
    second = [node.name for node in tree.nodes if node.parent is not None]

    def queued() -> dict[str, tuple[tuple[str, ...], str | None, tuple[str, ...]]]:
        asked = read_study(file, tmp_path / "out", cluster="cpu-test", at_once=3)
        return {part.name: (part.runs, part.array, part.after) for part in asked.left}

    assert queued() == {
        "plan": ((), None, ()),
        "runs-1": (tuple(first), "1-2%3", ("plan",)),
        "runs-2": (tuple(second), "1-4%3", ("runs-1",)),
        "results": ((), None, ("runs-2",)),
    }
    for node in tree.nodes:
        if node.name not in (second[1], second[3]):
            done_file(node).parent.mkdir(parents=True)
            done_file(node).write_text(json.dumps({"key": node.key}))
    assert queued() == {
        "plan": ((), None, ()),
        "runs-2": ((second[1], second[3]), "1-2%3", ("plan",)),
        "results": ((), None, ("runs-2",)),
    }


def test_every_word_of_a_prepare_arrives_as_it_is(tmp_path: Path) -> None:
    job = Job(
        kind="prepare",
        name="words.tasks",
        run_dir=tmp_path / "chain",
        number=1,
        workdir=tmp_path,
        python=f"{tmp_path}/a python",
        command=("prepare", "it's raw", "$HOME", "--out", "a\nb", "--field", "x  y"),
        alone=True,
        gpus=False,
        array="1-2,5%2",
        tasks=5,
    )
    script = render_script(job, load_cluster("cpu-test"))
    assert "#SBATCH --array=1-2,5%2\n" in script
    (tmp_path / "a python").write_text('#!/bin/bash\nprintf "%s\\0" "$OMP_NUM_THREADS" "$@"\n')
    (tmp_path / "a python").chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    environment = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "5", "SLURM_CPUS_PER_TASK": "3", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([bash, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [
        "1", "-m", "megacl", "prepare", "it's raw", "$HOME", "--out", "a\nb", "--field", "x  y", "--workers", "3",
        "--task", "5/5",
    ]  # fmt: skip
