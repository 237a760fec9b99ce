"""The train script's part behind the ranks' end, in bash, with programs that only note how they are called."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megacl.config_cluster import ClusterConfig
from megacl.slurm.render import Job, render_script

SRUN = """\
#!/bin/bash
echo "srun at $MASTER_PORT" >>"$NOTES"
read -r first <"$STATUSES"
sed -i 1d "$STATUSES"
[[ $first == told ]] && kill -USR1 "$PPID" && exit 75
if [[ $first == deaf ]]; then # to the first two times that it is told
    trap 'heard+=x' USR1
    kill -USR1 "$PPID"
    until [[ $heard == xxx* ]]; do /bin/sleep 0.05; done
    exit 75
fi
exit "$first"
"""
# It answers as job-end does, a line a call; with none left it fails.
PYTHON = """\
#!/bin/bash
echo "${@:3:1} ${@:5}" | sed -E 's/--since [0-9]+ //' >>"$NOTES"
read -r first <"$ANSWERS" || exit 3
sed -i 1d "$ANSWERS"
echo "$first"
"""
SCONTROL = """\
#!/bin/bash
case "$1 $2" in
"show hostnames") echo 127.0.0.1 ;;
"show job") echo "   ReqNodeList=(null) ExcNodeList=(null)"; echo "   ExcNodeList=$EXCLUDED" ;;
*) echo "scontrol $*" >>"$NOTES" ;;
esac
"""
# Its controller does not answer once, where the file says so, and never permits a requeue, where it says the other.
MOODY = """\
#!/bin/bash
here=$(dirname "$0")
[[ $1 == show ]] && exit
echo "$*" >>"$NOTES"
if [[ $1 == ping ]]; then
    echo "Slurmctld(primary) at here $(cat "$here/answers of slurm")"
    [[ $(cat "$here/answers of slurm") == "is UP" ]] || echo back >"$here/answers of slurm"
    exit
fi
[[ $(cat "$here/answers of slurm") == back ]]
"""
ASKED = "job-end --status {} --max-restarts 4 --first-wait 20"


@dataclass(frozen=True)
class Ran:
    status: int
    notes: list[str]
    log: str


def run_script(
    folder: Path,
    *,
    statuses: list[object],
    answers: list[str],
    excluded: str = "(null)",
    prologue: str = "",
    scontrol: str = SCONTROL,
) -> Ran:
    """Runs a rendered script whose sruns end with these statuses, and whose job-ends give these answers."""
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", scontrol), ("sleep", "#!/bin/bash\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    (folder / "answers").write_text("".join(f"{answer}\n" for answer in answers))
    job = Job(
        kind="train",
        name="a run",
        run_dir=folder / "a run",
        number=1,
        workdir=folder,
        python=str(folder / "python"),
        command=("train", "config.yaml"),
    )
    script = folder / "train.sbatch"
    script.write_text(render_script(job, ClusterConfig(max_restarts=4, restart_seconds=20, prologue=prologue)))
    notes = folder / "notes"
    notes.touch()
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "NOTES": str(notes),
        "STATUSES": str(folder / "statuses"),
        "ANSWERS": str(folder / "answers"),
        "EXCLUDED": excluded,
    }
    done = subprocess.run(
        ["bash", str(script)], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    lines = [line.partition(" at ")[0] for line in notes.read_text().splitlines()]
    return Ran(done.returncode, lines, done.stdout + done.stderr)


def test_ranks_start_again_in_the_allocation_until_the_job_is_to_end(tmp_path: Path) -> None:
    ran = run_script(tmp_path, statuses=[137, 1, 0], answers=["again 0", "again 0", "end 0"])
    assert ran.status == 0, ran.log
    asked = [ASKED.format(status) for status in (137, 1, 0)]
    assert ran.notes == ["srun", asked[0], "srun", asked[1], "srun", asked[2]]
    assert "=== srun ended with status 137; next: again 0" in ran.log


@pytest.mark.parametrize(("excluded", "update"), [("(null)", "ExcNodeList=n2,n3"), ("n9", "ExcNodeList=n2,n3,n9")])
def test_a_requeue_leaves_out_the_bad_nodes_beside_those_left_out_before(
    tmp_path: Path, excluded: str, update: str
) -> None:
    ran = run_script(tmp_path, statuses=[2], answers=["requeue 0 n2,n3"], excluded=excluded)
    assert ran.status == 75, ran.log
    assert ran.notes[2:] == ["scontrol requeue 7", f"scontrol update JobId=7 {update}"]


def test_a_signal_that_the_time_is_up_makes_a_requeue_of_a_restart(tmp_path: Path) -> None:
    ran = run_script(tmp_path, statuses=["told"], answers=["again 300"])
    assert ran.status == 75, ran.log
    # It reaches srun too, which may end of it before it ends by itself.
    assert ran.notes[1] in [ASKED.format(status) for status in (75, 138)]
    assert (ran.notes[0], ran.notes[2:]) == ("srun", ["scontrol requeue 7"])


def test_ranks_are_told_again_where_srun_has_lost_the_signal(tmp_path: Path) -> None:
    ran = run_script(tmp_path, statuses=["deaf"], answers=["requeue 0"])
    assert ran.status == 75, ran.log
    assert ran.notes == ["srun", ASKED.format(75), "scontrol requeue 7"]
    assert "Terminated" not in ran.log


@pytest.mark.parametrize(("answers", "status"), [(["end 2"], 2), ([], 137)])
def test_the_job_ends_as_it_is_told_or_with_sruns_status_where_nobody_tells(
    tmp_path: Path, answers: list[str], status: int
) -> None:
    ran = run_script(tmp_path, statuses=[137], answers=answers)
    assert (ran.status, ran.notes) == (status, ["srun", ASKED.format(137)]), ran.log


def run_study_task(folder: Path, *, does: str, restart: int = 0) -> Ran:
    """Runs the second task of a study's array, whose command does so much of bash."""
    job = Job(
        kind="study",
        name="a study",
        run_dir=folder,
        number=1,
        workdir=folder,
        python=str(folder / "python"),
        command=("study", "study.yaml", "--only"),
        alone=True,
        array="1-2",
        runs=("first", "the second"),
    )
    job.folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("python", does), ("scontrol", f"echo \"$*\" >>'{folder}/notes'"), ("sleep", "/bin/sleep 0.1")):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    script = render_script(job, ClusterConfig())
    (folder / "notes").write_text("")
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    return Ran(done.returncode, (folder / "notes").read_text().splitlines(), done.stdout + done.stderr)


