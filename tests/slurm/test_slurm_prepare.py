"""slurm/prepare.sbatch.j2: what it renders to, and on a real cluster of two nodes against one prepare without SLURM."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from slurm_cluster import PACKAGES, Cluster, Job, missing_programs

from megacl.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
TIMEOUT = 240
ENVIRONMENT = {"MEGACL_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}


def render(**values: object) -> str:
    template = (ROOT / "slurm" / "prepare.sbatch.j2").read_text()
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(template).render(values)


def test_the_script_quotes_every_word_and_leaves_out_what_is_not_given(tmp_path):
    script = render(
        tasks=3, inputs=["it's raw", "$HOME"], tokenizer="a b.model", out="o'ut", options=["--field", "x y"]
    )
    assert "--account" not in script
    assert "--partition" not in script
    assert script.startswith("#!/bin/bash\n")
    (tmp_path / "prepare.sbatch").write_text(script)
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "MEGACL_PYTHON": f"{tmp_path}/python", "SLURM_JOB_ID": "7"}

    def words(*arguments: str, **more: str) -> list[str]:
        command = ["bash", str(tmp_path / "prepare.sbatch"), *arguments]
        return subprocess.run(
            command, env=environment | more, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert words(SLURM_ARRAY_TASK_ID="2", SLURM_CPUS_PER_TASK="5") == [
        "-m", "megacl", "prepare", "it's raw", "$HOME", "--tokenizer", "a b.model", "--out", "o'ut", "--workers", "5",
        "--field", "x y", "--task", "2/3",
    ]  # fmt: skip
    assert words("merge") == ["-m", "megacl", "data", "merge", "o'ut"]


def test_the_script_asks_for_what_is_given():
    script = render(
        tasks=900, inputs=["raw"], tokenizer="t", out="out", account="acc", partition="cpu", time="2:00:00", cpus=16,
        mem="32G", at_once=50,
    )  # fmt: skip
    lines = script.splitlines()
    assert {"#SBATCH --account=acc", "#SBATCH --partition=cpu", "#SBATCH --mem=32G --time=2:00:00"} <= set(lines)
    assert "--cpus-per-task=16" in script
    assert "--array=1-900%50 " in script


def test_the_merge_asks_for_memory_of_its_own_in_the_way_the_tasks_do():
    needed = {"tasks": 2, "inputs": ["raw"], "tokenizer": "t", "out": "out"}
    for given, task, merge in (
        ({}, "--mem-per-cpu=1G", "--mem-per-cpu=2G"),
        ({"merge_mem": "9G"}, "--mem-per-cpu=1G", "--mem-per-cpu=9G"),
        ({"mem": "4G", "merge_mem": "9G"}, "--mem=4G", "--mem=9G"),
    ):
        assert re.findall(r"--mem\S*=\S+", render(**needed, **given)) == [task, merge]


@pytest.mark.long
def test_an_array_on_two_nodes_makes_the_folder_of_one_prepare(tmp_path):
    missing = missing_programs()
    if missing:
        why = f"no SLURM here ({', '.join(missing)} missing): apt-get install --no-install-recommends {PACKAGES}"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    folder = tmp_path / "a folder"
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    for number in range(6):
        lines = [json.dumps({"text": " ".join(draw.choices(vocabulary, k=60))}) for _ in range(60)]
        file = folder / "the raw" / f"{number}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    environment = os.environ | ENVIRONMENT
    train_tokenizer([str(folder / "the raw")], folder / "small.model", 300)
    common = ["--tokenizer", "small.model", "--validation", "0.2", "--workers", "1"]
    alone = [sys.executable, "-m", "megacl", "prepare", "the raw", *common, "--out", "alone", "--source", "words"]
    subprocess.run(alone, cwd=folder, env=environment, check=True)

    options = ["--validation", "0.2", "--source", "words"]
    script = render(
        tasks=4, inputs=["the raw"], tokenizer="small.model", out="the out", options=options, cpus=1, mem="0",
        merge_mem="0", time="10",
    )  # fmt: skip
    (folder / "prepare.sbatch").write_text(script)
    with Cluster() as cluster:
        submitted = cluster.run("bash", "prepare.sbatch", environment=ENVIRONMENT, cwd=folder)
        array, merge = submitted.split()
        state = Job(cluster, merge, folder).wait_for_end(timeout=TIMEOUT)
        logs = "\n".join(log.read_text() for log in sorted(folder.glob("*.log")))
        assert (state.name, state.exit_code) == ("COMPLETED", "0:0"), logs
        assert len(list(folder.glob(f"megacl-prepare.{array}.*.log"))) == 4
    made, expected = (
        {file.name: file.read_bytes() for file in (folder / name).glob("[!.]*")} for name in ("the out", "alone")
    )
    assert made == expected
    assert not (folder / "the out" / ".prepare").exists()
