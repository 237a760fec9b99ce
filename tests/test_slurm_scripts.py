"""Rendered job scripts: what words arrive, whatever names hold; the scripts of three clusters, whole."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacl.config_cluster import ClusterConfig
from megacl.configfile import checked, load_cluster
from megacl.errors import ConfigError
from megacl.slurm.render import Job, directive, render_script

# Words that would do something in a script without quotes, and any others that a file's name can have.
NASTY = [
    "a b",
    "it's",
    '"',
    "$(touch hit)",
    "`touch hit`",
    "${HOME}",
    "*",
    "~",
    "-n",
    "--",
    "a\nb",
    "#",
    "%j",
    "é",
    ";",
    "\\",
    "",
]
WORD = st.sampled_from(NASTY) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


def job(**values: object) -> Job:
    given = {
        "kind": "train", "name": "a run", "run_dir": Path("/runs/a run"), "number": 1, "workdir": Path("/work"),
        "python": "/opt/python", "command": ("train", "/runs/a run/jobs/0001/config.yaml"),
    }  # fmt: skip
    return Job(**given | values)  # type: ignore[arg-type]


def cluster(**values: object) -> ClusterConfig:
    config = checked(values, ClusterConfig)
    config.check()
    return config


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fakes of what a script calls: srun prints GIVEN, its folder and its words, with a NUL behind each."""
    folder = tmp_path_factory.mktemp("bin")
    for name, text in (
        ("srun", '#!/bin/bash\nprintf "%s\\0" "${GIVEN-}" "$PWD" "$@" >&9\n'),
        ("scontrol", '#!/bin/sh\n[ "$1" = show ] && echo 127.0.0.1\n'),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def arriving(script: str, programs: Path, folder: Path) -> list[str]:
    """What srun is given by a script: the variable GIVEN, the folder it starts in, its words."""
    (folder / "s.sbatch").write_bytes(script.encode())
    command = ["bash", "-c", f"exec 9>{folder}/words; bash {folder}/s.sbatch"]
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, timeout=60)
    return (folder / "words").read_bytes().decode().split("\0")[:-1]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORD, min_size=1, max_size=4), value=WORD, python=WORD.filter(bool))
def test_every_word_arrives_as_it_is_and_nothing_in_it_runs(
    programs: Path, tmp_path: Path, words: list[str], value: str, python: str
) -> None:
    script = render_script(
        job(workdir=tmp_path, command=tuple(words), python=python), cluster(environment={"GIVEN": value})
    )
    variable, where, *given = arriving(script, programs, tmp_path)
    assert given[given.index("--wait=30") + 1 :] == [python, "-m", "megacl", *words]
    assert (variable, where) == (value, str(tmp_path))
    assert not (tmp_path / "hit").exists()


