"""What a run is doing, by its files and by what squeue said on a real cluster (SLURM 22.05)."""

import getpass
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megacl.attempts import Attempt, Outcome, begin_attempt, write_outcome
from megacl.errors import DataError, LaunchError
from megacl.publish import alone_in
from megacl.slurm import cancel as cancelling
from megacl.slurm.cancel import cancel_run
from megacl.slurm.logs import follow_lines, read_lines
from megacl.slurm.queue import find_jobs
from megacl.slurm.reasons import explain
from megacl.slurm.status import RunStatus, read_status, status_text

DOWN = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"
CONFIG = """\
run_dir: run
sources: {words: {path: data}}
model: {vocab_size: 512, hidden_size: 32, num_layers: 2, num_attention_heads: 2}
seq_length: 32
global_batch_size: 8
phases:
  - {name: one, mixture: {words: 1}, steps: 40, schedule: {kind: constant, max_lr: 1e-3}}
  - {name: two, mixture: {words: 1}, tokens: 15999, schedule: {kind: constant, max_lr: 1e-3}}
"""
STEPS = 40 + 15999 // 256


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory whose job 12 was submitted; no SLURM is here."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = tmp_path / "run"
    submitted(run, 1, "12")
    return run


def submitted(run: Path, number: int, job: str) -> None:
    folder = run / "jobs" / f"{number:04d}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "train.sbatch").write_text("#!/bin/bash\n#SBATCH --signal=B:USR1@60\n")
    record = {"number": number, "kind": "train", "job_id": job, "array": None, "submitted": time.time(), "after": []}
    record |= {"script": str(folder / "train.sbatch"), "log": str(run / "logs" / f"{job}.log"), "command": ["train"]}
    (folder / "job.json").write_text(json.dumps(record))


