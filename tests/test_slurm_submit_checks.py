"""What `megacl submit` refuses before anything is queued, and what it freezes, with programs that play SLURM."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Prepared
from runs import command_line

import megacl
from megacl.config_cluster import ClusterConfig
from megacl.publish import alone_in
from megacl.slurm.freeze import freeze

Capture = pytest.CaptureFixture[str]
CLUSTER = {"nodes": 1, "tasks_per_node": 2, "time": "10", "memory": "4G"}
FAKES = {
    "sbatch": '#!/bin/sh\nfor last; do :; done\ncat "$last" > "$0.script"; env > "$0.env"\necho 71\n',
    "squeue": "#!/bin/sh\ntouch $0.jobs; cat $0.jobs\n",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that play SLURM: sbatch takes everything as job 71, squeue prints the file squeue.jobs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


class Command:
    """`megacl submit` of a small run, with changes."""

    def __init__(self, prepared: Prepared, folder: Path, capsys: Capture) -> None:
        self.run_dir, self.capsys = folder / "runs" / "a run", capsys
        self.config, self.cluster = str(folder / "run.yaml"), str(folder / "cluster.yaml")
        Path(self.config).write_text(yaml.safe_dump(prepared.tree(self.run_dir)))
        Path(self.cluster).write_text(yaml.safe_dump(CLUSTER))

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        words = ["engine.kind=deepspeed", *arguments, "--cluster", self.cluster]
        return command_line(self.capsys, "submit", self.config, *words)

    def refusal(self, *arguments: str) -> str:
        """The one line that it is refused with; nothing is left behind."""
        before = sorted(self.run_dir.parent.rglob("*")) if self.run_dir.parent.exists() else None
        status, _, err = self(*arguments)
        assert status == 2
        assert "Traceback" not in err
        assert (sorted(self.run_dir.parent.rglob("*")) if self.run_dir.parent.exists() else None) == before
        return err.strip().splitlines()[-1]


@pytest.fixture
def submit(prepared: Prepared, slurm: Path, capsys: Capture) -> Command:
    return Command(prepared, slurm.parent, capsys)


def record(run_dir: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "jobs" / f"{number:04d}" / "job.json").read_text())
    return found


def test_what_the_job_runs_is_frozen_in_the_run_directory(submit: Command, slurm: Path) -> None:
    status, said, _ = submit("cluster.environment.GIVEN=yes it is", "--name", "a name")
    assert status == 0
    assert "job 71: " in said
    assert "4 GB" not in said
    folder = submit.run_dir / "jobs" / "0001"
    commit = json.loads((folder / "code.json").read_text())["commit"]  # none where the tests lie in no git checkout
    assert {file.name for file in folder.iterdir()} == {
        "job.json", "train.sbatch", "config.yaml", "cluster.yaml", "code", "code.json", "packages.txt",
        *(["code.diff"] if commit else []),
    }  # fmt: skip
    script = (folder / "train.sbatch").read_text()
    assert (slurm / "sbatch.script").read_text() == script
    assert "export GIVEN='yes it is'\n" in script
    assert '#SBATCH --job-name="a name"\n' in script
    assert re.search(r"^numpy==", (folder / "packages.txt").read_text(), re.MULTILINE)
    found = record(submit.run_dir, 1)
    assert (found["job_id"], found["kind"], found["log"]) == ("71", "train", f"{submit.run_dir}/logs/71.log")
    assert found["command"] == ["train", str(folder / "config.yaml")]
    # The copy is whole, with what comes beside the code.
    command = [sys.executable, "-P", "-c", "from megacl.configfile import shipped; print(shipped('examples'))"]
    done = subprocess.run(command, env={"PYTHONPATH": str(folder / "code")}, capture_output=True, text=True)
    assert done.stdout.strip() == str(folder / "code" / "examples"), done.stderr
    assert (folder / "code" / "megacl" / "cli.py").read_bytes() == Path(megacl.__file__).with_name(
        "cli.py"
    ).read_bytes()


def test_what_differs_from_the_commit_can_be_applied_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path / "checkout", check=True, capture_output=True)

    code = tmp_path / "checkout" / "megacl" / "code.py"
    code.parent.mkdir(parents=True)
    committed = b"one\ntwo\n\n\n\nthree\n"  # the difference ends with empty lines
    code.write_bytes(committed)
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    code.write_bytes(committed.replace(b"two", b"tw\xe9"))
    monkeypatch.setattr(megacl, "__file__", str(code))
    (tmp_path / "job").mkdir()
    freeze(tmp_path / "job", None, ClusterConfig())
    assert json.loads((tmp_path / "job" / "code.json").read_text())["dirty"]
    git("apply", "--reverse", str(tmp_path / "job" / "code.diff"))
    assert code.read_bytes() == committed


def test_a_dry_run_needs_no_slurm_and_writes_nothing(submit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    status, said, _ = submit("--dry-run")
    assert status == 0
    assert "1 node x 2 ranks on CPUs" in said
    assert "memory on each of 2 ranks" in said
    assert said.count("#SBATCH") > 5
    assert not submit.run_dir.parent.exists()
    assert "there is no sbatch here" in submit.refusal()


def test_a_run_that_waits_or_runs_is_not_submitted_again(submit: Command, slurm: Path) -> None:
    def queue(number: int, state: str) -> None:
        script = submit.run_dir / "jobs" / "0001" / "train.sbatch"
        (slurm / "squeue.jobs").write_text(f"{number}|{state}|me||N/A|N/A|10:00|None|{script}\n")

    assert submit()[0] == 0
    queue(71, "PENDING")
    assert "its job 71 is pending; `megacl cancel" in submit.refusal()
    queue(71, "FAILED")
    assert submit()[0] == 0
    assert record(submit.run_dir, 2)["number"] == 2
    queue(80, "RUNNING")  # submitted by hand
    began = {"number": 1, "job": "80", "restart": 0, "ranks": [], "step": 0, "started": 0, "time": 0}
    (submit.run_dir / "attempts" / "0001").mkdir(parents=True)
    (submit.run_dir / "attempts" / "0001" / "attempt.json").write_text(json.dumps(began))
    assert "its job 80 is running; `megacl cancel" in submit.refusal()


def test_a_record_of_a_job_that_cannot_be_read_hinders_no_submission(submit: Command) -> None:
    assert submit()[0] == 0
    (submit.run_dir / "jobs" / "0001" / "job.json").write_text("{")
    assert submit()[0] == 0


def test_a_job_that_cannot_be_remembered_is_taken_back(submit: Command, slurm: Path) -> None:
    fills = 'mkdir "$(dirname "$last")/job.json"; echo 71'  # where a file cannot be put
    (slurm / "sbatch").write_text(FAKES["sbatch"].replace("echo 71", fills))
    (slurm / "scancel").write_text('#!/bin/sh\necho "$@" > "$0.asked"\n')
    (slurm / "scancel").chmod(0o755)
    assert "job.json" in submit.refusal()
    assert (slurm / "scancel.asked").read_text() == "71\n"


def test_a_submission_beside_another_one_is_refused_and_touches_nothing_of_it(submit: Command) -> None:
    with alone_in(submit.run_dir / "jobs", "the other"):
        (submit.run_dir / "jobs" / "0001").mkdir()
        assert "another megacl submit is at work" in submit.refusal()
        assert (submit.run_dir / "jobs" / "0001").is_dir()


def test_what_sbatch_does_not_take_leaves_nothing_behind(submit: Command, slurm: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2; exit 1\n")
    assert submit.refusal("cluster.partition=x").endswith("error: invalid partition specified: x")
    submit.run_dir.mkdir(parents=True)
    (submit.run_dir / "kept").touch()
    submit.refusal()


def test_a_job_does_not_inherit_the_job_that_submits_it(
    submit: Command, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_JOB_ID", "RANK", "SLURM_CONF", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "7")
    assert submit()[0] == 0
    names = {line.partition("=")[0] for line in (slurm / "sbatch.env").read_text().splitlines()}
    assert {"SLURM_CONF", "SBATCH_ACCOUNT"} <= names
    assert not {"SLURM_CPUS_PER_TASK", "SLURM_JOB_ID", "RANK"} & names


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["optimizer.beta1=1.5"], "optimizer.beta1 is 1.5"),
        (["engine.kind=native"], "engine.kind is native, which runs on one rank, and there are 2"),
        (["--nodes", "4"], "4 nodes x 2 ranks: global_batch_size"),
        (["--nodes", "1-4"], "4 nodes x 2 ranks: global_batch_size"),
        (["engine.tensor_parallel=4"], "must be a multiple of"),
        (["cluster.memory=1M"], "of each node's memory, and cluster.memory is 1M"),
        (["cluster.gpus_per_node=2", "cluster.gpu_memory=1e-4"], "GB on each of 2 GPUs, and cluster.gpu_memory is"),
        (["cluster.gpus_per_node=1"], "cluster.tasks_per_node is 2, and a node has 1 GPUs"),
        (["cluster.tflops=1e-9"], "no job would reach its second step"),
        (["cluster.nodse=1"], "nodse is not a setting"),
        (["run_dir=cluster.yaml/x"], "is a file, and run_dir is"),
    ],
)
def test_what_would_fail_later_is_refused_in_one_line(submit: Command, changes: list[str], words: str) -> None:
    assert words in submit.refusal(*changes)


def test_data_that_is_not_there_is_said_before_it_is_waited_for(submit: Command, tmp_path: Path) -> None:
    missing = submit.refusal("sources.english.path=nowhere")
    assert "nowhere" in missing
    documents = ["sources.english.path=nowhere", "sources.english.documents=[x.jsonl]"]
    assert "sources.english is not prepared, and 2 ranks would wait" in submit.refusal(*documents)
    assert "warning: sources.english is not prepared" in submit("--dry-run", *documents)[1]
    alone = ("cluster.tasks_per_node=1", "tokenizer.path=new.model")
    assert "training prepares it first" in submit("--dry-run", *documents, *alone)[1]
    assert "1 rank would wait" in submit.refusal(*documents, *alone, "cluster.gpus_per_node=1")


def test_the_time_of_a_run_is_said_in_stretches(submit: Command) -> None:
    def time_line(*changes: str) -> str:
        return next(line for line in submit("--dry-run", *changes)[1].splitlines() if line.startswith("time: "))

    assert "not known before a step has been measured; a job has 8 min until" in time_line()
    whole = re.search(r"about (.*) \(at 0.001 TFLOP/s a rank\)", time_line("cluster.tflops=1e-3"))
    assert whole is not None
    submit.run_dir.mkdir(parents=True)
    steps = [{"kind": "step", "step": n, "flops_per_second": 1e6, "time": 0} for n in range(1, 4)]
    (submit.run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert "as its last steps took" in time_line("cluster.tflops=1e-3", "cluster.time=1-0", "--nodes", "1")