@given(value=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_an_option_is_quoted_as_slurm_reads_it_or_refused_for_a_line_break(value: str) -> None:
    if len(f"{value}.".splitlines()) > 1:
        with pytest.raises(ConfigError, match="line breaks"):
            directive("--job-name", value)
        return
    line = directive("--job-name", value)
    assert line.splitlines() == [line]
    # SLURM takes away a backslash before any character, and quotes around the whole: so does a shell for these two.
    text = line.removeprefix("#SBATCH --job-name=")
    assert re.sub(r"\\(.)", r"\1", text[1:-1] if text.startswith('"') else text, flags=re.DOTALL) == value


@pytest.mark.parametrize("name", ["back\\slash", "line\nbreak", "at 12:30"])
def test_a_run_directory_that_slurm_or_python_cannot_use_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name it differently"):
        render_script(job(run_dir=Path("/runs") / name), cluster())


def test_a_percent_sign_in_a_run_directory_is_no_code_of_slurms() -> None:
    script = render_script(job(run_dir=Path("/runs/100%j")), cluster())
    assert "#SBATCH --output=/runs/100%%j/logs/%j.log\n" in script


def test_a_cluster_file_asks_for_what_it_names_and_nothing_else() -> None:
    given = {
        "partition": "p q", "account": "a", "qos": "high", "reservation": "r", "constraint": "a100&nvlink",
        "exclude": "n[1-3,7]", "nodes": "2-4", "gpus_per_node": 4, "gpu_type": "a100", "cpus_per_task": 3,
        "memory": "10G", "time": "1-12", "sbatch": ["--exclusive", "--switches=1@2:00"], "cpu_bind": "sockets",
    }  # fmt: skip
    lines = [line for line in render_script(job(), cluster(**given)).splitlines() if line.startswith("#SBATCH")]
    words = {word for line in lines for word in shlex.split(line.removeprefix("#SBATCH"))}
    assert words == {
        "--job-name=a run", "--partition=p q", "--account=a", "--qos=high", "--reservation=r",
        "--constraint=a100&nvlink", "--exclude=n[1-3,7]", "--nodes=2-4", "--ntasks-per-node=4",
        "--gpus-per-node=a100:4", "--cpus-per-task=3", "--mem=10G", "--time=1-12", "--exclusive",
        "--switches=1@2:00", "--requeue", "--open-mode=append", "--output=/runs/a run/logs/%j.log",
        "--signal=B:USR1@120",
    }  # fmt: skip
    plain = render_script(job(), cluster())
    for option in ("--partition", "--account", "--gpus", "--mem", "--cpus-per-task", "--exclude", "--cpu-bind"):
        assert option not in plain


def test_torchrun_starts_a_task_a_node_with_the_cpus_of_its_ranks() -> None:
    script = render_script(job(), cluster(nodes=2, tasks_per_node=4, cpus_per_task=3, launcher="torchrun"))
    assert "#SBATCH --nodes=2 --ntasks-per-node=1\n" in script
    assert "#SBATCH --cpus-per-task=12\n" in script
    assert "--nproc-per-node=4 " in script


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nodes": "2-"}, "cluster.nodes is '2-'"),
        ({"nodes": "3-2"}, "cluster.nodes is '3-2'"),
        ({"time": "a while"}, "cluster.time is 'a while'"),
        ({"time": "0"}, "cluster.time is '0'"),
        ({"time": "2", "signal_seconds": 100}, "cluster.signal_seconds is 100"),
        ({"memory": "10GB"}, "cluster.memory is '10GB'"),
        ({"environment": {"A B": "1"}}, "cluster.environment names 'A B'"),
        ({"scratch": "/s/$(id)"}, "cluster.scratch is"),
        ({"sbatch": ["-p x"]}, "sbatch[0] is '-p x'"),
        ({"launcher": "mpirun"}, "launcher is 'mpirun'"),
        ({"partitoin": "x"}, "did you mean partition?"),
    ],
)
def test_a_wrong_setting_of_a_cluster_is_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        cluster(**values)


def test_times_are_read_as_slurm_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    for text, seconds in (
        ("90", 5400), ("1:30", 90), ("1:30:00", 5400), ("2-12", 216000), ("1-2:3", 93780), ("1-2:3:4", 93784),
    ):  # fmt: skip
        file.write_text(f"time: {text}\nsignal_seconds: 10\n")
        assert load_cluster(str(file)).time_seconds == seconds
        assert load_cluster("cpu-test", [f"time={text}", "signal_seconds=10"]).time == text


def test_a_cluster_is_found_by_its_name_or_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_cluster("h100x8", ["nodes=2"]).node_range == (2, 2)
    Path("ours.yaml").write_text("nodes: 3\nmemory: 2G\n")
    assert (load_cluster("ours.yaml").nodes, load_cluster("ours.yaml").memory_bytes) == (3, 2 << 30)
    with pytest.raises(ConfigError, match=re.escape("did you mean 'cluster/h100x8.yaml'?")):
        load_cluster("h100x9")