@pytest.fixture
def slurm(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """slurm(line, ...) makes squeue print these lines, {script} and {user} filled in, and notes all commands."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.defpath}")
    said, notes = tmp_path / "queue", tmp_path / "commands"
    for name in ("squeue", "scontrol", "scancel"):
        body = f'#!/bin/bash\necho "{name} $*" >> "{notes}"\n'
        if name == "squeue":
            body += f'[[ -s "{said}" ]] || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }}\n'
            body += f'cat "{said}"\n'
        if name == "scancel":  # the job ends
            body += f'sed -i "s/|RUNNING|/|FAILED|/; s/|PENDING|/|CANCELLED|/" "{said}"\n'
        (programs / name).write_text(body)
        (programs / name).chmod(0o755)

    def fill(*lines: str) -> Path:
        script = str(run / "jobs" / "0001" / "train.sbatch")
        text = "".join(line.format(script=script, user=getpass.getuser()) + "\n" for line in lines)
        said.write_text(text)
        return notes

    return fill


WAITS = "12|PENDING|{{user}}||N/A|N/A|10:00|{reason}|{{script}}"
TRAINS = "12|RUNNING|{user}|127.0.1.[1-2]|2026-11-28T21:58:38|2026-11-28T22:08:38|1-02:03:04|None|{script}"


def began(run: Path, *, step: int = 0, job: str | None = "12", monkeypatch: pytest.MonkeyPatch) -> Attempt:
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    return begin_attempt(run, ranks=["node1", "node1", "node2", "node2"], step=step, started=time.time())


def trained(run: Path, steps: int, *, seconds: float = 2.0, until: float | None = None) -> None:
    """Records of so many steps; the last one now."""
    until = time.time() if until is None else until
    records = [
        {
            "kind": "step",
            "step": step,
            "phase": "one" if step <= 40 else "two",
            "loss": 5.0 - step / 100,
            "tokens": 256 * step,
        }
        | {"seconds": seconds, "tokens_per_second": 256 / seconds, "time": until - (steps - step) * seconds}
        for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def text(status: RunStatus) -> str:
    return "\n".join(status_text(status))


def ended(kind: str, message: str, **more: object) -> Outcome:
    return Outcome(outcome=kind, exit_status=1, step=3, message=message, **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize(
    ("reason", "why", "do"),
    [
        ("Priority", "jobs of a higher priority are before it", "shorter cluster.time"),
        ("Resources", "as soon as enough nodes are free", "fewer nodes"),
        ("Dependency", "waits for other jobs to end", None),
        ("DependencyNeverSatisfied", "it will not start by itself", "megacl cancel "),
        ("BeginTime", "pauses before it starts a requeued job", None),
        ("JobHeldUser", "somebody holds it", "scontrol release 12"),
        (DOWN, "down, drained or reserved", "cluster.nodes=N"),
        ("ReqNodeNotAvail, UnavailableNodes:node[1-2]", "(node[1-2])", "cluster.nodes=N"),
        ("QOSMaxGRESPerUser", "limit of its QOS (QOSMaxGRESPerUser)", None),
        ("AssocGrpCPUMinutesLimit", "used up", "ask who grants it"),
        ("QOSMaxWallDurationPerJobLimit", "asks for more than its QOS allows", "submit again with less"),
        ("SomethingNew", "SLURM says SomethingNew", None),
    ],
)
def test_why_a_run_waits_is_said_in_words_and_what_can_be_done(run, slurm, reason, why, do):
    slurm(WAITS.format(reason=reason))
    found = read_status(run)
    assert (found.state, found.job, found.progress.steps) == ("queued", "12", STEPS)
    assert why in found.why
    assert found.do is None if do is None else do in str(found.do)
    assert why in text(found)


def test_a_requeued_run_says_what_stopped_it_before(run, slurm, monkeypatch):
    slurm(WAITS.format(reason="BeginTime").replace("N/A", "2099-01-01T00:00:00", 1))
    for step in (0, 20):
        attempt = began(run, step=step, monkeypatch=monkeypatch)
        write_outcome(run, ended("lost_rank", "it was killed", rank=3, node="node2", attempt=attempt.number))
    trained(run, 20)
    found = read_status(run)
    assert (found.state, found.restarts) == ("requeued", 1)
    assert found.causes == ("step 20: lost_rank (rank 3 on node2): it was killed",)
    assert found.progress.seconds_left == pytest.approx((STEPS - 20) * 2.0)
    shown = text(found)
    assert "starts    2099-01-01 00:00" in shown
    assert "restarts  1" in shown
    assert "of training, as fast as before" in shown


def test_a_users_own_form_of_times_does_not_reach_squeue(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text(
        "#!/bin/bash\n"
        'at=2099-01-01T00:00:00; [[ $SLURM_TIME_FORMAT == standard ]] || at="1 Jan 2099"\n'
        'echo "12|PENDING|me||$at|N/A|10:00|Priority|x"\n'
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "%d %b %Y")
    assert find_jobs(["12"])[0].start is not None


def test_a_script_that_is_not_the_runs_is_another_job(run, slurm):
    slurm(TRAINS.replace("{script}", "/home/alice/train.sbatch"))
    assert read_status(run).state == "lost"
    assert find_jobs(["12"])[0].script == "/home/alice/train.sbatch"


# ---------------------------------------------------------------------------------------------- at work


def test_a_run_that_trains_tells_step_loss_speed_nodes_and_its_end(run, slurm, monkeypatch):
    slurm(TRAINS)
    began(run, monkeypatch=monkeypatch)
    found = read_status(run)
    assert (found.state, found.why) == ("starting", "its ranks start, no step is done yet")
    trained(run, 50)
    now = time.time()
    found = read_status(run, now=now)
    assert (found.state, found.nodes, found.time_left) == ("running", "127.0.1.[1-2]", 93784.0)
    progress = found.progress
    assert (progress.step, progress.phase, progress.loss, progress.tokens) == (50, "two", 4.5, 12800)
    assert progress.tokens_per_second == 128
    assert found.estimated_end == pytest.approx(now + (STEPS - 50) * 2.0)
    tree = json.loads(json.dumps(found.tree()))
    assert (tree["step"], tree["steps"], tree["state"]) == (50, STEPS, "running")


def test_ranks_that_start_again_are_not_taken_for_ranks_that_train(run, slurm, monkeypatch):
    slurm(TRAINS)
    attempt = began(run, monkeypatch=monkeypatch)
    trained(run, 20)
    assert read_status(run).state == "running"
    write_outcome(run, ended("lost_rank", "it was killed", rank=1, node="node1", attempt=attempt.number, job="12"))
    found = read_status(run)
    assert (found.state, found.estimated_end) == ("starting", None)
    assert found.why.startswith("a rank was lost (rank 1 on node1); the job decides what is next, or waits")
    began(run, step=10, monkeypatch=monkeypatch)
    found = read_status(run)
    assert (found.state, found.why) == ("starting", "its ranks start, no step is done yet")


def test_speed_is_that_of_the_last_attempt_and_a_torn_line_is_passed_over(run, slurm, monkeypatch):
    slurm(TRAINS)
    trained(run, 30, seconds=9.0, until=time.time() - 3600)
    slow = (run / "metrics.jsonl").read_text()
    attempt = began(run, monkeypatch=monkeypatch)
    fast = [
        {"kind": "step", "step": step, "phase": "one", "loss": 1.0, "tokens": 1, "time": attempt.started + step - 30}
        for step in (31, 32, 33)
    ]
    (run / "metrics.jsonl").write_text(slow + "".join(json.dumps(line) + "\n" for line in fast) + '{"kind": "st')
    progress = read_status(run).progress
    assert (progress.step, progress.seconds_per_step) == (33, pytest.approx(1.0))


def test_a_run_without_slurm_is_found_at_work_by_its_lock(run, monkeypatch):
    (run / "jobs" / "0001" / "job.json").unlink()
    trained(run, 5)
    with alone_in(run, "another run"):
        found = read_status(run)
        assert (found.state, found.why) == ("running", f"process {os.getpid()} here")
        with pytest.raises(LaunchError, match=rf"process {os.getpid()} here; Ctrl-C there, or kill -TERM"):
            cancel_run(run, print)
    assert read_status(run).state == "lost"


# ---------------------------------------------------------------------------------------------- over


def test_how_a_run_ended_is_told_without_slurm_and_how_it_goes_on(run, monkeypatch):
    attempt = began(run, monkeypatch=monkeypatch)
    write_outcome(run, ended("hung", "rank 1 in all_reduce", rank=1, node="node1", attempt=attempt.number))
    found = read_status(run)
    assert (found.state, found.outcome, found.exit_status) == ("ended", "hung", 1)
    assert found.why == "nothing moved on any more (rank 1 on node1): rank 1 in all_reduce"
    assert str(found.do).startswith(f"to go on: megacl submit {run}/jobs/0001/config.yaml")
    assert found.slurm == "there is no squeue here; ask on a machine of the cluster."
    write_outcome(run, Outcome(outcome="done", exit_status=0, step=STEPS, message="done", attempt=attempt.number))
    found = read_status(run)
    assert (found.why, found.do) == ("done", None)


def test_a_job_that_slurm_has_forgotten_and_that_left_no_word_is_lost(run, slurm, monkeypatch):
    slurm()
    began(run, monkeypatch=monkeypatch)
    found = read_status(run)
    assert found.state == "lost"
    assert found.why.startswith("SLURM knows job 12 no more, and nothing says how it ended")


def test_what_slurm_remembers_of_a_job_that_left_no_word_is_told(run, slurm, monkeypatch):
    began(run, monkeypatch=monkeypatch)
    slurm(TRAINS.replace("RUNNING", "TIMEOUT"))
    assert read_status(run).why == "its time limit ended it before it had saved"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder; name a run's run_dir"):
        read_status(tmp_path / "nothing")
    with pytest.raises(DataError, match="no run lies there"):
        read_status(tmp_path)


# ---------------------------------------------------------------------------------------------- cancelling


def test_cancelling_forbids_the_requeue_before_it_tells_the_ranks_to_save(run, slurm, monkeypatch):
    notes, said = slurm(TRAINS), list[str]()
    began(run, monkeypatch=monkeypatch)
    cancel_run(run, said.append, pause=0.01)
    done = [line for line in notes.read_text().splitlines() if not line.startswith("squeue")]
    assert done == ["scontrol update JobId=12 Requeue=0", "scancel --batch --signal=USR1 12"]
    assert said[0].startswith("job 12 is told to save and to end")
    assert said[-1] == f"{run}: cancelled; nothing is saved"


def test_the_tasks_of_an_array_that_wait_leave_the_queue_together(run, slurm):
    waiting = [f"12_{task}|PENDING|{{user}}||N/A|N/A|10:00|Priority|{{script}}" for task in range(3)]
    notes, said = slurm(*waiting), list[str]()
    cancel_run(run, said.append, pause=0.01)
    assert [line for line in notes.read_text().splitlines() if line.startswith("scancel")] == ["scancel 12"]
    assert said[0] == "job 12_0 waited (Priority) and is out of the queue"
    assert len(said) == 2


def test_a_job_that_does_not_end_by_itself_is_ended(run, slurm, tmp_path, monkeypatch):
    notes, said = slurm(TRAINS), list[str]()
    monkeypatch.setattr(cancelling, "_GRACE", 0.05)
    monkeypatch.setattr(cancelling, "_save_seconds", lambda script: 0.0)
    hears = (tmp_path / "bin" / "scancel").read_text().replace("sed", '[[ "$*" == *USR1* ]] || sed')
    (tmp_path / "bin" / "scancel").write_text(hears)
    cancel_run(run, said.append, pause=0.05)
    assert "scancel 12" in notes.read_text().splitlines()
    assert any("has not ended in" in line for line in said)


def test_somebody_elses_job_is_refused_and_nothing_is_done(run, slurm):
    notes = slurm(TRAINS.replace("{user}", "alice"))
    with pytest.raises(LaunchError, match=r"job 12 is alice's; ask alice to cancel it"):
        cancel_run(run, print)
    assert "scancel" not in notes.read_text()


# ---------------------------------------------------------------------------------------------- logs

LOG = """\
=== job 12, restart 0, on node[1-2]
0: run: going on
1: hello of one
srun: error: node2: task 1: Killed
lost_rank: failure 1 without a new step saved
=== srun ended with status 137; next: again 30
0: second
=== srun ended with status 75; next: requeue 0
=== job 12, restart 1, on node[1-2]
0: third
1: third of one
"""


def test_logs_are_told_by_rank_and_by_attempt(run, monkeypatch):
    (run / "logs").mkdir()
    (run / "logs" / "12.log").write_text(LOG)
    for restart in ("0", "0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        began(run, monkeypatch=monkeypatch)
    assert "".join(read_lines(run)) == LOG
    assert list(read_lines(run, rank=1)) == ["hello of one\n", "third of one\n"]
    assert list(read_lines(run, attempt=2)) == [
        "0: second\n",
        "=== srun ended with status 75; next: requeue 0\n",
    ]
    assert list(read_lines(run, attempt=1))[-1] == "=== srun ended with status 137; next: again 30\n"
    assert list(read_lines(run, attempt=3, rank=0)) == ["third\n"]
    with pytest.raises(DataError, match="no attempt 4: it has 3, the last is 3"):
        list(read_lines(run, attempt=4))


def test_following_waits_for_a_log_and_goes_on_through_truncation_and_another_job(run):
    logs, lines, over = run / "logs", list[str](), threading.Event()
    with pytest.raises(DataError, match="job 12 has not begun, so it has no log; --follow waits for it"):
        list(read_lines(run))

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 60
        while len(lines) < count:
            assert time.monotonic() < deadline, lines
            time.sleep(0.005)

    collected = follow_lines(run, rank=0, over=over.is_set, pause=0.01)

    def collect() -> None:
        for line in collected:
            lines.append(line)  # a line at a time, since the test looks on

    follower = threading.Thread(target=collect)
    follower.start()
    logs.mkdir()
    with open(logs / "12.log", "w") as log:
        log.write("=== job 12, restart 0, on node1\n0: one\n0: t")
        log.flush()
        wait_for(1)
        log.write("wo\n1: of one\n")
        log.flush()
        wait_for(2)
    (logs / "12.log").write_text("0: anew\n")
    wait_for(3)
    submitted(run, 2, "13")
    (logs / "13.log").write_text("0: another job\n")
    wait_for(4)
    over.set()
    follower.join(60)
    assert lines == ["one\n", "two\n", "anew\n", "another job\n"]


def test_reasons_that_never_pass_say_what_to_do():
    assert explain("BadConstraints").never
    assert explain("launch failed requeued held").do == "scontrol release {job}"
    assert not explain("QOSMaxJobsPerUserLimit").never
    assert explain("AssocMaxNodePerJobLimit").never