@pytest.mark.parametrize("status", [75, 138])
def test_a_studys_run_that_was_stopped_is_requeued_alone(tmp_path: Path, status: int) -> None:
    """SLURM_JOB_ID of an array's last task is the number of the whole array."""
    ran = run_study_task(tmp_path, does=f"exit {status}")
    assert (ran.status, ran.notes) == (75, ["requeue 7_2"]), ran.log


def test_a_studys_run_that_saves_nothing_new_in_three_stretches_is_not_requeued_again(tmp_path: Path) -> None:
    saves = "mkdir -p 'runs/the second/checkpoints/step-1' && touch 'runs/the second/checkpoints/step-1/manifest.json'"
    saving = f"/bin/sleep 0.1; {saves}"
    killed = f"{saving}; kill -KILL $PPID"  # as where the node dies
    stretches = [*["exit 75"] * 2, f"{saving}; exit 75", *["exit 75"] * 2, killed, "exit 75", "exit 138", "exit 75"]
    ran = [run_study_task(tmp_path, does=does, restart=number) for number, does in enumerate(stretches)]
    assert [each.status for each in ran] == [75] * 5 + [-9] + [75] * 3
    assert [bool(each.notes) for each in ran] == [True] * 5 + [False] + [True] * 2 + [False]
    assert "stopped 3 times without a new step saved" in ran[-1].log
    # Submitted again, or requeued from outside, it has another three.
    for restart in (0, 9):
        assert run_study_task(tmp_path, does="exit 75", restart=restart).notes == ["requeue 7_2"]


def test_a_studys_run_is_told_again_where_its_container_has_lost_the_signal(tmp_path: Path) -> None:
    deaf = "trap 'heard+=x' USR1; kill -USR1 $PPID; until [[ $heard == xxx* ]]; do /bin/sleep 0.05; done; exit 75"
    ran = run_study_task(tmp_path, does=deaf)
    assert (ran.status, ran.notes) == (75, ["requeue 7_2"]), ran.log
    assert "Terminated" not in ran.log


def test_a_signal_during_the_prologue_does_not_end_the_job_but_has_it_requeued(tmp_path: Path) -> None:
    ran = run_script(tmp_path, statuses=[0], answers=["again 300"], prologue="kill -USR1 $$")
    assert (ran.status, ran.notes[-1]) == (75, "scontrol requeue 7"), ran.log


@pytest.mark.parametrize(
    ("first", "asked", "status"),
    [("is DOWN", ["requeue 7", "ping", "requeue 7"], 75), ("is UP", ["requeue 7", "ping", "requeue 7"], 1)],
)
def test_a_controller_that_does_not_answer_is_asked_again_and_one_that_says_no_is_not(
    tmp_path: Path, first: str, asked: list[str], status: int
) -> None:
    (tmp_path / "answers of slurm").write_text(first)
    ran = run_script(tmp_path, statuses=[1], answers=["requeue 0"], scontrol=MOODY)
    assert (ran.status, ran.notes[2:]) == (status, asked), ran.log
